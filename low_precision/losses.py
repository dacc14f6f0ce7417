"""What one rounding loses: counts and sums as tensors on the device, which add up; and what follows from them.

Nothing here waits for a device. All sums are of float64, in which counts below 2**53 are exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from low_precision import blocks
from low_precision.formats import AnyElement, AnyFormat, BlockFormat, Format
from low_precision.tensor import quantize

LOWEST_EXPONENT, HIGHEST_EXPONENT = -149, 127  # floor(log2|x|) of float32's numbers; what is beyond counts at the ends
_EXPONENTS = HIGHEST_EXPONENT - LOWEST_EXPONENT + 1
_SMALLEST = -126  # that of float32's smallest normal number
_CHUNK = 2**15  # numbers at a time: what a core's cache holds
# Of more than so many numbers, so many are looked at, in so many parts at even distances.
_WHOLE, _SAMPLE, _PARTS = 2**18, 2**16, 64
# Scales are rounded themselves, so the largest number of a group may come out this much beyond the element's largest.
_SLACK = 1 + 2.0**-20


class Loss(NamedTuple):
    """What one or more roundings lost; `plus` adds two. All tensors lie on one device.

    numbers: how many were looked at: of a tensor with more than 2**18, some 2**16 in even distances. amax and the
    scales are those of the whole tensor, but where it has infinities or NaN.
    sums: float64 (8,): how many became zero, lie in the subnormal range, saturated, are not finite; the sums of x**2,
    (q - x)**2, q - x and |x|. maxima: float64 (3,): of |x|, of the scales, of their negatives. exponents: int64 (277,):
    how many nonzero numbers have each floor(log2|x|), from -149 on.
    has_scale, has_elements: whether the scales, and what is counted of elements, are known.
    """

    numbers: int
    sums: Tensor
    maxima: Tensor
    exponents: Tensor
    has_scale: bool
    has_elements: bool

    def plus(self, other: Loss) -> Loss:
        return Loss(
            self.numbers + other.numbers,
            self.sums + other.sums.to(self.sums.device),
            torch.maximum(self.maxima, other.maxima.to(self.maxima.device)),
            self.exponents + other.exponents.to(self.exponents.device),
            self.has_scale and other.has_scale,
            self.has_elements and other.has_elements,
        )

    def on_cpu(self) -> Loss:
        """A copy that is on its way to the CPU: it may be read once the device is synchronized."""
        sums, maxima, exponents = (x.to("cpu", non_blocking=True) for x in (self.sums, self.maxima, self.exponents))
        return self._replace(sums=sums, maxima=maxima, exponents=exponents)

    def row(self) -> dict[str, Any]:
        """The numbers of a line of layers.jsonl; None for what is not known or not finite. Of a CPU's tensors."""
        flushed, subnormal, saturated, not_finite, squares, errors, error, magnitudes = self.sums.tolist()
        amax, scale_max, minus_scale_min = self.maxima.tolist()
        count = max(self.numbers, 1)
        row: dict[str, Any] = {
            "flushed": flushed / count,
            "subnormal": subnormal / count if self.has_elements else None,
            "saturated": saturated / count if self.has_elements else None,
            "not_finite": not_finite / count,
            "sqnr_db": _decibels(squares, errors),
            "bias": error / magnitudes if magnitudes and math.isfinite(magnitudes) else None,
            "amax": amax,
        }
        if self.has_scale:
            row |= {"scale_min": -minus_scale_min, "scale_max": scale_max}
        return row | {"exponents": histogram(self.exponents), "numbers": self.numbers}


def _decibels(signal: float, noise: float) -> float | None:
    """Of float64 numbers the squares may be beyond float64."""
    if not (0 < signal < math.inf and 0 < noise < math.inf):
        return None
    return 10 * (math.log10(signal) - math.log10(noise))


def histogram(exponents: Tensor) -> dict[str, Any]:
    """The lowest exponent that is there, and the counts from there to the highest one."""
    there = exponents.nonzero()
    if not len(there):
        return {"lowest": 0, "counts": []}
    first, last = int(there[0]), int(there[-1])
    return {"lowest": LOWEST_EXPONENT + first, "counts": exponents[first : last + 1].tolist()}


