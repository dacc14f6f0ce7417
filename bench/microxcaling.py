"""What microxcaling computes, as test vectors: python bench/microxcaling.py CHECKOUT COMMIT > FILE

CHECKOUT: a checkout of https://github.com/microsoft/microxcaling at COMMIT; it wants numpy and packaging besides torch.
tests/low_precision/test_microxcaling.py compares our products with the numbers in the file, without microxcaling.

The numbers that are multiplied by others are multiples of 2**-10 between 1/2 and 4, and zeros: rounded to any of the
formats here they are multiples of 2**-7, and sums of magnitudes stay below 2**10 (`exact`). So each sum is exact in
float32, and its bits do not depend on the order in which a machine adds. Hard numbers (`lines`) are multiplied by the
identity, which shows how each of the six operands was rounded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FORMATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "int8")
SETTINGS = {"block_size": 32, "scale_bits": 8, "shared_exp_method": "max", "bfloat": 0, "custom_cuda": False}
SETTINGS |= {"quantize_backprop": True}
N = 35  # of what is summed: a whole block, and a shorter one

# name -> (type, its arguments, shape of the input, formats)
LAYERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[str, ...]]] = {
    "linear, many inputs": ("Linear", {"in_features": N, "out_features": 2}, (3, N), FORMATS),
    "linear, many outputs": ("Linear", {"in_features": 2, "out_features": N}, (3, 2), FORMATS),
    "linear, many rows": ("Linear", {"in_features": 3, "out_features": 2}, (N, 3), FORMATS),
    "linear, sequences of 32 rows": ("Linear", {"in_features": 1, "out_features": 2}, (2, 32, 1), FORMATS[:2]),
    "conv1d, many inputs": (
        "Conv1d",
        {"in_channels": N, "out_channels": 2, "kernel_size": 2, "stride": 2, "padding": 1},
        (1, N, 3),
        FORMATS[:2],
    ),
    "conv2d, groups, many outputs": (
        "Conv2d",
        {"in_channels": 2, "out_channels": 36, "kernel_size": [2, 1], "groups": 2},
        (2, 2, 2, 2),
        FORMATS[2:4],
    ),
    "conv1d, groups share blocks": (
        "Conv1d",
        {"in_channels": 40, "out_channels": 2, "kernel_size": 1, "groups": 2},
        (1, 40, 2),
        FORMATS[4:],
    ),
    "conv1d, many samples": (
        "Conv1d",
        {"in_channels": 2, "out_channels": 2, "kernel_size": 2, "dilation": 2},
        (N, 2, 4),
        FORMATS[4:],
    ),
    "conv_transpose2d, many inputs": (
        "ConvTranspose2d",
        {"in_channels": N, "out_channels": 2, "kernel_size": [2, 1], "stride": 2},
        (1, N, 2, 1),
        (FORMATS[0], FORMATS[5]),
    ),
}
MATMULS = {  # name -> (shape of a, shape of b, formats)
    "many inputs": ((2, 2, N), (2, N, 2), FORMATS[:2]),
    "many outputs": ((2, 2, 3), (2, 3, N), FORMATS[2:4]),
    "many rows": ((1, 2, N, 2), (1, 2, 2, 1), FORMATS[4:]),
}


def lines(generator: torch.Generator) -> dict[str, Tensor]:
    """Hard numbers, (N,) each."""
    n = torch.arange(N)
    normal = torch.randn(N, generator=generator)
    signs = torch.randint(0, 2, (N,), generator=generator) * 2 - 1
    return {
        "normal": normal,
        "from 2**-60 to 2**60": normal * torch.exp2(torch.randint(-60, 60, (N,), generator=generator)),
        "mostly zeros": normal * (n % 5 == 2),
        "zeros in the second block": normal * (n < 32),
        "powers of two": signs * torch.exp2(-n),
        "three times powers of two": 3 * signs * torch.exp2(-n),
        "ties": signs * (torch.randint(0, 300, (N,), generator=generator) * 2 + 1) / 2.0 ** (n % 9),
        "ties at the smallest": torch.where(n % 32 == 0, 1.0, signs * (n % 7 + 0.5) * 2.0 ** -(n % 18)),
        "whole numbers": n - 17.0,
        "near one": signs * (1 - 2.0 ** -(n % 20 + 3.0)),
        "smaller than the smallest scale": normal * 2.0**-128,
        "subnormal in float32": normal * 2.0**-137,
        "near float32's largest": normal.clamp(-1.9, 1.9) * 2.0**127,
        "beyond the element's largest": signs * (1.5 + (n % 16) / 32),
    }


def few_digits(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    """Numbers whose products and sums are exact."""
    magnitudes = torch.randint(512, 4096, shape, generator=generator) / 1024
    return magnitudes * torch.randint(-4, 5, shape, generator=generator).sign()


def specs(fmt: str, rounding: str = "even") -> Any:
    given = {"w_elem_format": fmt, "a_elem_format": fmt, "round": rounding}
    return mx.finalize_mx_specs(SETTINGS | given)


def back(function: Callable[..., Tensor], error: Tensor, **tensors: Tensor) -> dict[str, Tensor]:
    """function(*tensors), y, and its gradients, by the names of the tensors."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    y = function(*leaves.values())
    y.backward(error)
    return {"y": y.detach()} | {f"d{name}": x.grad for name, x in leaves.items()}


def of_layer(kind: str, settings: dict[str, Any], fmt: str) -> Callable[..., Tensor]:
    layer = getattr(mx, kind)(**settings, mx_specs=specs(fmt))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    return function


def of_matmul(fmt: str) -> Callable[..., Tensor]:
    return lambda a, b: mx.matmul(a, b, mx_specs=specs(fmt))


