"""The settings of the rounding."""

from __future__ import annotations

from dataclasses import dataclass

from low_precision.rounding import Overflow
from low_precision.rules import ADDED_SITES, ALL_SITES, ELEMENTWISE, EVERY, LINE_FORM, PRODUCTS, SITE_NAMES
from settings import kinds
from settings.kinds import Kind
from settings.setting import of_group

setting = of_group("rounding")


@dataclass(frozen=True)
class RoundingSettings:
    """What is rounded, and how."""

    recipe: str | None = setting(
        None,
        kinds.or_none(kinds.RECIPE),
        "the recipe that rules of operands in site are from, so that they are for products with a weight alone",
        default_text="none",
    )
    precision: str = setting("float32", kinds.FORMAT, "number format of the rounded sites")
    rounding: str = setting("nearest", kinds.ROUNDING, "rounding of the rounded sites")
    quantize: tuple[str, ...] = setting(
        ALL_SITES,
        Kind(f"all, none, or a comma-separated choice of {SITE_NAMES}", kinds.sites),
        f"the sites that are rounded; all is every one but {', '.join(ADDED_SITES)}, {ELEMENTWISE} and {PRODUCTS}",
        default_text="all",
    )
    site: tuple[str, ...] = setting(
        (),
        Kind(
            f"{LINE_FORM}, each site once for each pattern, SITE one of {SITE_NAMES}, or {EVERY} for all that have a"
            " rule there so far",
            kinds.overrides,
        ),
        "a site in a format of its own, e.g. accumulator=float16:stochastic or momentum.exp_avg_sq=bfloat16; with a"
        " PATTERN, in the modules whose names it matches alone, e.g. 'stage3.*/weights=bfloat16' or 'fc/*=float32';"
        " repeatable, later ones win",
        default_text="none",
    )
    transform: tuple[str, ...] = setting(
        (),
        kinds.TRANSFORM,
        "what both operands of a product are multiplied by along its sum before they are rounded, of all three where no"
        " PRODUCT is named; fixed, random: the signs of the numbers; bfloat16: the result is rounded to it; repeatable,"
        " later ones win",
        default_text="none",
    )
    layers: tuple[str, ...] | None = setting(
        None,
        kinds.or_none(Kind("comma-separated name patterns, e.g. 'stage1.*,fc'", kinds.patterns)),
        "round only the modules with these names",
        default_text="every module",
    )
    rounding_seed: int | None = setting(
        None, kinds.or_none(kinds.SEED), "noise of stochastic rounding alone", default_text="the seed"
    )
    overflow: str = setting(
        "saturate",
        kinds.one_of(*(o.value for o in Overflow)),
        "beyond the largest value; infinity: where it is",
    )
    loss_scale: float | str = setting(
        1.0,
        Kind(f"{kinds.FACTOR.allowed}, or dynamic", kinds.loss_scale),
        "factor on the loss, divided out of the gradients",
    )
    smallest_state: int = setting(
        0, kinds.whole(0), "what the optimizer keeps of a parameter with fewer numbers is not rounded"
    )
    backend: str = setting(
        "auto",
        kinds.one_of("auto", "eager", "fused", "qtorch"),
        "rounding engine; qtorch runs qtorch itself",
    )
