"""Moments in 8 bits as torchao and bitsandbytes compute them, on the CPU: python bench/optimizer_states.py > FILE

Both have to be installed. tests/low_precision/test_moments.py compares ours with what this wrote, without them. The
numbers that they round are in tests/state_inputs.py. Kept are their codes and scales, and of a parameter after its
steps every 20th number.

bitsandbytes' CPU kernel for float32 looks codes up in a table of its own: of these numbers, every eighth code is not
the nearest, and some that are nearest to 0 are not 0. Its GPU kernels search. So here it takes float64 tensors, which
it quantizes in plain PyTorch, to the nearest code.
"""

from __future__ import annotations

import base64
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from state_inputs import SETTINGS, STEPS, gradient, groups, start  # noqa: E402

SIZE = 256


def packed(x: Tensor) -> str:
    """A tensor's bytes as a text."""
    numbers = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return base64.b85encode(zlib.compress(numbers.tobytes(), 9)).decode()


def torchao_groups(unsigned: bool) -> dict[str, Any]:
    from torchao.optim import quant_utils

    scaled, scale = quant_utils.scale_tensor(groups(unsigned), SIZE)
    table = torch.tensor(quant_utils.create_dynamic_map(signed=not unsigned))
    return {"codes": packed(quant_utils.quantize_8bit_with_qmap(scaled, table)), "scales": packed(scale)}


def torchao_float8(unsigned: bool) -> dict[str, Any]:
    from torchao.optim.subclass_fp8 import quantize_fp8

    codes, scale = quantize_fp8(groups(unsigned), SIZE)
    return {"codes": packed(codes), "scales": packed(scale)}


def bitsandbytes_groups(unsigned: bool) -> dict[str, Any]:
    from bitsandbytes import functional

    table = functional.create_dynamic_map(signed=not unsigned)
    codes, scale = torch.ops.bitsandbytes.quantize_blockwise(groups(unsigned).double(), table, SIZE)
    return {"codes": packed(codes), "scales": packed(scale)}


def torchao_adam(kind: str) -> dict[str, Any]:
    """torchao's step for one parameter as it is, not compiled: a compiler may contract products and sums."""
    from torchao.optim import adam

    state_type = {"AdamW8bit": adam.OptimState8bit, "AdamWFp8": adam.OptimStateFp8}[kind]
    p, kept = start(), {}
    flags = ((True,), (False,)) if kind == "AdamW8bit" else ((), ())
    m, v = (state_type.zeros(p.shape, *flag, SIZE) for flag in flags)
    step, lr = torch.tensor(0.0), torch.tensor(SETTINGS["lr"])
    for n in range(1, STEPS[-1] + 1):
        step += 1
        betas, decay, eps = SETTINGS["betas"], SETTINGS["weight_decay"], SETTINGS["eps"]
        adam.single_param_adam(p, gradient(n), step, m, v, None, lr, *betas, decay, eps, True, False)
        if n in STEPS:
            kept[str(n)] = _kept(p, (m.codes, m.scale), (v.codes, v.scale))
    return kept


def bitsandbytes_adam() -> dict[str, Any]:
    import bitsandbytes
    from bitsandbytes.backends.cpu import ops

    quantize = ops._quant_blockwise_fp32_direct
    ops._quant_blockwise_fp32_direct = lambda moment, *others: quantize(moment.double(), *others)
    p, kept = torch.nn.Parameter(start()), {}
    optimizer = bitsandbytes.optim.AdamW8bit([p], **SETTINGS)
    for n in range(1, STEPS[-1] + 1):
        p.grad = gradient(n)
        optimizer.step()
        state = optimizer.state[p]
        if n in STEPS:
            kept[str(n)] = _kept(p, *((state[f"state{i}"], state[f"absmax{i}"]) for i in (1, 2)))
    return kept


def _kept(p: Tensor, m: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor]) -> dict[str, Any]:
    kept: dict[str, Any] = {"p": packed(p.detach().flatten()[::20].clone())}
    return kept | {
        name: {"codes": packed(codes), "scales": packed(scales)} for name, (codes, scales) in (("m", m), ("v", v))
    }


def main() -> None:
    import bitsandbytes
    import torchao

    both: dict[str, Callable[[bool], dict[str, Any]]] = {
        "torchao": torchao_groups,
        "torchao float8": torchao_float8,
        "bitsandbytes": bitsandbytes_groups,
    }
    versions = {"torch": torch.__version__, "torchao": torchao.__version__, "bitsandbytes": bitsandbytes.__version__}
    made = {
        "versions": versions,
        "groups": {
            f"{name} {'un' * unsigned}signed": make(unsigned)
            for name, make in both.items()
            for unsigned in (False, True)
        },
        "steps": {
            "torchao AdamW8bit": torchao_adam("AdamW8bit"),
            "torchao AdamWFp8": torchao_adam("AdamWFp8"),
            "bitsandbytes AdamW8bit": bitsandbytes_adam(),
        },
    }
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
