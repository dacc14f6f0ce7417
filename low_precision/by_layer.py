"""Which modules of a model are rounded, and which of them have rules of their own: by patterns of their names.

A pattern (fnmatch) means the modules whose full name it matches, and all that is in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from low_precision.errors import SettingError, nearest, shown, wrong_type
from low_precision.formats import FLOAT32
from low_precision.rounding import AnyRounding, Rounding
from low_precision.rules import ADDED_SITES, EVERY, Line, Rule, Spec, covers, rule_at
from low_precision.torch_private import parameters_of

Sites = Mapping[str, Spec | None]  # what somebody may write for the rules of some modules, by site
ByLayer = Mapping[str, Sites | None]  # and for those of all patterns
_ALONE = Rule(FLOAT32, Rounding.NEAREST)
_SHOWN = 20  # names of modules in an error


def patterns_of(layers: Iterable[str] | None) -> list[str] | None:
    """The patterns of `layers`; TypeError for what is neither a text nor several."""
    if layers is None:
        return None
    patterns = [layers] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise wrong_type("layers", pattern, "name patterns")
    return patterns


def lines_of(layers: ByLayer, rounding: AnyRounding | str = Rounding.NEAREST) -> tuple[Line, ...]:
    """The lines of {pattern: None, or rules by site}, in this order. None leaves the modules alone.

    A site's rule may be None too: not rounded there. rounding: where a rule names none. SettingError for a site or a
    rule that is not known, TypeError for another type; both name the pattern.
    """
    lines: list[Line] = []
    for pattern, sites in layers.items():
        if not isinstance(pattern, str):
            raise wrong_type("layers", pattern, "name patterns")
        if sites is None:
            lines.append(Line(pattern, EVERY, _ALONE))
            continue
        if not isinstance(sites, Mapping):
            raise wrong_type(f"layers: {shown(pattern)}", sites, "None, or a dict of rules by site")
        for site, spec in sites.items():
            if spec is None and site in ADDED_SITES:
                allowed = "a rule, or None for all sites of the pattern together"
                raise SettingError(f"layers: {shown(pattern)}/{site}", "None", allowed)
            try:
                lines.append(Line(pattern, site, _ALONE if spec is None else rule_at(site, spec, rounding)))
            except SettingError as error:
                name = f"layers: {shown(pattern)}/{shown(site)}: {error.setting}"
                raise SettingError(name, error.value, error.allowed, error.nearest, error.note) from None
            except TypeError as error:
                raise TypeError(f"layers: {shown(pattern)}/{shown(site)}: {error}") from None
    return tuple(lines)


def select(model: nn.Module, patterns: list[str] | None) -> dict[str, nn.Module]:
    """The modules that are to be rounded, by name: those that match, and all that is in them; None: every module."""
    modules = dict(model.named_modules())
    if patterns is None:
        return modules
    chosen: set[int] = set()
    matching: set[str] = set()  # names that a pattern covers: a module's container comes before it
    for name, module in model.named_modules(remove_duplicate=False):  # a shared module has several names
        inside = name.rpartition(".")[0] in matching and name != ""
        if inside or any(fnmatchcase(name, pattern) for pattern in patterns):
            matching.add(name)
            chosen.add(id(module))
    return {name: module for name, module in modules.items() if id(module) in chosen}


def check_patterns(model: nn.Module, patterns: list[str] | None) -> None:
    """SettingError for a pattern of `layers` that matches no module, or none with a parameter in it."""
    modules = model.named_modules(remove_duplicate=False)
    names = [name for name, module in modules if next(module.parameters(), None) is not None]
    for pattern in patterns or ():
        if not any(covers(pattern, name) for name in names):
            allowed = f"a pattern that matches one of: {', '.join(filter(None, names))}"
            raise SettingError("layers", repr(pattern), allowed, nearest(pattern, filter(None, names)))


def check_lines(model: nn.Module, lines: Iterable[Line], patterns: list[str] | None, setting: str = "layers") -> None:
    """SettingError for a line whose pattern matches no module, or none of those that `patterns` select.

    setting: what the user wrote the lines into.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    selected = set(map(id, select(model, patterns).values()))
    chosen = [name for name, module in model.named_modules(remove_duplicate=False) if id(module) in selected]
    for line in lines:
        value = shown(line.left_side) if setting == "site" else repr(line.pattern)
        if not any(line.reaches([name]) for name in names):
            raise SettingError(setting, value, f"a pattern that matches one of: {_listed(names)}", _near(line, names))
        if not any(line.reaches([name]) for name in chosen):
            allowed = f"a pattern that matches one of the modules that layers select: {_listed(chosen)}"
            raise SettingError(setting, value, allowed)


def shared_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """As Scheme has them: of modules with several names, and of parameters in several modules, those of the modules.

    By each of the full names that the module or the parameter has.
    """
    names: dict[int, list[str]] = {}
    owners: dict[int, list[str]] = {}
    full_names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        for key, parameter in parameters_of(module).items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
                full_names.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    shared = {name: tuple(several) for several in names.values() if len(several) > 1 for name in several}
    for parameter_id, modules in owners.items():
        if len(several := tuple(dict.fromkeys(modules))) > 1:
            shared |= dict.fromkeys(full_names[parameter_id], several)
    return shared


def _near(line: Line, names: list[str]) -> str | None:
    """The known name that is most like the pattern, or like what stands in it before a star."""
    pattern, known = line.pattern or "", list(filter(None, names))
    return nearest(pattern, known) or nearest(pattern.partition("*")[0].rstrip("."), known)


def _listed(names: Iterable[str]) -> str:
    several = [name for name in names if name]
    more = f", ... ({len(several)} modules)" if len(several) > _SHOWN else ""
    return ", ".join(several[:_SHOWN]) + more
