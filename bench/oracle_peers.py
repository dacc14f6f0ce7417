"""The peers of bench/oracles.py: how each rounds the operands of a linear layer. They are run, and not copied.

A peer is a function of its checkout that yields its recipes; a recipe is a function of a layer (x, weight, errors).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from oracle_inputs import as_bfloat16, matrices
from torch import Tensor

Layer = dict[str, Tensor]  # x, weight, errors
Operand = tuple[str, Tensor, Tensor]  # rule, codes (lines, numbers of a line), scales: one for each group, in order
Made = tuple[dict[str, Operand], dict[str, Tensor]]  # operands by site, and y, dx, dw where the peer has products
Recipe = Callable[[Layer], Made]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NVFP4, RAGGED = "NVFP4 with the transform", "blocks of 128, the last ones shorter"
RECIPROCAL = " reciprocal"  # behind a rule: of a scale s, by which numbers are multiplied, the peer keeps 1/s
DECODED = " decoded"  # behind a rule: the peer gives values, and keeps no scale
TENSORS = {"inputs": "x", "weights": "weight", "errors": "errors"}
NAMED = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2"}


def oriented(x: Layer) -> dict[str, Tensor]:
    """The six operands, each as the matrix (lines, what is summed) that its product reads."""
    return {site: torch.from_numpy(m) for site, m in matrices({k: v.numpy() for k, v in x.items()}).items()}


# ---------------------------------------------------------------------------------------------------------------------
# torchao


def float8_linear(recipe: str) -> Recipe:
    """torchao.float8's Linear itself, forward and back, with emulate=True; its operands are caught as it casts them."""
    module = importlib.import_module("torchao.float8.float8_linear")
    from torchao.float8.config import Float8LinearConfig

    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)
    cast = module.hp_tensor_to_float8_dynamic
    sites = ["forward.inputs", "forward.weights", "dgrad.errors", "dgrad.weights", "wgrad.errors", "wgrad.inputs"]
    across = {"forward.weights", "wgrad.errors", "wgrad.inputs"}  # cast in the other orientation

    def run(x: Layer) -> Made:
        caught: list[Tensor] = []
        module.hp_tensor_to_float8_dynamic = lambda *a, **k: caught.append(cast(*a, **k)) or caught[-1]
        linear = torch.nn.Linear(256, 128, bias=False)
        linear.weight.data = x["weight"].clone()
        linear = module.Float8Linear.from_float(linear, config)
        inputs = x["x"].clone().requires_grad_()
        y = linear(inputs)
        y.backward(x["errors"])
        module.hp_tensor_to_float8_dynamic = cast
        operands: dict[str, Operand] = {}
        for site, eight in zip(sites, caught, strict=False):
            codes, scale = eight._data.float(), eight._scale
            rule = f"{NAMED[eight._data.dtype]}@{'tensor' if scale.numel() == 1 else 'row'}"
            rule += "@pow2" if config.round_scales_to_power_of_2 else ""
            operands[site] = rule, codes.t() if site in across else codes, scale.flatten()
        return operands, {"y": y.detach(), "dx": inputs.grad, "dw": linear.weight.grad}

    return run


