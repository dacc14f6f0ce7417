"""Sites, where a training step rounds; rules, how one is rounded: FORMAT[:ROUNDING]; and lines, which give some modules
of a model a rule of their own: PATTERN/SITE=FORMAT[:ROUNDING]. No torch here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from low_precision.errors import SettingError, nearest, shown, wrong_type
from low_precision.formats import FLOAT32, AnyFormat, BlockFormat, Format, format_named
from low_precision.rounding import AnyRounding, FewBits, Overflow, Rounding, rounding_named
from low_precision.tables import FILE, Table

# The sites, in the order in which one training step passes them. A new one is a name here and the code that rounds it.
ALL_SITES = ("weights", "inputs", "activations", "errors", "gradients", "momentum")  # what "all" means
ADDED_SITES = ("accumulator", "compensation")  # these exist only when they are asked for, in float32 too
# What a product reads, PRODUCT.OPERAND: a layer y = x W^T has three products with two operands each (products.py).
OPERANDS = ("forward.inputs", "forward.weights", "dgrad.errors", "dgrad.weights", "wgrad.errors", "wgrad.inputs")
PRODUCTS = "products"  # stands for all of them
# In place of a rule, an operand may name the one of another product that is made from the same tensor.
NAMING = {
    "dgrad.weights": "forward.weights",
    "wgrad.inputs": "forward.inputs",
    "dgrad.errors": "wgrad.errors",
    "wgrad.errors": "dgrad.errors",
}
_NAMING_TEXT = ", ".join(f"{site} may name {operand}" for site, operand in NAMING.items())
EVERY = "*"  # in a line: stands for every site that has a rule so far
ELEMENTWISE = "elementwise"  # the results of functions without products; only when it is asked for
SITES = (*ALL_SITES, *ADDED_SITES, ELEMENTWISE)  # the stored ones
_NAMES = (*SITES, *OPERANDS, PRODUCTS)
_PRODUCT_NAMES = tuple(dict.fromkeys(site.partition(".")[0] for site in OPERANDS))
AROUND_LAYERS = ("inputs", "activations", "errors")  # the sites at layers; the others are at parameters
FLOWING = (*AROUND_LAYERS, ELEMENTWISE, *OPERANDS)  # the sites of what flows through a model

# momentum.NAME is a site too: one state of the optimizer, by torch's name for it. It goes before momentum.
_STATE = "momentum."
COUNTS = ("step", "mu_product", "mu", "eta")  # of an optimizer's states, what says how far it is: no moment to round
STATES = (  # those of torch's optimizers; others may have others
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "prev", "step_size", "ax", "row_var", "col_var", "variance"),
)
SITE_NAMES = ", ".join(
    (
        *ALL_SITES,
        "momentum.NAME (one state of the optimizer, as exp_avg_sq)",
        *ADDED_SITES,
        ELEMENTWISE,
        *OPERANDS,
        PRODUCTS,
    )
)
LINE_FORM = "[PATTERN/]SITE=FORMAT[:ROUNDING]"
_AnyRule = TypeVar("_AnyRule")  # a Rule, or its text


@dataclass(frozen=True)
class Rule:
    """How one site is rounded. rule_of(str(rule)) == rule, but for float32, whose rounding is none and goes untold, and
    for formats that are not in the table, whose names nobody can look up. Of a Reference, rule_at.
    """

    format: AnyFormat
    rounding: AnyRounding

    def __post_init__(self) -> None:
        """TypeError for texts and other types: `rule_of` makes a rule of them."""
        if not isinstance(self.format, Format | Table | BlockFormat):
            raise wrong_type("rule: format", self.format, "a Format, a Table, a BlockFormat; rule_of takes texts")
        if not isinstance(self.rounding, Rounding | FewBits):
            raise wrong_type("rule: rounding", self.rounding, "a Rounding, FewBits; rule_of takes texts")

    def __str__(self) -> str:
        return self.format.name if self.format == FLOAT32 else f"{self.format.name}:{self.rounding}"


@dataclass(frozen=True)
class Reference(Rule):
    """In place of an operand's rule, the very numbers that another operand was read as: "forward.weights".

    format and rounding: how those numbers are rounded again, "forward.weights>FORMAT[:ROUNDING]"; float32: not at all.
    operand: the one of NAMING that is named.
    """

    operand: str

    @classmethod
    def to(cls, operand: str, rule: Rule | None = None) -> Reference:
        """The reference to that operand, whose numbers `rule` rounds again."""
        if rule is None or rule.format == FLOAT32:
            return cls(FLOAT32, Rounding.NEAREST, operand)
        return cls(rule.format, rule.rounding, operand)

    def __str__(self) -> str:
        return self.operand if self.format == FLOAT32 else f"{self.operand}>{super().__str__()}"


Spec = Rule | AnyFormat | str  # what a user may write for a rule


def rule_of(spec: Spec, rounding: AnyRounding | str = Rounding.NEAREST) -> Rule:
    """The rule that `spec` says: a rule, a format, or a text "FORMAT[:ROUNDING]"; `rounding` where it names none.

    SettingError (a ValueError) for an unknown name, TypeError for another type.
    """
    if isinstance(spec, Reference):
        raise SettingError("rule", str(spec), "FORMAT[:ROUNDING]: operands of products alone name one another")
    if isinstance(spec, Rule):
        return spec
    if isinstance(spec, Format | Table | BlockFormat):
        return Rule(spec, rounding_named(rounding))
    if not isinstance(spec, str):
        raise wrong_type(None, spec, "FORMAT[:ROUNDING], a Format or a Rule")
    prefix = FILE if spec.startswith(FILE) else ""  # whose colon is one of the format's name
    name, colon, rounding_name = spec.removeprefix(prefix).partition(":")
    return Rule(format_named(prefix + name), rounding_named(rounding_name if colon else rounding))


def rule_at(site: str, spec: Spec, rounding: AnyRounding | str = Rounding.NEAREST) -> Rule:
    """`rule_of`, and at an operand a text "OPERAND[>FORMAT[:ROUNDING]]", which names another one (NAMING).

    SettingError for an operand that this site may not name.
    """
    if isinstance(spec, str):
        operand, again, text = spec.partition(">")
        if not (again or operand.partition(".")[0] in _PRODUCT_NAMES):
            return rule_of(spec, rounding)
        if operand != NAMING.get(site):
            raise _wrong_reference(site, spec)
        return Reference.to(operand, rule_of(text, rounding) if again else None)
    if isinstance(spec, Reference):
        check_reference(site, spec)
        return spec
    return rule_of(spec, rounding)


def check_reference(site: str, rule: Rule) -> None:
    """SettingError for a rule that names an operand which this site may not name."""
    if isinstance(rule, Reference) and rule.operand != NAMING.get(site):
        raise _wrong_reference(site, str(rule))


def _wrong_reference(site: str, text: str) -> SettingError:
    if site in NAMING:
        allowed = f"{NAMING[site]}, {NAMING[site]}>FORMAT[:ROUNDING], or a rule of its own"
        return SettingError("site", shown(f"{site}={text}"), allowed, nearest(text.partition(">")[0], [NAMING[site]]))
    return SettingError("site", shown(f"{site}={text}"), f"FORMAT[:ROUNDING]; of operands, {_NAMING_TEXT}")


def site_rule(text: str, rounding: AnyRounding | str = Rounding.NEAREST) -> tuple[str, Rule]:
    """The site and the rule of a text "SITE=FORMAT[:ROUNDING]"; `rounding` where it names none. SettingError."""
    if not isinstance(text, str):
        raise wrong_type("site", text, "SITE=FORMAT[:ROUNDING]")
    site, equals, spec = text.partition("=")
    if not is_site(site):
        raise _unknown_site(site, text, "SITE=FORMAT[:ROUNDING], SITE one of ")
    if not equals:
        raise SettingError("site", shown(text), "SITE=FORMAT[:ROUNDING]")
    return site, rule_at(site, spec, rounding)


@dataclass(frozen=True)
class Line:
    """A rule for one site in some of a model's modules: those whose full name `pattern` matches (fnmatch), and all that
    is in them.

    pattern: None for the whole model. site: one of the names of sites, "products", or "*": every site that has a rule
    there so far. rule: float32 leaves the site as it is; at the site "*" it leaves those modules alone, and takes
    accumulator and compensation away too.
    """

    pattern: str | None
    site: str
    rule: Rule

    def __post_init__(self) -> None:
        """SettingError for what is no site, TypeError for another type."""
        if self.pattern is not None and not isinstance(self.pattern, str):
            raise wrong_type("layers", self.pattern, "name patterns")
        if self.site != EVERY and not is_site(self.site):
            raise _unknown_site(self.site, self.site, f"{EVERY}, ")
        if not isinstance(self.rule, Rule):
            raise wrong_type(self.site, self.rule, "a Rule; rule_of makes one of FORMAT[:ROUNDING]")
        check_reference(self.site, self.rule)

    def __str__(self) -> str:
        return f"{self.left_side}={self.rule}"

    @property
    def left_side(self) -> str:
        """What stands before the equals sign: [PATTERN/]SITE."""
        return self.site if self.pattern is None else f"{self.pattern}/{self.site}"

    def reaches(self, names: Iterable[str]) -> bool:
        """Whether it is for a module that has these full names."""
        return self.pattern is None or any(covers(self.pattern, name) for name in names)

    @property
    def leaves_alone(self) -> bool:
        """Whether nothing is rounded any more in the modules that it is for."""
        return self.site == EVERY and self.rule.format == FLOAT32


def site_line(text: str, rounding: AnyRounding | str = Rounding.NEAREST) -> Line:
    """The line of a text "[PATTERN/]SITE=FORMAT[:ROUNDING]"; `rounding` where it names none. SettingError.

    It is cut at the first equals sign, and PATTERN ends at the last slash before it.
    """
    if not isinstance(text, str):
        raise wrong_type("site", text, LINE_FORM)
    left, equals, spec = text.partition("=")
    pattern, slash, site = left.rpartition("/")
    if not slash and site != EVERY:
        return Line(None, *site_rule(text, rounding))
    if not equals or (slash and not pattern):
        raise SettingError("site", shown(text), LINE_FORM)
    if site != EVERY and not is_site(site):
        raise _unknown_site(site, text, f"{LINE_FORM}, SITE {EVERY} or one of ")
    return Line(pattern if slash else None, site, rule_at(site, spec, rounding))


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern (fnmatch) matches the full name of a module, or that of a module in which it lies."""
    while not fnmatch.fnmatchcase(name, pattern):
        if not name:
            return False
        name = name.rpartition(".")[0]  # at last the empty name, the whole model's
    return True


