"""Blocks along any dimension, rounded where they lie, against blocks of a transposed copy; and operands of products."""

import itertools

import pytest
import torch

from low_precision import forms, products, rules
from low_precision.blocks import rows
from low_precision.clock import Clock
from low_precision.engines import eager, fused, lines
from low_precision.formats import BLOCKS, NAMED, BlockFormat, format_named
from low_precision.noise import MULTIPLIERS, SHIFTS, Key, words
from low_precision.rounding import FewBits, Overflow, Rounding
from low_precision.scheme import Quantizer

QUICK = (Rounding.NEAREST, Rounding.UP, Rounding.STOCHASTIC, FewBits(8, True))
ROUNDINGS = [*Rounding, FewBits(1), FewBits(8, True)]
SOME = [pytest.param(r, marks=() if r in QUICK else pytest.mark.slow) for r in ROUNDINGS]
POWERS = [fmt for fmt in BLOCKS.values() if fmt.scale is None]
CUSTOM = [BlockFormat(f"e4m3 in {n}", NAMED["float8_e4m3fn"], n, None, "") for n in (1, 3, 16, 17, 64, 257, 700)]
CUSTOM += [BlockFormat(f"{element} in 8", format_named(element), 8, None, "") for element in ("e3m0", "fixed4.2s")]
CUSTOM += [BlockFormat(f"{element} in 40", format_named(element), 40, None, "") for element in ("e5m10", "e2m22")]
OFTEN = ("mxfp8_e4m3", "mxint8", "e4m3 in 17", "e4m3 in 257", "e3m0 in 8")
FORMATS = [pytest.param(f, marks=() if f.name in OFTEN else pytest.mark.slow) for f in (*POWERS, *CUSTOM)]
KINDS = ["normal", "wide", "specials", "any bits", "small", "tiny"]
SHAPES = [(70,), (3, 40), (300, 50), (2, 35, 300), (33, 16, 3, 5), (2, 3, 4, 5, 33), (1, 50), (50, 1), (1,)]