def mx(element: str, mode: str) -> Recipe:
    """torchao's to_mx, of each operand along its sum; products with e4m3 by its own autograd function."""
    from torchao.prototype.moe_training.mxfp8_linear import _to_mxfp8_then_scaled_mm
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.kernels import (
        f4_unpacked_to_f32,
        f6_e2m3_unpacked_to_f32,
        f6_e3m2_unpacked_to_f32,
        unpack_uint4,
    )
    from torchao.prototype.mx_formats.mx_tensor import get_fp_scale, to_mx
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    kinds: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
        "float8_e4m3fn": (E4M3, Tensor.float),
        "float8_e5m2": (E5M2, Tensor.float),
        "float6_e3m2fn": ("fp6_e3m2", f6_e3m2_unpacked_to_f32),
        "float6_e2m3fn": ("fp6_e2m3", f6_e2m3_unpacked_to_f32),
        "float4_e2m1fn": (torch.float4_e2m1fn_x2, lambda packed: f4_unpacked_to_f32(unpack_uint4(packed))),
    }
    kind, decoded = kinds[element]
    mode_of = ScaleCalculationMode[mode.upper()]
    rule = f"{element}@32@e8m0{'' if mode == 'floor' else '_' + mode}"

    def run(x: Layer) -> Made:
        operands: dict[str, Operand] = {}
        read = oriented(x)
        if element not in ("float8_e4m3fn", "float4_e2m1fn"):  # one function rounds them all
            read = {site: read[site] for site in ("forward.inputs", "dgrad.weights")}
        for site, matrix in read.items():
            scale, data = to_mx(matrix, kind, 32, mode_of)
            operands[site] = rule, decoded(data).reshape(matrix.shape), get_fp_scale(scale).flatten()
        if element != "float8_e4m3fn" or mode not in ("floor", "rceil"):
            return operands, {}
        inputs, weight = x["x"].clone().requires_grad_(), x["weight"].clone().requires_grad_()
        y = _to_mxfp8_then_scaled_mm(inputs, weight, KernelPreference.EMULATED, mode_of)
        y.backward(x["errors"])
        return operands, {"y": y.detach(), "dx": inputs.grad, "dw": weight.grad}

    return run


def all_mx() -> Iterator[tuple[str, Recipe]]:
    for element in ("float8_e4m3fn", "float4_e2m1fn", "float8_e5m2", "float6_e3m2fn", "float6_e2m3fn"):
        for mode in ("floor", "ceil", "even", "rceil"):
            yield f"MX {element} {mode}", mx(element, mode)


def blocks_of_128() -> Recipe:
    """The plain functions beside torchao's blockwise kernels: 1x128 of inputs and errors, 128x128 of weights."""
    path = Path(importlib.import_module("torchao").__file__).parent / "prototype/blockwise_fp8_training/kernels.py"
    names = "torch_blockwise_scale_act_quant_lhs", "torch_blockwise_scale_weight_quant"
    peer = functions(path, *names, e4m3_dtype=E4M3, EPS=1e-12)

    def run(x: Layer) -> Made:
        operands: dict[str, Operand] = {}
        for site, matrix in oriented(x).items():
            square = site.endswith("weights")
            quantize = peer.torch_blockwise_scale_weight_quant if square else peer.torch_blockwise_scale_act_quant_lhs
            codes, reciprocal = quantize(matrix)
            rule = f"float8_e4m3fn@{'128x128' if square else '128'}@float32"
            operands[site] = rule + RECIPROCAL, codes.float(), reciprocal.flatten()
        return operands, {}

    return run


def int8() -> Recipe:
    from torchao.prototype.quantized_training.int8 import quantize_int8_rowwise

    def run(x: Layer) -> Made:
        operands: dict[str, Operand] = {}
        for site, matrix in oriented(x).items():
            codes, scale = quantize_int8_rowwise(matrix)
            operands[site] = "int8@row@float32" + RECIPROCAL, codes.float(), scale
        return operands, {}

    return run


def nvfp4_tensor() -> Recipe:
    """torchao's NVFP4Tensor, with two levels, 1x16 everywhere: what it does for inference."""
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    def run(x: Layer) -> Made:
        operands: dict[str, Operand] = {}
        for site, matrix in oriented(x).items():
            tensor_scale = per_tensor_amax_to_scale(matrix.abs().max())
            scales, data = nvfp4_quantize(matrix, 16, tensor_scale)
            codes = f4_unpacked_to_f32(unpack_uint4(data)).reshape(matrix.shape)
            operands[site] = "float4_e2m1fn@16@float8_e4m3fn", codes, scales.float().flatten()
        return operands, {}

    return run


def torchao(_: str) -> Iterator[tuple[str, Recipe]]:
    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        yield f"float8 {recipe}", float8_linear(recipe)
    yield from all_mx()
    yield "blocks of 128", blocks_of_128()
    yield "NVFP4Tensor", nvfp4_tensor()
    yield "int8", int8()