@torch.no_grad()
def of_rounding(x: Tensor, rounded: Tensor, format: AnyFormat, dim: int = -1, scale: Tensor | None = None) -> Loss:
    """What was lost when `x` became `rounded`, of the same shape, in this format. dim, scale: as quantize() takes them.

    flushed: x is not 0 and rounded is. subnormal: the element of rounded is not 0 and below the element's smallest
    normal number. saturated: x is finite and, once scaled, beyond the element's largest or lowest number. not_finite: x
    or rounded is not. Sums, amax and exponents are of what is finite before and after. A number's element is
    what remains of it once its group's scale is divided out; a format without scales is its own element.
    """
    x, rounded = x.detach(), rounded.detach()
    has_elements, steps = True, None
    element: AnyElement
    if isinstance(format, BlockFormat) and x.numel():
        rows, results = blocks.rows(x, format, dim), blocks.rows(rounded, format, dim)
        steps, element = _steps(rows, x, format, dim, scale), format.element
        has_elements = steps is not None
    else:
        (rows, results), element = _flat(x, rounded), format.element if isinstance(format, BlockFormat) else format
    sums, exponents = x.new_zeros(8, dtype=torch.float64), x.new_zeros(_EXPONENTS, dtype=torch.int64)
    amax = x.new_zeros((), dtype=torch.float64)
    before, after, of_lines = _sampled(rows), _sampled(results), None if steps is None else _sampled(steps, like=rows)
    for numbers, became, step in _chunks(before, after, of_lines):
        amax = torch.maximum(amax, _add(sums, exponents, numbers, became, element if has_elements else None, step))
    if before.numel() < rows.numel():
        lowest, highest = (end.double() for end in rows.aminmax())
        of_all = torch.maximum(highest, -lowest)
        amax = torch.where(of_all.isfinite(), of_all, amax)
    maxima = torch.stack([amax, *_range(steps, amax)])
    looked_at = before.numel() * x.numel() // max(rows.numel(), 1)  # without what fills the last groups
    return Loss(looked_at, sums, maxima, exponents, steps is not None, has_elements)


