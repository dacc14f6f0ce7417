"""What the rounding of a model does not reach: refused, or said in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from low_precision.errors import SettingError
from low_precision.noted import Notes
from low_precision.rules import FLOWING, OPERANDS, PRODUCTS, Line, is_there
from low_precision.torch_private import parameters_of
from low_precision.transforms import PRODUCT_NAMES, Transform

_SHOWN = 3  # names of modules of one kind


def computed_weights(module: nn.Module) -> list[str]:
    """The names of a module's tensors that it computes from parameters before each forward pass.

    So torch.nn.utils.parametrize does, and what is built on it, and the older weight_norm and spectral_norm. Pruning,
    which multiplies by 0 or 1, is left out: numbers of a format stay such numbers.
    """
    parametrized = getattr(module, "parametrizations", None)
    names = list(parametrized) if isinstance(parametrized, nn.ModuleDict) else []
    parameters = parameters_of(module)
    for name in vars(module):
        weight_norm = f"{name}_g" in parameters and f"{name}_v" in parameters
        spectral_norm = f"{name}_orig" in parameters and f"{name}_mask" not in dict(module.named_buffers(recurse=False))
        if weight_norm or spectral_norm:
            names.append(name)
    return names


def described(name: str, module: nn.Module) -> str:
    """A module as the user knows it: its name in the model, and its type."""
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def warn(places: Iterable[tuple[str, str, str]]) -> None:
    """One sentence that names the products which are not rounded: (function, full name of the module, its type)."""
    if listed := _listed(places):
        warnings.warn(f"products that are not rounded: {listed}", stacklevel=2)


def warn_compiled() -> None:
    """One sentence for a model that is compiled before its first forward pass."""
    warnings.warn(
        "a compiled model is not looked through for products that are not rounded: call it once before torch.compile "
        "to have them named",
        stacklevel=2,
    )


def check(
    sites: Iterable[str], lines: Iterable[Line], notes: Notes, when: Collection[str], by_recipe: bool = False
) -> None:
    """SettingError for a site, one of `when`, that there was nothing for in a forward pass.

    lines: those of single modules; one whose modules were not called may wait for another pass. by_recipe: whether a
    recipe sets the operands.
    """
    wanted = list(sites)
    reached = set(notes.reached)
    # All that there are, or a recipe's: who asks for them has some. So a model of one layer has no dgrad.
    if (by_recipe or set(wanted) >= set(OPERANDS)) and reached & set(OPERANDS):
        reached |= set(OPERANDS)
    for site in wanted:
        if site in when and site not in reached:
            note = " (a recipe rounds products with a weight alone)" if by_recipe and site in OPERANDS else ""
            raise SettingError("site", site, f"one that this model has: {_there(notes, notes.modules)}", note=note)
    for line in lines:
        modules = {name for name in notes.modules if line.reaches([name])}
        meant = OPERANDS if line.site == PRODUCTS else (line.site,)
        if line.pattern is None or not is_there(line.site, line.rule) or not modules or not set(meant) & set(when):
            continue
        if not any(notes.reached.get(site, set()) & modules for site in meant):
            raise SettingError("site", line.left_side, f"one that these modules have: {_there(notes, modules)}")


def check_transforms(
    transforms: Mapping[str, Transform], notes: Notes, when: Collection[str], by_recipe: bool = False
) -> None:
    """SettingError for a transform of a product, one with operands in `when`, that a forward pass had none of."""
    there = [product for product in PRODUCT_NAMES if notes.reached.keys() & _operands_of(product)]
    if there and (by_recipe or len(transforms) == len(PRODUCT_NAMES)):  # as of operands, above
        return
    for product, transform in transforms.items():
        if product not in there and _operands_of(product) & set(when):
            allowed = f"one of a product that this model has: {', '.join(there) or 'none'}"
            raise SettingError("transform", f"{product}={transform}", allowed)


def _operands_of(product: str) -> set[str]:
    return {site for site in OPERANDS if site.startswith(f"{product}.")}


def _there(notes: Notes, modules: Collection[str]) -> str:
    """The sites that there is something for in these modules."""
    return ", ".join(site for site in FLOWING if notes.reached.get(site, set()) & set(modules)) or "none"


def _listed(places: Iterable[tuple[str, str, str]]) -> str:
    """The places, those of one function and one type of module together, a few names of each."""
    groups: dict[tuple[str, str], list[str]] = {}
    for function, name, kind in places:
        groups.setdefault((function, kind), []).append(name)
    texts = []
    for (function, kind), names in groups.items():
        shown = ", ".join(name for name in names[:_SHOWN] if name) + (", ..." if len(names) > _SHOWN else "")
        modules = f"{len(names)} {kind} ({shown})" if len(names) > 1 else f"{shown} ({kind})" if shown else kind
        texts.append(f"{function} in {modules}")
    return ", ".join(texts)