def torchao_checkout(checkout: str) -> Iterator[tuple[str, Recipe]]:
    """What changed after the release, MX, and what is not in it: a transcription of TransformerEngine's NVFP4."""
    yield from all_mx()
    path = Path(checkout) / "test/prototype/moe_training/nvfp4_training/nvfp4_reference.py"
    reference = loaded("nvfp4_reference", path)
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4

    def nvfp4(x: Layer) -> Made:
        operands: dict[str, Operand] = {}
        for site, matrix in oriented(of_bfloat16(x)).items():
            z = matrix
            if site.startswith("wgrad"):
                z = reference.reference_rht(matrix.t().contiguous().bfloat16()).float()
            square = site.endswith("weights")
            made = reference.nvfp4_reference_quantize(z, z.abs().max(), block="16x16" if square else "1x16")
            rule = f"float4_e2m1fn@{'16x16' if square else '16'}@float8_e4m3fn"
            codes = f4_unpacked_to_f32(unpack_uint4(made.codes))
            operands[site] = rule, codes.reshape(z.shape), made.block_scale.float().flatten()
        return operands, {}

    yield NVFP4, nvfp4


# ---------------------------------------------------------------------------------------------------------------------
# TransformerEngine


def transformer_engine(checkout: str) -> Iterator[tuple[str, Recipe]]:
    """Its quantizers of plain PyTorch, without the package around them, which wants its compiled part."""
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.custom_recipes"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(checkout, *name.split(".")))]
        sys.modules[name] = package
    stub("transformer_engine.pytorch.quantized_tensor", QuantizedTensorStorage=object, Quantizer=Quantizer)
    stub("transformer_engine.pytorch.tensor", __path__=[])
    stub("transformer_engine.pytorch.tensor.utils", is_custom=lambda *_: True)
    gemm = importlib.import_module("transformer_engine.pytorch.custom_recipes.gemm")
    current = importlib.import_module("transformer_engine.pytorch.custom_recipes.reference_current_scaling")
    nvfp4 = importlib.import_module("transformer_engine.pytorch.custom_recipes.reference_nvfp4")
    sys.path.insert(0, str(Path(checkout, "tests/pytorch")))
    blockwise = importlib.import_module("references.blockwise_quantizer_reference").BlockwiseQuantizerReference()
    test = Path(checkout, "tests/pytorch/test_mxfp8_2d_quantize.py")
    names = "_float_to_e8m0", "_e8m0_to_scale_inv", "_mxfp8_2d_quantize_reference"
    mxfp8 = functions(test, *names, FP8_E4M3_MAX=448.0, MXFP8_BLOCK_SIZE=32)

    def current_scaling(x: Layer) -> Made:
        operands: dict[str, Operand] = {}
        for site, matrix in oriented(x).items():
            dtype = E5M2 if site.endswith("errors") else E4M3
            quantizer = current.CurrentScalingQuantizerRef(dtype)
            codes, _, _, _ = quantizer._quantize(matrix)
            scale, _, _ = quantizer.compute_scale(matrix, dtype)
            operands[site] = f"{NAMED[dtype]}@tensor@float32", codes.float(), scale.flatten()
        return operands, {}

    def blocks(is_power: bool) -> Recipe:
        scale = "pow2" if is_power else "float32"

        def run(x: Layer) -> Made:
            operands: dict[str, Operand] = {}
            for site, matrix in oriented(x).items():
                tile = (128, 128) if site.endswith("weights") else (1, 128)
                made = blockwise.quantize(
                    matrix, E4M3, pow_2_scales=is_power, quant_tile_shape=tile, munge_scale_shapes=False
                )
                rule = f"float8_e4m3fn@{'128x128' if tile[0] > 1 else '128'}@{scale}"
                operands[site] = rule + RECIPROCAL, made.data.float(), made.scale.flatten()
            return operands, {}

        return run

    def mxfp8_lines(x: Layer) -> Made:
        operands: dict[str, Operand] = {}
        for site, matrix in oriented(x).items():
            groups = matrix.reshape(-1, 32)
            scale = mxfp8._e8m0_to_scale_inv(mxfp8._float_to_e8m0(groups.abs().amax(1)))
            codes = (groups / scale[:, None]).to(E4M3).float().reshape(matrix.shape)
            operands[site] = "float8_e4m3fn@32@e8m0_rceil", codes, scale
        return operands, {}

    def mxfp8_squares(x: Layer) -> Made:
        operands: dict[str, Operand] = {}
        for site, matrix in oriented(x).items():
            codes, scale, _ = mxfp8._mxfp8_2d_quantize_reference(matrix)
            scale = mxfp8._e8m0_to_scale_inv(scale[::32])
            operands[site] = "float8_e4m3fn@32x32@e8m0_rceil", codes.float(), scale.flatten()
        return operands, {}

    def nvfp4_recipe(x: Layer) -> Made:
        """Rounded to nearest: its own recipe rounds the errors stochastically."""
        x = of_bfloat16(x)
        e2m1 = importlib.import_module("transformer_engine.pytorch.custom_recipes.reference_utils").Fp4Formats.E2M1
        lines = nvfp4.NVFP4QuantizerRef(e2m1, quant_tile_shape=(1, 16), with_rht=True)
        squares = nvfp4.NVFP4QuantizerRef(e2m1, quant_tile_shape=(16, 16))
        made = {
            name: (squares if name == "weight" else lines).quantize(tensor.bfloat16()) for name, tensor in x.items()
        }
        operands: dict[str, Operand] = {}
        parts = {"wgrad.errors": "_t", "wgrad.inputs": "_t", "dgrad.weights": "_t"}  # what it keeps transposed
        for site, matrix in oriented(x).items():
            name, part = TENSORS[site.split(".")[1]], parts.get(site, "")
            codes = nvfp4.cast_from_fp4x2(getattr(made[name], f"data{part}"), torch.float32)
            z = lines._apply_rht(matrix.bfloat16()).float() if site.startswith("wgrad") else matrix
            codes = torch.where(z == 0, z, codes)  # it gives a negative zero a plus
            scale = getattr(made[name], f"scale{part}").float()
            scale = scale[::16] if name == "weight" else scale
            rule = f"float4_e2m1fn@{'16x16' if name == 'weight' else '16'}@float8_e4m3fn"
            operands[site] = rule, codes, scale.flatten()

        def product(kind: Any, a: str, b: str, part_a: str, part_b: str) -> Tensor:
            data = getattr(made[a], f"data{part_a}"), getattr(made[b], f"data{part_b}")
            scales = getattr(made[a], f"scale{part_a}"), getattr(made[b], f"scale{part_b}")
            of = {"gemm_type": kind, "qresult_x": made[a], "qresult_w": made[b]}
            return lines.qgemm(*data, gemm.MMParams(), torch.float32, *scales, **of)

        products = {
            "y": product(gemm.GEMMType.FPROP, "x", "weight", "", ""),
            "dx": product(gemm.GEMMType.DGRAD, "errors", "weight", "", "_t"),
            "dw": product(gemm.GEMMType.WGRAD, "errors", "x", "_t", "_t"),
        }
        return operands, products

    yield "current scaling", current_scaling
    yield "blocks of 128, float32 scales", blocks(False)
    yield "blocks of 128", blocks(True)
    yield RAGGED, blocks(True)
    yield "MXFP8", mxfp8_lines
    yield "MXFP8, 32x32", mxfp8_squares
    yield NVFP4, nvfp4_recipe