def numbers(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=g)
    if kind == "any bits":
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=g).view(torch.float32)
    if kind != "normal":  # over so many binades, stochastic rounding needs further words
        x = x * torch.exp2(torch.randint(-40, 20, shape, generator=g).float())
    x = x * {"tiny": 2.0**-80, "small": 2.0**-50}.get(kind, 1.0)
    if kind == "specials" and x.numel():
        for value in (float("nan"), float("inf"), -float("inf"), 1e-45, -1e-39, 3.4e38, 0.0, -0.0):
            x.view(-1)[torch.randint(0, x.numel(), (1 + x.numel() // 40,), generator=g)] = value
        x.view(-1)[: x.numel() // 4] = 0.0  # whole blocks of zeros
    return x


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers in other orders of memory, the last of which does not fill it."""
    orders = [tuple(range(x.ndim)), tuple(reversed(range(x.ndim))), (*range(1, x.ndim), 0)]
    if x.ndim == 4:
        orders += [(0, 2, 3, 1), (2, 0, 1, 3)]
    if x.ndim == 5:
        orders += [(0, 2, 3, 4, 1), (0, 2, 1, 4, 3)]
    made = [x.permute(o).contiguous().permute([o.index(d) for d in range(x.ndim)]) for o in dict.fromkeys(orders)]
    return [*made, torch.stack([x, x], -1)[..., 0]]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    whole = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))
    )


def transposed(x: torch.Tensor, fmt: BlockFormat, rounding, key: Key, dim: int) -> torch.Tensor:
    """The old way: the blocks of a copy, as rows, by the readable engine."""
    blocks = rows(x, fmt, dim)
    key = Key(key.value, key.first_row * len(blocks) // len(x))
    line = x.movedim(dim, -1).shape
    rounded = eager.quantize(blocks, fmt, rounding, Overflow.SATURATE, key)
    return rounded.reshape(*line[:-1], -1)[..., : line[-1]].movedim(-1, dim)


@pytest.mark.parametrize("rounding", SOME)
@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in range(1, len(KINDS)))])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_along_any_dimension_as_of_a_transposed_copy(fmt, turn, rounding):
    """turn: which kind of numbers the first shape has, and the next shape the next kind."""
    for number, shape in enumerate(SHAPES):
        kind = KINDS[(number + turn) % len(KINDS)]
        for x, dim in itertools.product(layouts(numbers(shape, kind)), range(len(shape))):
            key = Key(11, first_row=3 if dim else 0)  # blocks across the rows of several processes are nobody's
            rounded = fused.quantize(x, fmt, rounding, Overflow.SATURATE, key, dim)
            assert rounded.stride() == torch.empty_like(x).stride()
            assert equal(rounded, transposed(x, fmt, rounding, key, dim)), (shape, x.stride(), dim)


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
def test_nothing_is_copied_where_memory_is_filled(rounding, monkeypatch):
    """A tensor of a usual layout does not go by way of its blocks, whichever dimension they run along."""
    monkeypatch.setattr(fused.blocks, "rows", None)
    for shape in [(70,), (3, 40), (2, 35, 300), (33, 16, 3, 5), (2, 3, 4, 5, 33)]:
        channels_last = (0, *range(2, len(shape)), 1)
        for order, dim in itertools.product([tuple(range(len(shape))), channels_last[: len(shape)]], range(len(shape))):
            order = order if len(set(order)) == len(shape) else tuple(range(len(shape)))
            x = numbers(shape, "wide").permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
            fused.quantize(x, BLOCKS["mxfp8_e4m3"], rounding, Overflow.SATURATE, Key(1), dim)


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_two_bytes(dtype, rounding):
    x = numbers((33, 16, 3, 5), "normal").to(dtype)
    x.view(-1)[:3] = torch.tensor([float("inf"), float("nan"), -0.0], dtype=dtype)
    for y, dim, name in itertools.product(layouts(x), range(4), ("mxfp8_e4m3", "mxint8")):
        arguments = (y, BLOCKS[name], rounding, Overflow.SATURATE, Key(5), dim)
        assert equal(fused.quantize(*arguments), eager.quantize(*arguments))


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
def test_into_another_tensor_and_in_place(rounding):
    for x, dim in itertools.product(layouts(numbers((33, 16, 3, 5), "wide"))[:-1], range(4)):
        arguments = (BLOCKS["mxfp8_e4m3"], rounding, Overflow.SATURATE, Key(5), dim)
        expected = eager.quantize(x, *arguments)
        out = torch.full((33, 16, 3, 5), 7.0)
        assert fused.quantize(x, *arguments, out) is out
        assert equal(out, expected)
        assert fused.quantize(x, *arguments, x) is x
        assert equal(x, expected)


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
def test_any_number_of_threads_gives_the_same(rounding):
    before = torch.get_num_threads()
    try:
        for order, dim in itertools.product([(0, 1, 2), (1, 2, 0)], range(3)):
            x = numbers((70, 61, 40), "wide").permute(order).contiguous().permute([order.index(d) for d in range(3)])
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(fused.quantize(x, BLOCKS["mxfp8_e4m3"], rounding, Overflow.SATURATE, Key(5), dim))
            assert equal(results[0], results[1])
            assert equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def index_of(word: int, key: Key, draw: int) -> int:
    """The element of which noise.words gives this word: the hash is a bijection, and is undone here step by step."""
    x = _unshifted(word, SHIFTS[3])
    for part, shift, multiplier in list(zip(key.parts(0, draw), SHIFTS, MULTIPLIERS, strict=False))[::-1]:
        x = _unshifted(x * pow(multiplier, -1, 2**32) % 2**32, shift) ^ part
    return x


def _unshifted(word: int, shift: int) -> int:
    """The x of which `word` is x ^ x >> shift."""
    x = word
    for _ in range(32 // shift):
        x = word ^ (x >> shift)
    return x


@pytest.mark.parametrize("shape", [(64, 300), (300, 64)])
def test_where_one_further_word_does_not_decide(shape):
    """A number so far below its block's largest that 32 further bits must be zero, and are."""
    dim = 0 if shape[0] == 64 else 1
    for value in range(40):
        key = Key(value)
        index = index_of(0, key, draw=1)
        if not 2**20 < index < 2**31:
            continue
        assert int(words(key, index, 1, draw=1)) == 0
        first_row = index // (shape[1] if dim == 0 else 64) - 2
        line, place = divmod(index - first_row * (shape[1] if dim == 0 else 64), 64)
        x = torch.full(shape, 2.0**60)
        x.movedim(dim, 1)[line, place] = 1.999 * 2.0**-20
        arguments = (x, BLOCKS["mxfp8_e4m3"], Rounding.STOCHASTIC, Overflow.SATURATE, Key(value, first_row), dim)
        assert equal(fused.quantize(*arguments), eager.quantize(*arguments))
        return
    raise AssertionError("no key of which the element has a fitting index")


def test_lines_in_memory():
    """(2, 3, 4) along the middle dimension: 8 lines, those of one index in the first dimension side by side."""
    assert lines.lines((2, 3, 4), (12, 4, 1), 1)[:3] == (2, 3, 4)
    assert lines.lines((2, 3, 4), (12, 4, 1), 2)[:3] == (6, 4, 1)
    assert lines.lines((2, 3, 4), (12, 1, 3), 0)[:3] == (1, 2, 12)
    assert lines.lines((2, 3, 4), (24, 8, 2), 1) is None  # memory is not filled
    assert lines.lines((2, 3, 4), (0, 4, 1), 1) is None


# Operands of products


def old_round_operand(quantizer, operand, reading, call, step, first_row, turn):
    """As products.round_operand did it: each line of the sum is made a row."""
    order = [d for d in range(operand.ndim) if d not in reading.over and d not in reading.batch]
    order = [*reading.batch, *order, *reading.over]
    moved = operand.permute(order)
    summed = moved.shape[len(order) - len(reading.over) :].numel()
    if order[0] == 0:
        rows_before = first_row * (operand.numel() // summed) // len(operand)
    else:
        rows_before, turn = 0, turn + (first_row << 16)
    rounded = quantizer(moved.reshape(-1, summed), call, step, dim=1, first_row=rows_before, backward_pass=turn)
    return rounded.reshape(moved.shape).permute([order.index(d) for d in range(operand.ndim)])


@pytest.mark.parametrize("spec", ["mxfp8_e4m3", "mxfp8_e4m3:stochastic", "mxint8:stochastic", "nvfp4:stochastic"])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_operands_as_of_lines_that_are_made_rows(spec, backend):
    quantizer = Quantizer(rules.rule_of(spec), ("wgrad.inputs", "layer"), Clock(seed=3), Overflow.SATURATE, backend)
    linear, matmul = forms.Linear(), forms.Matmul(2)
    convolution = forms.Convolution((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    readings = []
    for shape in [(40, 36), (3, 20, 36), (36,)]:
        x, w = numbers(shape, "wide"), numbers((50, 36), "wide")
        error = numbers((*shape[:-1], 50), "wide")
        for y in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            readings += zip((y, w), linear.readings_forward(y, w), strict=True)
            readings += zip((error, y), linear.readings_b(error, y), strict=True)
        readings += zip((error, w), linear.readings_a(error, w), strict=True)
    x, w = numbers((33, 16, 4, 5), "wide"), numbers((20, 16, 3, 3), "wide")
    for layout in (torch.contiguous_format, torch.channels_last):
        y, v = x.to(memory_format=layout), w.to(memory_format=layout)
        for pair in (convolution.readings_forward(y, v), convolution.readings_a(y, v), convolution.readings_b(y, v)):
            readings += zip((y, v), pair, strict=True)
    a, b = (
        numbers((2, 7, 3, 40), "wide").transpose(1, 2),
        numbers((2, 3, 40, 7), "wide"),
    )  # heads, as attention has them
    readings += zip((a, b), matmul.readings_forward(a, b), strict=True)
    readings += zip((a, b), matmul.readings_a(a, b), strict=True)
    readings += zip((a, b), matmul.readings_b(a, b), strict=True)
    for (operand, reading), first_row, turn in itertools.product(readings, (0, 4), (0, 2)):
        first_row = first_row * (operand.ndim > 1)
        arguments = (quantizer, operand, reading, 5, 6, first_row, turn)
        rounded = products.round_operand(*arguments)
        assert rounded.stride() == torch.empty_like(operand).stride()
        assert equal(rounded, old_round_operand(*arguments)), (operand.shape, operand.stride(), reading, first_row)
