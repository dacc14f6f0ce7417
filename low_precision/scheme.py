"""How a model is rounded: a rule for each site, and what rounds one named tensor at one of them."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace

from torch import Tensor

from low_precision.clock import Clock
from low_precision.delayed import is_delayed
from low_precision.formats import FLOAT32, BlockFormat
from low_precision.noise import Key
from low_precision.recipe import Recipe
from low_precision.rounding import AnyRounding, Overflow, Rounding, is_random, overflow_named, rounding_named
from low_precision.rules import (
    OPERANDS,
    PRODUCTS,
    Line,
    Rule,
    check_rules,
    check_together,
    effective,
    is_there,
    overridden,
)
from low_precision.tensor import quantize
from low_precision.transforms import Transform, transforms_of


@dataclass(frozen=True)
class Scheme:
    """How a training run rounds: a rule for each site that is rounded, and what all sites share.

    Where there are lines, some modules have rules of their own: `of` and `of_parameter` give the scheme of one.
    """

    rules: dict[str, Rule]  # by the names of SITES; a site that is not there stays in float32
    seed: int | None = 0  # of the stochastic rounding's noise; None: another one for each model of this process
    overflow: Overflow = Overflow.SATURATE
    backend: str = "auto"
    rounding: AnyRounding = Rounding.NEAREST  # of the sites that quantize_optimizer adds, where they name none
    lines: tuple[Line, ...] = ()  # over the rules, in this order, each in the modules that it is for
    transforms: dict[str, Transform] = field(default_factory=dict)  # of both operands of a product, by its name
    weights_only: bool = False  # operands are rounded of products with a weight alone, as recipes have it
    recipe: Recipe | None = None  # from which quantize_optimizer takes what it is not given
    smallest_state: int = 0  # of fewer numbers, what the optimizer keeps of a parameter stays in float32
    # Of modules with several names, all of them, by the first one; of parameters that several modules share, the names
    # of these modules, by the parameter's. Lines are for a module or a parameter where they are for one of its names.
    shared_names: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)
    _is_part: bool = field(default=False, compare=False, repr=False)  # made by `of`: its rules were looked at before
    _of: dict[tuple[str, ...], Scheme] = field(default_factory=dict, init=False, compare=False, repr=False)
    _alone: dict[tuple[str, ...], bool] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        rounding_named(self.rounding)
        if not self._is_part:
            check_rules(self.rules, overflow_named(self.overflow), self.lines)
            transforms_of(self.transforms)

    def of(self, module: str) -> Scheme:
        """The scheme whose `rules` are those of the module of that full name; this one where there are no lines."""
        return self._with_lines(self.shared_names.get(module, (module,))) if self.lines else self

    def of_parameter(self, name: str) -> Scheme:
        """The same for a parameter, by its full name: that of the module that it is in.

        SettingError for rules that do not go together there.
        """
        if not self.lines:
            return self
        owners = self.owners_of(name)
        scheme = self._with_lines(owners)
        check_together(scheme.rules, owners[0])
        return scheme

    def owners_of(self, parameter: str) -> tuple[str, ...]:
        """The full names of the modules that a parameter is in, by its full name."""
        return self.shared_names.get(parameter, (parameter.rpartition(".")[0],))

    def leaves_alone(self, module: str) -> bool:
        """Whether lines leave the module as if it had not been chosen at all."""
        names = self.shared_names.get(module, (module,))
        if names not in self._alone:  # asked for each module in each forward pass
            lines = [line for line in self.lines if line.reaches(names)]
            decisive = [line for line in lines if line.leaves_alone or is_there(line.site, line.rule)]
            self._alone[names] = bool(decisive) and decisive[-1].leaves_alone
        return self._alone[names]

    def _with_lines(self, names: tuple[str, ...]) -> Scheme:
        """The scheme of what has these names, made once for each."""
        if names not in self._of:
            lines = [(line.site, line.rule) for line in self.lines if line.reaches(names)]
            rules = effective(overridden(self.rules, lines)) if lines else self.rules
            transforms = self.transforms if self._multiplies(rules) and not self.leaves_alone(names[0]) else {}
            self._of[names] = replace(
                self, rules=rules, lines=(), transforms=transforms, shared_names={}, _is_part=True
            )
        return self._of[names]

    def _multiplies(self, rules: dict[str, Rule]) -> bool:
        """Whether a module of these rules has transforms: not one whose operands lines leave as they are stored."""
        all_rules = [*self.rules.items(), *((line.site, line.rule) for line in self.lines)]
        operands = {*OPERANDS, PRODUCTS}
        wanted = any(site in operands and is_there(site, rule) for site, rule in all_rules)
        return not wanted or any(site in operands and is_there(site, rule) for site, rule in rules.items())

    def quantizer(self, site: str, tensor: str, clock: Clock, rule: Rule | None = None) -> Quantizer | None:
        """What rounds that tensor at that site, or None where it stays in float32. rule: the site's unless given."""
        rule = rule or self.rules.get(site)
        if rule is None or rule.format == FLOAT32:
            return None
        return Quantizer(rule, (site, tensor), clock, self.overflow, self.backend)