def exact(function: Callable[..., Tensor], error: Tensor, **tensors: Tensor) -> dict[str, Tensor]:
    """back(...), once it is sure that no order of summation changes a bit."""
    magnitudes = back(function, error.abs(), **{name: x.abs() for name, x in tensors.items()})
    assert max(float(x.max()) for x in magnitudes.values()) < 2**10
    return back(function, error, **tensors)


def as_linear_reads(x: Tensor, fmt: str) -> Tensor:
    """Lines (M, N) as each of Linear's six operands reads them: all the same."""
    one, column = torch.eye(x.shape[1]), x.t().contiguous()
    zero = torch.zeros_like

    def linear(error: Tensor, inputs: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return back(lambda x, w: mx.linear(x, w, mx_specs=specs(fmt)), error, x=inputs, w=weight)

    read = [
        linear(zero(x), x, one)["y"],
        linear(zero(column), one, x)["y"].t(),
        linear(x, zero(x), one)["dx"],
        linear(one, zero(column), column)["dx"].t(),
        linear(column, one, zero(x))["dw"],
        linear(one, column, zero(column))["dw"].t(),
    ]
    assert all(torch.equal(read[0], other) for other in read)
    return read[0]


def as_convolutions_read(x: Tensor, fmt: str) -> Tensor:
    """Lines (M, N) as a convolution reads them as channels of its input, whatever rounding is asked for."""
    one = torch.eye(x.shape[1]).unsqueeze(2)
    even, nearest = (mx.conv1d(x.unsqueeze(2), one, mx_specs=specs(fmt, rounding)) for rounding in ("even", "nearest"))
    assert torch.equal(even, nearest)
    return even.squeeze(2)


def differences(generator: torch.Generator) -> dict[str, Any]:
    """What microxcaling does in another way than we do; the test says why."""
    below_power = few_digits((N,), generator) * 256
    below_power[3] = 1024 * (1 - 2.0**-24)
    below_half = torch.zeros(N)  # of the smallest number of each format, beside a 1
    halves = 2.0 ** -torch.tensor([18.0, 32, 9, 6, 4, 7])
    below_half[:7] = torch.cat([torch.ones(1), torch.nextafter(halves, torch.zeros(6))])
    infinite = few_digits((N,), generator)
    infinite[3] = float("inf")
    of_lines = {
        "largest below a power of two": below_power,
        "just below half of the smallest": below_half,
    }
    x, weight = few_digits((2, 3, 2), generator), few_digits((2, 2), generator)
    x[1] /= 4
    error = few_digits((2, 3, 2), generator)
    sequences = {"x": x, "weight": weight, "bias": torch.zeros(2), "errors": error}
    settings = {"in_features": 2, "out_features": 2}
    gradients = {
        fmt: back(of_layer("Linear", settings, fmt), error, x=x, weight=weight, bias=torch.zeros(2))["dweight"]
        for fmt in FORMATS[3:]
    }
    sums = {fmt: mx.linear(infinite, torch.ones(1, N), mx_specs=specs(fmt)) for fmt in FORMATS}
    return {
        **{
            name: {"x": line, "linear": {fmt: as_linear_reads(line.unsqueeze(0), fmt)[0] for fmt in FORMATS}}
            for name, line in of_lines.items()
        },
        "an infinity": {"x": infinite, "sum": sums},
        "sequences of 3 rows": sequences | {"dweight": gradients},
    }


def vectors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    of_lines = lines(generator)
    x = torch.stack(list(of_lines.values()))
    found: dict[str, Any] = {
        "lines": {
            "names": list(of_lines),
            "x": x,
            "linear": {fmt: as_linear_reads(x, fmt) for fmt in FORMATS},
            "convolution": {fmt: as_convolutions_read(x, fmt) for fmt in FORMATS},
        },
        "layers": {},
        "matmul": {},
    }
    for name, (kind, settings, shape, formats) in LAYERS.items():
        layer = getattr(torch.nn, kind)(**settings)
        x, weight, bias = (few_digits(size, generator) for size in (shape, layer.weight.shape, layer.bias.shape))
        error = few_digits(layer(x).shape, generator)
        results = {fmt: exact(of_layer(kind, settings, fmt), error, x=x, weight=weight, bias=bias) for fmt in formats}
        tensors = {"x": x, "weight": weight, "bias": bias, "errors": error}
        found["layers"][name] = {"kind": kind, "settings": settings, **tensors, "results": results}
    for name, (shape, other, formats) in MATMULS.items():
        a, b = few_digits(shape, generator), few_digits(other, generator)
        error = few_digits((a @ b).shape, generator)
        results = {fmt: exact(of_matmul(fmt), error, a=a, b=b) for fmt in formats}
        found["matmul"][name] = {"a": a, "b": b, "errors": error, "results": results}
    return found | {"differences": differences(generator)}


def written(value: Any) -> Any:
    """For JSON: a tensor by its shape, and its float32 bits in hexadecimal without the zeros at their right end."""
    if isinstance(value, dict):
        return {key: written(one) for key, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    bits = value.float().contiguous().view(torch.int32).flatten().tolist()
    return {"shape": list(value.shape), "bits": " ".join(f"{b & 0xFFFFFFFF:08x}".rstrip("0") or "0" for b in bits)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("checkout")
    parser.add_argument("commit")
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.checkout)
    import mx

    made = {
        "source": "https://github.com/microsoft/microxcaling",
        "commit": arguments.commit,
        "settings": SETTINGS | {"round": "even", "w_elem_format": FORMATS, "a_elem_format": FORMATS},
        "made": f"by bench/microxcaling.py with torch {torch.__version__} on the CPU: its numbers, none of its code",
        "numbers": "float32 bits in hexadecimal, zeros at the right end left off, in row-major order",
    }
    print(json.dumps(written(made | vectors()), indent=0))