def is_site(name: object) -> bool:
    """Whether it names a site: one of SITES, or momentum.NAME, NAME an identifier and no count."""
    if not isinstance(name, str):
        return False
    state = state_of(name)
    return name in _NAMES if state is None else state.isidentifier() and state not in COUNTS


def state_of(site: str) -> str | None:
    """The NAME of a site momentum.NAME, None of another one."""
    return site.removeprefix(_STATE) if site.startswith(_STATE) else None


def check_site(name: object) -> None:
    """SettingError, with the nearest known word, for a name of no site."""
    if not is_site(name):
        raise _unknown_site(name, name)


def _unknown_site(name: object, text: object, form: str = "") -> SettingError:
    """text: what was written, in which `name` should be a site."""
    word = shown(name)
    base, _, state = word.partition(".")
    if base == "momentum" and state in COUNTS:
        note = f"; {state} is a count of the optimizer, and stays as it is"
        return SettingError("site", shown(text), form + SITE_NAMES, note=note)
    if word in STATES:
        near: str | None = _STATE + word
    elif state.isidentifier() and nearest(base, SITES) == "momentum":
        near = _STATE + state
    else:
        near = nearest(word, (*_NAMES, *(_STATE + known for known in STATES)))
    return SettingError("site", shown(text), form + SITE_NAMES, near)