class Quantizer:
    """Rounds one named tensor at one site; its random bits depend on (seed, site, tensor, step, call) alone."""

    def __init__(self, rule: Rule, names: tuple[str, str], clock: Clock, overflow: Overflow, backend: str) -> None:
        """names: of the site and the tensor."""
        self.rule, self.names, self.clock, self.overflow, self.backend = rule, names, clock, overflow, backend
        self.is_delayed = is_delayed(rule.format)
        self.scale_name = " ".join(names)  # of a delayed scale, among the model's
        self._notes = True  # whether that learns of what is rounded, and a watcher hears of it
        self.site = names[0]  # as a watcher shows it
        clock.delayed.is_used = clock.delayed.is_used or self.is_delayed
        self._key: tuple[int, Key] | None = None  # made when it is needed: a loaded state may bring another seed

    @property
    def key(self) -> Key:
        """From which the noise of each rounding follows."""
        if self._key is None or self._key[0] != self.clock.seed:
            self._key = self.clock.seed, Key.of(self.clock.seed, *self.names)
        return self._key[1]

    def with_format(self, format: BlockFormat) -> Quantizer:
        """The same for numbers that share scales in another way: the same noise."""
        other = copy(self)
        other.rule = replace(self.rule, format=format)
        return other

    def noting(self, notes: bool) -> Quantizer:
        """The same, of which a delayed scale learns and a watcher hears, or not, as in evaluation."""
        if notes == self._notes or not (self.is_delayed or self.clock.watcher):
            return self
        other = copy(self)
        other._notes = notes
        return other

    def for_state(self, name: str) -> Quantizer:
        """The same for one of several states that an optimizer keeps of a parameter: each has its delayed scale."""
        other = copy(self)
        other.site = f"{self.names[0]}.{name}"
        other.scale_name = f"{other.site} {self.names[1]}"
        return other

    def scale(self, x: Tensor) -> Tensor | None:
        """The delayed scale by which x is rounded now, float32 (), which learns of x; None where its scale is none."""
        return self.clock.delayed.read(self.scale_name, self.rule.format, x, self._notes) if self.is_delayed else None

    def __call__(
        self,
        x: Tensor,
        call: int = 0,
        step: int | None = None,
        dim: int | None = None,
        out: Tensor | None = None,
        first_row: int = 0,
        backward_pass: int = 0,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Round `x`, into `out` where that is given; see tensor.quantize.

        call: tells apart several roundings between two optimizer steps. step: the clock's unless given. dim: along
        which blocks run; unless given, a parameter's second dimension, its inputs, or its only one. first_row: see Key.
        backward_pass: how many passes went back through the same rounding before this one. scale: of a delayed one, by
        which x was rounded before; nothing learns of x then.
        """
        key = None
        if is_random(self.rule.rounding):
            key = self.key.fold(self.clock.step if step is None else step).fold(call)
            key = key.fold(backward_pass) if backward_pass else key
            key = replace(key, first_row=first_row) if first_row else key
        dim = min(1, x.ndim - 1) if dim is None else dim
        scale = self.scale(x) if scale is None else scale
        watcher, before = self.clock.watcher, None
        if watcher is not None and watcher.is_on and self._notes:
            before = watcher.before(self, x, out is not None, step, call, backward_pass)
        rounded = quantize(
            x,
            self.rule.format,
            self.rule.rounding,
            key,
            dim=dim,
            overflow=self.overflow,
            backend=self.backend,
            out=out,
            scale=scale,
        )
        if watcher is not None and before is not None:
            watcher.rounded(self, before, rounded, dim, scale)
        return rounded

    def beyond(self, x: Tensor) -> Tensor:
        """bool (): whether `x` holds a value that the format does not reach, or a NaN."""
        format = self.rule.format
        if isinstance(format, BlockFormat):  # a scale reaches everything finite
            return ~x.isfinite().all()
        return ~((x <= format.largest) & (x >= format.lowest)).all()
