"""quantize() as a user of Python calls it: gradients, layouts, types, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from training_helpers import FLOAT8, nearest

from low_precision.blocks import NAN_BITS
from low_precision.formats import NAMED, format_named
from low_precision.noise import Key
from low_precision.rounding import FewBits, Overflow, Rounding
from low_precision.tensor import quantize


def test_gradients_pass_straight_through():
    x = torch.tensor([0.3, 1e9, float("nan")], requires_grad=True)
    y = quantize(x, "float8")
    y.backward(torch.tensor([0.123, 4.0, 5.0]))
    assert y[:2].tolist() == [0.3125, 114688.0]
    assert torch.equal(x.grad, torch.tensor([0.123, 4.0, 5.0]))
    assert x.is_leaf
    with torch.no_grad():
        assert not quantize(x, "float8").requires_grad
    assert not quantize(x.detach(), "float8").requires_grad
    hidden = x * 1
    quantize(hidden, "float32").sum().backward()  # float32 does not cut the graph either
    assert torch.equal(x.grad, torch.tensor([1.123, 5.0, 6.0]))


def layouts() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 3)
    return {
        "contiguous": x,
        "transposed": x.transpose(1, 3),
        "channels_last": x.to(memory_format=torch.channels_last),
        "expanded": x[:, :1].expand(4, 6, 5, 3),
        "every other": x[:, ::2, 1:, :],
        "flipped and unsqueezed": x.flip(0)[None],
        "offset": x.reshape(-1)[7:],
        "0-dim": torch.tensor(0.3),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(x),
    }


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("fmt", ["float8", "float32"])
def test_shape_layout_and_input_are_kept(name, rounding, fmt):
    x = layouts()[name]
    before = x.detach().clone()
    y = quantize(x, fmt, rounding, key=4)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    if name in ("contiguous", "transposed", "channels_last"):
        assert y.stride() == x.stride()
    assert torch.equal(x, before)
    assert torch.equal(y, quantize(before.contiguous(), fmt, rounding, key=4))  # the same noise whatever the strides
    if x.numel():
        assert y.data_ptr() != x.data_ptr()
        y.detach().fill_(7)
        assert torch.equal(x, before)


def test_values_of_the_format_are_a_new_tensor_too():
    x = torch.tensor([1.0, -0.0, 0.0])
    for fmt in ("float8", "float32", "bfloat16"):
        y = quantize(x, fmt)
        assert y is not x
        assert y.data_ptr() != x.data_ptr()
        assert torch.equal(y.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize(
    ("dtype", "fmt"),
    [
        (torch.float16, "fp16"), (torch.float16, "float8_e5m2"), (torch.float16, "float8_e4m3fn"),
        (torch.bfloat16, "bfloat16"), (torch.bfloat16, "float8"), (torch.bfloat16, "float8_e5m2"),
    ],
)  # fmt: skip
def test_half_precision_inputs(dtype, fmt):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6).to(dtype).to(memory_format=torch.channels_last)
    y = quantize(x, fmt)
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    assert torch.equal(y.float(), nearest(x, format_named(fmt)))


@pytest.mark.parametrize(
    ("dtype", "fmt"),
    [(torch.float16, "tf32"), (torch.float16, "e8m12"), (torch.float16, "fixed25.0"), (torch.bfloat16, "tf32")],
)
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_saturating_where_the_format_reaches_further_than_the_type(dtype, fmt, backend):
    """The type's own largest value is on the format's grid, and stands for the format's."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([float("inf"), -float("inf"), largest, -largest, float("nan"), 1.0], dtype=dtype)
    for rounding in (*Rounding, FewBits(4)):
        y = quantize(x, fmt, rounding, 3, backend=backend)
        assert y[:4].tolist() == [largest, -largest, largest, -largest]
        assert y[4].isnan()
        if format_named(fmt).has_infinity:
            y = quantize(x, fmt, rounding, 3, backend=backend, overflow="infinity")
            assert y[:4].tolist() == [float("inf"), -float("inf"), largest, -largest]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nan_has_the_same_bits_wherever_it_is(dtype):
    """Torch's conversions make now this of them, now that."""
    for count in range(1, 40):
        for bits in (0x7FC1, -63):  # with either sign
            x = torch.full((count,), bits, dtype=torch.int16).view(dtype)
            for backend in ("eager", "fused"):
                rounded = quantize(x, "float8_e4m3fn", backend=backend).view(torch.int16)
                assert rounded.tolist() == [NAN_BITS[dtype]] * count


def test_a_key_alone_is_enough_for_the_gradients_noise():
    x = torch.full((1000,), 0.3, requires_grad=True)
    y = quantize(x, "float8", "nearest", 7, backward="float8:stochastic")
    y.backward(torch.full((1000,), 0.3))
    assert set(x.grad.tolist()) == {0.25, 0.3125}
    assert torch.equal(x.grad, quantize(x, "float8", "stochastic", Key.of(7, "backward")))


@pytest.mark.parametrize(
    ("x", "fmt"),
    [
        (torch.ones(2, dtype=torch.int64), "float8"), (torch.ones(2, dtype=torch.bool), "float8"),
        (torch.ones(2, dtype=torch.complex64), "float8"), (torch.ones(2, dtype=torch.float16), "float8"),
        (torch.ones(2, dtype=torch.float16), "bfloat16"), (torch.ones(2, dtype=torch.bfloat16), "float16"),
        (torch.ones(2, dtype=torch.float16), "nvfp4"),
        ([1.0, 2.0], "float8"), (np.ones(2, np.float32), "float8"), (1.5, "float8"),
    ],
    ids=lambda x: str(getattr(x, "dtype", x)),
)  # fmt: skip
def test_other_types_are_refused(x, fmt):
    with pytest.raises(TypeError, match="float32"):
        quantize(x, fmt)


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        (["float9"], {}, "float9"),
        (["float8", "nerest"], {}, "nerest"),
        (["float8", "stochastic"], {}, "key"),
        (["float8", "stochastic", -1], {}, "-1"),
        (["float8", "stochastic", 2**64], {}, str(2**64)),
        (["float8", "stochastic", True], {}, "True"),
        (["float8", "stochastic", 1.0], {}, "1.0"),
        (["float8", "stochastic", "7"], {}, "7"),
        (["float8"], {"overflow": "clip"}, "clip"),
        (["float8"], {"overflow": "infinity"}, "float8 has no infinity"),
        (["float8"], {"backend": "fast"}, "fast.*eager"),
        (["e9m1"], {}, "e9m1"),
        (["e4m24"], {}, "e4m24"),
    ],
)
def test_bad_arguments_are_named(arguments, named, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(2), *arguments, **named)


def test_names_and_objects_mean_the_same():
    torch.manual_seed(0)
    x = torch.randn(1000) * 1e5
    by_name = quantize(x, "float8_e5m2", "stochastic", 7, overflow="infinity")
    by_object = quantize(x, NAMED["float8_e5m2"], Rounding.STOCHASTIC, Key(7), overflow=Overflow.INFINITY)
    assert torch.equal(by_name, by_object)
    assert by_name.isinf().any()
    assert torch.equal(quantize(x, replace(FLOAT8, name="mine")), quantize(x, "float8"))
    assert torch.equal(quantize(x, "float8"), nearest(x, FLOAT8))
