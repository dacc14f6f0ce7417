"""What a recipe is: rules by site, and where they come from. No torch here. The recipes are in recipes.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from low_precision.errors import SettingError, nearest, shown, wrong_type
from low_precision.rules import ADDED_SITES, ALL_SITES, ELEMENTWISE, OPERANDS, PRODUCTS, is_of_optimizer, is_site

_WIDTH = 118  # of the text that people read
_NOTHING = "as it is stored"


@dataclass(frozen=True)
class Recipe:
    """A recipe: texts of rules by site, as `--site` takes them, and where they come from.

    operands: what products read; "products" for all six. transforms: of both operands of a product, by its name, as
    `--transform` takes them. sites: stored ones of the model. states: gradients, momentum, momentum.NAME.
    loss_scale: a number, or "dynamic". smallest_state: the optimizer's state of fewer numbers stays in float32.
    follows: the paper, or the code with its version, where the two differ. wider: which layers the source keeps wider,
    and wider_sites: that as `--site` takes it, with the names head and blocks. claim: what the source claims, and what
    would contradict it. differs: what the source does and this row does not. SettingError for a site that there is not;
    rules are read where the recipe is used.
    """

    name: str
    about: str
    source: str
    follows: str = "paper"
    operands: Mapping[str, str] = field(default_factory=dict)
    transforms: Mapping[str, str] = field(default_factory=dict)
    sites: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    loss_scale: float | str = 1.0
    smallest_state: int = 0
    wider: str = ""
    wider_sites: tuple[str, ...] = ()
    claim: str = ""
    differs: str = ""

    def __post_init__(self) -> None:
        if not is_recipe_name(self.name):
            raise SettingError("recipe: name", shown(self.name), "letters, digits and . _ -, a letter or digit first")
        stored = (*(site for site in ALL_SITES if not is_of_optimizer(site)), *ADDED_SITES, ELEMENTWISE)
        known = {"operands": (*OPERANDS, PRODUCTS), "sites": stored, "transforms": ("forward", "dgrad", "wgrad")}
        for name in ("operands", "transforms", "sites", "states"):
            texts = getattr(self, name)
            if not isinstance(texts, Mapping):
                raise wrong_type(f"recipe {shown(self.name)}: {name}", texts, "texts by site")
            for site in texts:
                allowed = known.get(name, ("gradients", "momentum", "momentum.NAME"))
                if not (site in allowed if name in known else is_site(site) and is_of_optimizer(site)):
                    setting = f"recipe {shown(self.name)}: {name}"
                    raise SettingError(setting, shown(site), ", ".join(allowed), nearest(site, allowed))

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def by_operand(self) -> dict[str, str]:
        """The rules of the operands that are rounded, each by its own name, in order."""
        every = dict.fromkeys(OPERANDS, self.operands[PRODUCTS]) if PRODUCTS in self.operands else {}
        rules = every | {site: text for site, text in self.operands.items() if site != PRODUCTS}
        return {site: rules[site] for site in OPERANDS if site in rules}

    @property
    def rules(self) -> dict[str, str]:
        """All rules by site."""
        return {**self.sites, **self.by_operand, **self.states}

    def __str__(self) -> str:
        """What `--list-recipes` prints of it, but for its flags."""
        return "\n".join([f"{self.name}: {self.about}", *self._lines()])

    def _lines(self) -> Iterator[str]:
        if self.operands or self.transforms:
            rules = self.by_operand
            texts = {site: rules.get(site, _NOTHING) for site in OPERANDS}
            width = max(map(len, texts.values()))
            for site, text in texts.items():
                after = self.transforms.get(site.partition(".")[0], "")
                yield f"  {site:<16} {text:<{width}} {f'after {after}' if after else ''}".rstrip()
        for site, text in {**self.sites, **self.states}.items():
            yield f"  {site:<16} {text}"
        if self.smallest_state:
            yield f"  smallest_state   {self.smallest_state}: of fewer numbers, the optimizer's state stays in float32"
        if self.loss_scale != 1.0:
            yield f"  loss_scale       {self.loss_scale}"
        wider = [f"--site '{text}'" for text in self.wider_sites]
        for what, text in (
            ("source", self.source),
            ("follows", self.follows),
            ("stays wider", "; ".join(filter(None, (self.wider, " ".join(wider))))),
            ("claim", self.claim),
            ("not here", self.differs),
        ):
            if text:
                yield from wrapped(f"{what}: {text}")


def is_recipe_name(name: object) -> bool:
    """Whether a recipe may have that name: it becomes a part of folders' names."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None


def wrapped(text: str) -> Iterator[str]:
    """A text in lines, the first one indented."""
    line = " "
    for word in text.split(" "):
        if len(line) + 1 + len(word) > _WIDTH:
            yield line
            line = "   "
        line += f" {word}"
    yield line