def _range(steps: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The largest scale, and the negative of the smallest one."""
    if steps is None or not steps.numel():
        return like.new_full((), -math.inf), like.new_full((), -math.inf)
    return steps.amax(), -steps.amin()


def _flat(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both as one line each, in the order of their memory where they have the same, for which nothing is copied."""
    if x.stride() == other.stride():
        strides = x.stride()
        order = sorted(range(x.ndim), key=lambda d: -strides[d])
        x, other = x.permute(order), other.permute(order)
    return x.reshape(1, -1), other.reshape(1, -1)


def _sampled(lines: Tensor, like: Tensor | None = None) -> Tensor:
    """Some of the numbers of a matrix, where it has more than _WHOLE: whole lines, or of few lines the same columns.

    like: the matrix of whose lines these are the scales, (lines, 1).
    """
    count, width = (lines if like is None else like).shape
    if count * width <= _WHOLE:
        return lines
    if count >= 16 * _PARTS:
        wanted = max(_SAMPLE // (_PARTS * width), 1)
        return lines[: count - count % _PARTS].reshape(_PARTS, -1, lines.shape[1])[:, :wanted].flatten(0, 1)
    if like is not None:
        return lines
    wanted = max(_SAMPLE // (_PARTS * count), 1)
    return lines[:, : width - width % _PARTS].view(count, _PARTS, -1)[..., :wanted].flatten(1)


def _chunks(rows: Tensor, results: Tensor, steps: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Parts of numbers, what they became, and their scales (lines, 1): so many that all that is computed stays near.

    A GPU has all of it at once.
    """
    if not rows.is_cpu:
        if rows.numel():
            yield rows, results, steps
        return
    width = min(rows.shape[1], _CHUNK)
    lines = max(_CHUNK // max(width, 1), 1)
    for first, left in itertools.product(range(0, len(rows), lines), range(0, rows.shape[1], max(width, 1))):
        yield (
            rows[first : first + lines, left : left + width],
            results[first : first + lines, left : left + width],
            None if steps is None else steps[first : first + lines],
        )


def _add(
    sums: Tensor, exponents: Tensor, x: Tensor, rounded: Tensor, element: AnyElement | None, step: Tensor | None
) -> Tensor:
    """Adds what these numbers lost to sums and exponents; returns the largest magnitude. element: None: not known."""
    numbers, results = x.double(), rounded.double()
    errors = results - numbers
    error = _squares(errors)
    not_finite = sums.new_zeros(())
    if not x.is_cpu or not math.isfinite(float(error)):  # on the CPU nobody waits for the answer
        finite = errors.isfinite()
        not_finite = x.numel() - finite.sum()
        numbers, errors = torch.where(finite, numbers, 0.0), torch.where(finite, errors, 0.0)
        results, x = torch.where(finite, results, 0.0), torch.where(finite, x, 0.0)
        error = _squares(errors)
    magnitudes = numbers.abs()
    amax = magnitudes.amax()
    kept = torch.count_nonzero(results)
    flushed = torch.count_nonzero(numbers) - kept  # what is 0 stays 0
    subnormal, saturated = sums.new_zeros(()), sums.new_zeros(())
    if element is not None:
        if step is not None:  # a group whose scale became zero has lost all its numbers, and none to an end
            step = step.masked_fill(step == 0, math.inf)
        if not _has_zero(element):
            flushed = ((numbers != 0) & (results == 0)).sum()
        if smallest := _smallest_normal(element):
            is_below = results.abs() < (smallest if step is None else smallest * step)
            subnormal = torch.count_nonzero(is_below) - (x.numel() - kept)
        saturated = _saturated(numbers, magnitudes, amax, element, step)
    counts = torch.stack([flushed, subnormal, saturated, not_finite])
    sums += torch.cat([counts, torch.stack([_squares(numbers), error, errors.sum(), magnitudes.sum()])])
    _count_exponents(exponents, x)
    return amax


def _squares(x: Tensor) -> Tensor:
    """The sum of their squares."""
    flat = x.reshape(-1)
    return flat.dot(flat)


def _saturated(numbers: Tensor, magnitudes: Tensor, amax: Tensor, element: AnyElement, step: Tensor | None) -> Tensor:
    """How many of these finite numbers are beyond the element's ends once they are scaled."""
    reach = _SLACK * step if step is not None else 1.0
    if element.lowest != -element.largest:
        return ((numbers > element.largest * reach) | (numbers < element.lowest * reach)).sum()
    if step is None and numbers.is_cpu and float(amax) <= element.largest:
        return torch.zeros_like(amax)
    return torch.count_nonzero(magnitudes > element.largest * reach)


def _count_exponents(exponents: Tensor, x: Tensor) -> None:
    """Adds to each exponent how many nonzero finite numbers have it."""
    if x.dtype == torch.float32 and x.is_cpu:
        fields = (x.contiguous().view(torch.int32) >> 23) & 0xFF
        counts = torch.bincount(fields.reshape(-1), minlength=256)
        exponents[_SMALLEST - LOWEST_EXPONENT :] += counts[1:255]
        if int(counts[0]) == x.numel() - int(torch.count_nonzero(x)):  # zeros, and no subnormal number
            return
        x = x[fields == 0]
    x = x if x.itemsize > 2 else x.float()  # torch has no frexp of bfloat16 for GPUs
    places = torch.frexp(x).exponent.reshape(-1).long() - (1 + LOWEST_EXPONENT)
    # By addition in place, because torch.bincount waits for a GPU.
    exponents.scatter_add_(0, places.clamp_(0, _EXPONENTS - 1), (x != 0).reshape(-1).long())


def _has_zero(element: AnyElement) -> bool:
    """Whether 0 is one of its values, so that a 0 stays one."""
    return isinstance(element, Format) or 0.0 in element.values


def _smallest_normal(element: AnyElement) -> float:
    """Below which an element is subnormal; 0 where there is no such range: of a table, and of fixed point.

    Half a spacing lower: by that much an element may be off, which is computed from a number and a rounded scale.
    """
    if not isinstance(element, Format) or not element.exponent_bits or not element.mantissa_bits:
        return 0.0
    return element.smallest_normal - element.smallest_subnormal / 2


def _steps(rows: Tensor, x: Tensor, format: BlockFormat, dim: int, scale: Tensor | None) -> Tensor | None:
    """By what each group's elements are multiplied to give its numbers, float64 (groups, 1); None: by no number."""
    if format.scaling.kind == "expand":
        return None
    largest_in = blocks.shared(blocks.maxima(rows, torch.finfo(x.dtype).max), x, format, dim)
    if format.scaling.is_power:
        return blocks.powers(largest_in, format)
    if format.scaling.kind == "quest":
        factors = blocks.quest_factors(rows, format.element, torch.finfo(x.dtype).max)
    else:
        factors = blocks.factors(largest_in, format, lambda numbers, to: quantize(numbers, to), scale)
    if factors.decode is not None and factors.tensor is not None:
        return factors.decode.double() * factors.tensor.double()
    return 1.0 / factors.encode.double()


def of_product(result: Tensor, exact: Tensor) -> Tensor:
    """How far a product of rounded operands is from that of the same operands unrounded: float64 (2,), which add up:
    the sums of the squares of the difference and of the exact result, of the numbers that are looked at as in Loss.
    """
    sums = result.new_zeros(2, dtype=torch.float64)
    rounded, unrounded = _flat(result.detach(), exact.detach())
    for numbers, wanted, _ in _chunks(_sampled(rounded), _sampled(unrounded), None):
        of_chunk = wanted.double()
        sums += torch.stack([_squares(numbers.double() - of_chunk), _squares(of_chunk)])
    return sums


def relative(sums: Tensor) -> float | None:
    """The relative error, Frobenius, from what `of_product` gives; None for a product of zeros."""
    error, size = sums.tolist()
    return math.sqrt(error / size) if size else None


def of_update(exact: Tensor, arrived: Tensor) -> Tensor:
    """What became of an update: float64 (5,), which add up: how many numbers should have moved, how many of these did
    not, and the sums of exact**2, arrived**2 and exact * arrived. Both float64, of one shape.
    """
    wanted = exact != 0
    exact, arrived = exact.reshape(-1), arrived.reshape(-1)
    counts = [wanted.sum(), (wanted.reshape(-1) & (arrived == 0)).sum()]
    return torch.stack([*counts, exact.dot(exact), arrived.dot(arrived), exact.dot(arrived)])


def update_row(sums: Tensor) -> dict[str, Any]:
    """The numbers of a line of layers.jsonl, from what `of_update` gives; None where there was no update, or none that
    arrived."""
    wanted, lost, exact, arrived, both = sums.tolist()
    return {
        "updates": int(wanted),
        "lost_updates": lost / wanted if wanted else None,
        "update_norm": math.sqrt(exact),
        "arrived_norm": math.sqrt(arrived / exact) if exact else None,
        "update_cosine": both / math.sqrt(exact * arrived) if exact * arrived else None,
    }