def in_order(sites: Iterable[str]) -> list[str]:
    """Sites in the order of a training step, those of single states by name after momentum, operands last."""
    return sorted(sites, key=lambda site: (_NAMES.index("momentum" if state_of(site) else site), site))


def overridden(rules: Mapping[str, _AnyRule], others: Iterable[tuple[str, _AnyRule]]) -> dict[str, _AnyRule]:
    """The rules by site, and over them others in their order, the later ones over the earlier ones.

    `products` stands for its six operands, `*` for every site that has a rule before it; in float32 it takes those of
    ADDED_SITES away, as they exist in float32 too.
    """
    by_site: dict[str, _AnyRule] = {}
    for site, rule in (*rules.items(), *others):
        if site == EVERY:
            without = ADDED_SITES if str(rule) == FLOAT32.name else ()
            by_site = {known: rule for known in by_site if known not in without}
        else:
            by_site |= dict.fromkeys(OPERANDS if site == PRODUCTS else [site], rule)
    return by_site


def effective(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules that make a difference, in order: not float32's, but for a state of a rounded momentum, which it keeps
    in float32; and not a state's that is momentum's own.
    """
    base = rules.get("momentum")
    base = base if base and is_there("momentum", base) else None

    def matters(site: str) -> bool:
        if state_of(site) is None:
            return is_there(site, rules[site])
        return rules[site] != base if base else rules[site].format != FLOAT32

    return {site: rules[site] for site in in_order(rules) if matters(site)}


def is_there(site: str, rule: Rule) -> bool:
    """Whether a rule does anything at its site: float32 rounds nothing, but an accumulator in float32 exists, a state
    of the optimizer may be what alone is not rounded, and what another operand was read as is no stored tensor.
    """
    return rule.format != FLOAT32 or isinstance(rule, Reference) or site in ADDED_SITES or state_of(site) is not None


def check_rules(rules: dict[str, Rule], overflow: Overflow, lines: Iterable[Line] = ()) -> None:
    """SettingError for rules that do not go together, or not with this overflow; TypeError for what is no Rule.

    lines: where there are any, each module has rules of its own: which go together is another question, for each.
    """
    lines = tuple(lines)
    for site, rule in rules.items():
        check_site(site)
        if not isinstance(rule, Rule):
            raise wrong_type(site, rule, "a Rule; rule_of makes one of FORMAT[:ROUNDING]")
        check_reference(site, rule)
    if not lines:
        check_together(rules)
    for site, rule in (*rules.items(), *((line.left_side, line.rule) for line in lines)):
        check_overflow(overflow, rule.format, site)


def check_overflow(overflow: Overflow, format: AnyFormat, site: str = "") -> None:
    """SettingError where values are to become an infinity that the format does not have. site: whose format it is."""
    if overflow is Overflow.INFINITY and not format.has_infinity:
        where = f"{site}: {format}" if site else format.name
        raise SettingError("overflow", "infinity", f"saturate, propagate ({where} has no infinity)")


def check_together(rules: Mapping[str, Rule], module: str | None = None) -> None:
    """SettingError for rules that do not go together. module: whose they are, for the error; None for all modules'."""
    note = "" if module is None else f" (in module {module or 'model'})"
    if "compensation" in rules and ("weights" not in rules or "accumulator" in rules):
        raise SettingError("site", "compensation", "one beside rounded weights, without an accumulator", note=note)
    circle = [site for site in ("dgrad.errors", "wgrad.errors") if isinstance(rules.get(site), Reference)]
    if len(circle) == 2:
        value = " and ".join(f"{site}={rules[site]}" for site in circle)
        raise SettingError("site", value, "one of the two: neither has numbers of its own", note=note)


def is_of_optimizer(site: str) -> bool:
    """Whether the optimizer's hooks round there, and not the model's."""
    return site in ("gradients", "momentum") or state_of(site) is not None


def momentum_rule(rules: Mapping[str, Rule], name: str) -> Rule | None:
    """The rule of one of an optimizer's states, by torch's name for it, e.g. exp_avg_sq: its own, or momentum's."""
    return rules.get(f"momentum.{name}", rules.get("momentum"))
