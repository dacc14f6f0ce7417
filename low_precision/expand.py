"""Range expansion: groups that are raised to a power before they are scaled, as COAT stores an optimizer's moments.

The moments of a group lie closer together than an 8-bit format reaches: its smallest values would stay unused. So a
group is raised to the power that spreads it over all of the format, and the root is taken when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_PARTS = 16  # the power is a whole number of sixteenths: COAT's expand_min
_LEAST = 1e-30  # added to the largest and the smallest magnitude
_FLOAT32 = torch.finfo(torch.float32)


def quantize_expand(
    rows: Tensor, largest: float, type_largest: float, to_elements: Callable[[Tensor], Tensor]
) -> Tensor:
    """The numbers of each group, rounded to elements on an expanded scale: (groups, size), a new tensor like `rows`.

    rows: float32 or float64, which is rounded to float32 first; what a shorter group is filled up with is 0.
    largest: the element's. type_largest: of the tensor's type, for which infinities count. to_elements: rounds numbers
    of this shape to elements, saturating. NaN does not count, and stays.

    Each line is one operation on float32 numbers, rounded to float32; powers and logarithms are computed in float64:

        a = max |z| + 1e-30;  b = min |z| + 1e-30, of what is not 0;  c = sqrt(a) * sqrt(b), three roundings
        k = floor(16 * (log2(largest**2 / 2) / log2(a / b))) / 16;  where a = b: k = 1
        s = (a / c)**k / largest
        q = ELEMENT(sign(z) * (|z| / c)**k / s), each operation rounded
        value = sign(q) * (|q| * s)**(1 / k) * c

    so k spreads a group by half of the element's range, squared. A quotient a / b beyond float32 counts as its largest
    number, and so does a power; s is a normal number at least. Source: COAT (Xi et al. 2024, arXiv:2410.19313),
    coat/optimizer/kernels/fp8_adamw_expand_cuda_kernel.cu at 80ec99f. There a zero may take the place of the smallest
    magnitude, depending on the thread that read it, and k is infinite where all magnitudes are equal: both are mended
    here.
    """
    most = min(type_largest, _FLOAT32.max)
    z = rows.float().nan_to_num(nan=math.nan, posinf=most, neginf=-most)
    magnitudes = z.abs()
    a = _float32(magnitudes.nan_to_num(nan=0.0).amax(1, keepdim=True).double() + _LEAST)
    smallest = torch.where(magnitudes > 0, magnitudes, _FLOAT32.max).amin(1, keepdim=True)  # no NaN is above 0
    b = torch.minimum(_float32(smallest.double() + _LEAST), a)  # a: of a group of zeros
    c = _float32(a.double().sqrt()) * _float32(b.double().sqrt())
    ratio = (a / b).clamp(max=_FLOAT32.max)
    reach = _float32(torch.full((), largest * largest / 2, dtype=torch.float64, device=z.device).log2())
    k = (reach / _float32(ratio.double().log2()) * _PARTS).floor() / _PARTS
    k = torch.where(ratio > 1, k, 1.0)
    s = (_power(a / c, k) / torch.full_like(a, largest)).clamp(min=_FLOAT32.tiny)
    q = to_elements(torch.copysign(_power(magnitudes / c, k), z) / s)
    values = _power(q.float().abs() * s, torch.ones_like(k) / k) * c
    return torch.copysign(values.clamp(max=_FLOAT32.max), q.float()).to(rows.dtype)


def _power(x: Tensor, exponent: Tensor) -> Tensor:
    return _float32(x.double().pow(exponent.double())).clamp(max=_FLOAT32.max)


def _float32(x: Tensor) -> Tensor:
    return x.float()