def constants_of_the_transform() -> dict[str, Any]:
    """TransformerEngine's signs and matrix for NVFP4's wgrad, a sign for each number, and what multiplies them."""
    nvfp4 = importlib.import_module("transformer_engine.pytorch.custom_recipes.reference_nvfp4")
    one = nvfp4.NVFP4QuantizerRef(None, quant_tile_shape=(1, 16), with_rht=True)._apply_rht(torch.eye(16))
    signs = nvfp4.get_wgrad_sign_vector()
    assert one.abs().unique().numel() == 1
    texts = ["".join("+" if number > 0 else "-" for number in row) for row in (signs, *one)]
    return {"signs": texts[0], "matrix": texts[1:], "factor": float(one.abs().max())}


class Quantizer:
    """What TransformerEngine's references need of their base class."""

    def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise_usage, self.columnwise_usage = rowwise, columnwise


# ---------------------------------------------------------------------------------------------------------------------
# Quartet


def quartet(checkout: str) -> Iterator[tuple[str, Recipe]]:
    """Its Triton kernel, run on the CPU by Triton's interpreter, without its transform: x times the identity."""
    os.environ["TRITON_INTERPRET"] = "1"
    kernel = loaded("mxfp4_triton", Path(checkout, "src/models/quantization/quantizers/mxfp4_triton.py"))
    kernel.mxfp4_forward_kernel = kernel.mxfp4_forward_kernel.fn  # not the search for the fastest block size
    one = torch.eye(32)

    def by(scale: str) -> Recipe:
        factor = 2.92247856 / 6.0 if scale == "quest" else 3 / 4

        def run(x: Layer) -> Made:
            operands: dict[str, Operand] = {}
            for site, matrix in oriented(x).items():
                values = torch.empty_like(matrix)
                kernel.mxfp4_forward_kernel[(matrix.numel() // 1024,)](
                    matrix, one, values, None, matrix.numel(), 32, 32, factor, False, 0, scale == "quest", 1024
                )
                values = torch.where(values == 0, torch.copysign(values, matrix), values)  # it gives zeros either sign
                operands[site] = f"float4_e2m1fn@32@{scale}{DECODED}", values, torch.ones(matrix.numel() // 32)
            return operands, {}

        return run

    yield "forward, without the transform", by("quest")
    yield "backward, without the transform", by("headroom")


# ---------------------------------------------------------------------------------------------------------------------


def tseng(checkout: str) -> Iterator[tuple[str, Recipe]]:
    """mxfp4-llm's patch of microxcaling, applied to CHECKOUT; its random numbers are all 1/2: to nearest, ties away."""
    sys.path.insert(0, checkout)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    elements = importlib.import_module("mx.elemwise_ops")
    quantize = importlib.import_module("mx.mx_ops")._quantize_mx
    halves = types.SimpleNamespace(**vars(torch))
    halves.rand_like = lambda x, **_: torch.full_like(x, 0.5)
    elements.torch = halves
    form = {"elem_format": "fp4_e2m1", "shared_exp_method": "max", "axes": [-1], "block_size": 32}

    def run(x: Layer) -> Made:
        operands: dict[str, Operand] = {}
        for site, matrix in oriented(x).items():
            values = quantize(matrix.clone(), 8, round="dither_scale", custom_cuda=False, **form)
            values = torch.where(values == 0, torch.copysign(values, matrix), values)
            operands[site] = f"float4_e2m1fn@32@headroom{DECODED}", values, torch.ones(matrix.numel() // 32)
        return operands, {}

    yield "3/4, to nearest, without the transform", run


PEERS = {
    "torchao": torchao,
    "torchao-checkout": torchao_checkout,
    "transformer-engine": transformer_engine,
    "quartet": quartet,
    "tseng": tseng,
}


def of_bfloat16(x: Layer) -> Layer:
    return {name: torch.from_numpy(as_bfloat16(tensor.numpy())) for name, tensor in x.items()}


def functions(path: Path, *names: str, **others: Any) -> types.SimpleNamespace:
    """Functions of a file that cannot be imported here, with the constants that they read."""
    body = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names]
    scope: dict[str, Any] = {"torch": torch, "Tuple": tuple, **others}
    exec(compile(ast.Module(body=body, type_ignores=[]), str(path), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def loaded(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stub(name: str, **content: Any) -> None:
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(content)
