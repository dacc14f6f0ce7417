"""Sites, where a training step rounds, and rules, how one is rounded: FORMAT[:ROUNDING]. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from low_precision.errors import SettingError, nearest, shown
from low_precision.formats import FLOAT32, AnyFormat, BlockFormat, Format, format_named
from low_precision.rounding import AnyRounding, FewBits, Overflow, Rounding, rounding_named

# The sites, in the order in which one training step passes them. A new one is a name here and the code that rounds it.
ALL_SITES = ("weights", "inputs", "activations", "errors", "gradients", "momentum")  # what "all" means
ADDED_SITES = ("accumulator", "compensation")  # these exist only when they are asked for, in float32 too
SITES = ALL_SITES + ADDED_SITES
AROUND_LAYERS = ("inputs", "activations", "errors")  # the sites at layers; the others are at parameters


@dataclass(frozen=True)
class Rule:
    """How one site is rounded. rule_of(str(rule)) == rule, but for float32, whose rounding is none and goes untold."""

    format: AnyFormat
    rounding: AnyRounding

    def __str__(self) -> str:
        return self.format.name if self.format == FLOAT32 else f"{self.format.name}:{self.rounding}"


Spec = Rule | AnyFormat | str  # what a user may write for a rule


def rule_of(spec: Spec, rounding: AnyRounding | str = Rounding.NEAREST) -> Rule:
    """The rule that `spec` says: a rule, a format, or a text "FORMAT[:ROUNDING]"; `rounding` where it names none.

    SettingError (a ValueError) for an unknown name, TypeError for another type.
    """
    if isinstance(spec, Rule):
        return spec
    if isinstance(spec, Format | BlockFormat):
        return Rule(spec, _rounding(rounding))
    if not isinstance(spec, str):
        raise TypeError(f"given {spec!r}, allowed: FORMAT[:ROUNDING], a Format or a Rule")
    name, colon, rounding_name = spec.partition(":")
    return Rule(format_named(name), rounding_named(rounding_name) if colon else _rounding(rounding))


def site_rule(text: str, rounding: AnyRounding | str = Rounding.NEAREST) -> tuple[str, Rule]:
    """The site and the rule of a text "SITE=FORMAT[:ROUNDING]"; `rounding` where it names none. SettingError."""
    site, equals, spec = text.partition("=")
    if site not in SITES or not equals:
        raise SettingError(
            "site", shown(text), "SITE=FORMAT[:ROUNDING]", None if site in SITES else nearest(site, SITES)
        )
    return site, rule_of(spec, rounding)


def is_there(site: str, rule: Rule) -> bool:
    """Whether a rule does anything at its site: float32 rounds nothing, but an accumulator in float32 exists."""
    return rule.format != FLOAT32 or site in ADDED_SITES


def check_rules(rules: dict[str, Rule], overflow: Overflow) -> None:
    """SettingError for rules that do not go together, or not with this overflow."""
    for site in rules:
        if site not in SITES:
            raise SettingError("site", shown(site), ", ".join(SITES), nearest(site, SITES))
    if "compensation" in rules and ("weights" not in rules or "accumulator" in rules):
        raise SettingError("site", "compensation", "one beside rounded weights, without an accumulator")
    for site, rule in rules.items():
        if overflow is Overflow.INFINITY and not rule.format.has_infinity:
            raise SettingError("overflow", "infinity", f"saturate ({site}: {rule.format} has no infinity)")


def _rounding(rounding: AnyRounding | str) -> AnyRounding:
    return rounding if isinstance(rounding, Rounding | FewBits) else rounding_named(rounding)
