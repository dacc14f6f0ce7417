"""What an optimizer remembers of each parameter, its momentum or moments, rounded after every step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from low_precision.clock import Clock
from low_precision.errors import SettingError, nearest
from low_precision.rules import COUNTS, Rule, covers, momentum_rule, overridden, state_of
from low_precision.scheme import Quantizer, Scheme

_SHOWN = 4  # names in a warning


class SavedRules:
    """By which rules a state was rounded that is loaded; it is taken as it is where they are those of today."""

    def __init__(self, rules: Mapping[str, str] | None, smallest: int = 0) -> None:
        """rules: as texts, by site or PATTERN/SITE; None: nothing was rounded. smallest: Scheme.smallest_state."""
        self._rules, self._smallest = rules, smallest

    def of_parameter(self, name: str, scheme: Scheme) -> dict[str, str]:
        """The rules, as texts, of the parameter of that name."""
        if self._rules is None:
            return {}
        rules = {site: rule for site, rule in self._rules.items() if "/" not in site}
        owners = scheme.owners_of(name)
        lines = [(*left.rpartition("/")[::2], rule) for left, rule in self._rules.items() if "/" in left]
        here = [(site, rule) for pattern, site, rule in lines if any(covers(pattern, owner) for owner in owners)]
        return overridden(rules, here)

    def have(self, rules: Mapping[str, str], state: str, rule: Rule, value: object) -> bool:
        """Whether that state of a parameter, whose saved rules these are, is rounded by that rule already."""
        if torch.is_tensor(value) and value.numel() < self._smallest:
            return False
        return rules.get(f"momentum.{state}", rules.get("momentum")) == str(rule)


class States:
    """Rounds the states of one optimizer.

    names: the parameters whose states are rounded, more of them perhaps later. scheme: with the rules.
    """

    def __init__(self, names: dict[Tensor, str], scheme: Scheme, clock: Clock) -> None:
        self._names, self._scheme, self._clock = names, scheme, clock
        self._quantizers: dict[tuple[str, str, Tensor], Quantizer | None] = {}
        self._small: dict[str, None] = {}  # the parameters with states that are too small to be rounded, in order
        self._said: set[str] = set()  # names of states that cannot be rounded

    def _quantizer(self, state: str, p: Tensor, rule: Rule) -> Quantizer | None:
        """What rounds that state of a parameter; None where it stays as it is."""
        key = state, str(rule), p
        if key not in self._quantizers:
            scheme = self._scheme.of_parameter(self._names[p])
            made = scheme.quantizer("momentum", self._names[p], self._clock, rule)
            self._quantizers[key] = made and made.for_state(state)
        return self._quantizers[key]

    @torch.no_grad()
    def round(self, optimizer: torch.optim.Optimizer, saved: SavedRules | None = None) -> None:
        """Rounds all that is no count. saved: of a state that was loaded just now."""
        for p, state in optimizer.state.items():
            if p not in self._names:
                continue
            rules = self._scheme.of_parameter(self._names[p]).rules
            saved_rules = saved.of_parameter(self._names[p], self._scheme) if saved else {}
            for call, (name, value) in enumerate(state.items()):
                rule = momentum_rule(rules, name)
                quantizer = self._quantizer(name, p, rule) if rule and name not in COUNTS else None
                if quantizer is None or rule is None or (saved and saved.have(saved_rules, name, rule, value)):
                    continue
                if not torch.is_tensor(value):
                    self._say(optimizer, name, value)
                elif value.is_floating_point():
                    if value.numel() < self._scheme.smallest_state:
                        self._small[self._names[p]] = None
                    else:
                        quantizer(value, call, out=value)

    def check(self, optimizer: torch.optim.Optimizer, moved: Iterable[Tensor], wants_any: bool) -> None:
        """SettingError for a rule of a state that the optimizer does not have, once its first step has made them.

        moved: the parameters of that step. wants_any: whether it is worth a warning that it keeps no state. Another one
        names the parameters whose states are too small to be rounded.
        """
        moving = [p for p in moved if p in self._names]
        if not moving:
            return
        schemes = [self._scheme, *(self._scheme.of_parameter(self._names[p]) for p in moving)]
        wanted = {state for scheme in schemes for site in scheme.rules if (state := state_of(site)) is not None}
        states = {name for p in moving for name in optimizer.state.get(p, {})} - set(COUNTS)
        if wants_any and not states:
            text = f"momentum: {type(optimizer).__name__} as it is set keeps no state, so nothing is rounded there"
            warnings.warn(text, stacklevel=2)
        for name in sorted(wanted - states):
            kind = type(optimizer).__name__
            known = ", ".join(f"momentum.{state}" for state in sorted(states))
            allowed = known or f"none, as {kind} keeps no state"
            near = nearest(name, states)
            raise SettingError("site", f"momentum.{name}", allowed, near and f"momentum.{near}")
        if self._small:
            names = list(self._small)
            text = f"momentum: states of fewer than {self._scheme.smallest_state} numbers stay in float32, those of "
            text += ", ".join(names[:_SHOWN])
            warnings.warn(text + f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN), stacklevel=2)

    def _say(self, optimizer: torch.optim.Optimizer, name: str, value: object) -> None:
        """A warning, once, of tensors that are kept in a list or the like."""
        kept: Any = value.values() if isinstance(value, dict) else value
        if name in self._said or not isinstance(kept, list | tuple | type({}.values())):
            return
        if any(torch.is_tensor(item) for item in kept):
            self._said.add(name)
            text = f"momentum: {type(optimizer).__name__} keeps {name!r} as a {type(value).__name__}: not rounded"
            warnings.warn(text, stacklevel=2)
