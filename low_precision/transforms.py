"""Transforms of a product's operands, hadamardN[:fixed|:random][:bfloat16]: their names, and what they say. No torch.

Both operands of a product are multiplied by the same orthogonal matrix along the sum, before they are rounded: without
rounding the product stays what it was, and with it an outlier is spread over N numbers, which share its error. The
matrix is diag(s) H / sqrt(N), H Sylvester's Hadamard matrix and s signs: z_j = sum over i of x_i s_i H_ij / sqrt(N), in
blocks of N numbers from the start of the sum. hadamard.py computes it.

Source: Ashkboos et al. 2024, arXiv:2404.00456; the signs as in Tseng et al. 2025, arXiv:2502.20586, and in NVIDIA's
TransformerEngine, whose constant for N = 16 is SIGNS_OF_16.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from low_precision.errors import SettingError, nearest, shown, wrong_type

PRODUCT_NAMES = ("forward", "dgrad", "wgrad")
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
NONE = "none"
FORM = "[PRODUCT=]none or [PRODUCT=]hadamardN[:fixed|:random][:bfloat16]"
ALLOWED = f"{FORM}, PRODUCT one of {', '.join(PRODUCT_NAMES)}, N one of {', '.join(map(str, SIZES))}"
# The signs of TransformerEngine's random Hadamard transform, which are the same in all its layers and runs.
SIGNS_OF_16 = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


class Signs(Enum):
    """Which signs the numbers get before the Hadamard matrix."""

    NONE = ""
    FIXED = "fixed"  # one vector for all layers, products and steps: for N = 16 SIGNS_OF_16, for others from the seed
    RANDOM = "random"  # fresh for each product, layer, step, call and backward pass, the same for both operands


@dataclass(frozen=True)
class Transform:
    """What both operands of a product are multiplied by along its sum. transform_named(str(transform)) == transform.

    size: N, one of SIZES. bfloat16: whether the result is rounded to bfloat16, as in TransformerEngine, before a scale
    is looked for and the operand is rounded.
    """

    size: int
    signs: Signs = Signs.NONE
    bfloat16: bool = False

    def __post_init__(self) -> None:
        """SettingError for another size, TypeError for other types."""
        if isinstance(self.size, bool) or self.size not in SIZES:
            raise SettingError("transform", shown(f"hadamard{self.size}"), ALLOWED)
        if not isinstance(self.signs, Signs) or not isinstance(self.bfloat16, bool):
            raise wrong_type("transform", self.signs, "Signs; transform_named takes texts")

    def __str__(self) -> str:
        signs = f":{self.signs.value}" if self.signs.value else ""
        return f"hadamard{self.size}{signs}{':bfloat16' if self.bfloat16 else ''}"

    @property
    def draws(self) -> bool:
        """Whether the signs follow from the seed."""
        return self.signs is Signs.RANDOM or (self.signs is Signs.FIXED and self.size != len(SIGNS_OF_16))


def transform_named(text: str) -> Transform | None:
    """The transform of a text hadamardN[:fixed|:random][:bfloat16]; None for "none". SettingError for what is none."""
    if not isinstance(text, str):
        raise wrong_type("transform", text, FORM)
    if text == NONE:
        return None
    match = re.fullmatch(r"hadamard([0-9]{1,4})((?::[a-z0-9]+)*)", text)
    words = match[2].split(":")[1:] if match else []
    bfloat16 = words[-1:] == ["bfloat16"]
    signs = words[:-1] if bfloat16 else words
    if not match or int(match[1]) not in SIZES or signs not in ([], ["fixed"], ["random"]):
        known = [NONE, "bfloat16", *(f"hadamard{size}{signs}" for size in SIZES for signs in ("", ":fixed", ":random"))]
        raise SettingError("transform", shown(text), ALLOWED, nearest(text, known))
    return Transform(int(match[1]), Signs(*signs) if signs else Signs.NONE, bfloat16)


def product_transforms(text: str) -> dict[str, Transform | None]:
    """What a text "[PRODUCT=]TRANSFORM" says, by product: of all three where it names none. SettingError."""
    if not isinstance(text, str):
        raise wrong_type("transform", text, FORM)
    product, equals, name = text.rpartition("=")
    if equals and product not in PRODUCT_NAMES:
        raise SettingError("transform", shown(text), ALLOWED, nearest(product, PRODUCT_NAMES))
    try:
        transform = transform_named(name)
    except SettingError as error:
        raise SettingError("transform", shown(text), ALLOWED, error.nearest) from None
    return dict.fromkeys((product,) if equals else PRODUCT_NAMES, transform)


def texts_of(spec: str | Iterable[str]) -> tuple[str, ...]:
    """The texts "[PRODUCT=]TRANSFORM" of one or several, each of which may hold more, with commas between them."""
    texts = [spec] if isinstance(spec, str) or not isinstance(spec, Iterable) else list(spec)
    parts = ([part.strip() for part in text.split(",")] if isinstance(text, str) else [text] for text in texts)
    return tuple(part for several in parts for part in several)


Spec = str | Iterable[str] | Mapping[str, "str | Transform | None"]  # what a user may write for the transforms


def transforms_of(spec: Spec | None, base: Spec | None = None) -> dict[str, Transform]:
    """The transform of each product that has one, from texts "[PRODUCT=]TRANSFORM", the later ones over the earlier
    ones, or a dict {PRODUCT: TRANSFORM}; over `base`, one by one. SettingError for what is none, TypeError for another
    type.
    """
    by_product = _by_product(base) | _by_product(spec)
    in_order = ((product, by_product.get(product)) for product in PRODUCT_NAMES)
    return {product: transform for product, transform in in_order if transform is not None}


def _by_product(spec: Spec | None) -> dict[str, Transform | None]:
    by_product: dict[str, Transform | None] = {}
    if spec is None:
        return by_product
    if isinstance(spec, Mapping):
        for product, name in spec.items():
            if product not in PRODUCT_NAMES:
                raise SettingError("transform", shown(product), ALLOWED, nearest(str(product), PRODUCT_NAMES))
            if name is None or isinstance(name, Transform):
                by_product[product] = name
            elif isinstance(name, str):
                by_product |= product_transforms(f"{product}={name}")
            else:
                raise wrong_type(f"transform: {product}", name, FORM)
    else:
        for text in texts_of(spec):
            by_product |= product_transforms(text)
    return by_product
