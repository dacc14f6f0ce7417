"""The recipes of this field: how each operand of a layer's three products is rounded, and what else is. No torch here.

A recipe of operands says what products read, and sets no stored site: parameters are the float32 master copy, results
are float32. It reaches products with a weight alone (Linear, convolutions, and functions with a weight); products of
two inputs, as in attention, stay as they are. Other recipes say how tensors are stored. A new one is a row of
`RECIPES`, in this file or at run time: RECIPES["mine"] = Recipe("mine", ...).
"""

from __future__ import annotations

from typing import Any

from low_precision.errors import SettingError, nearest, shown, wrong_type
from low_precision.recipe import Recipe
from low_precision.rules import ALL_SITES, OPERANDS


def recipe_of(recipe: Recipe | str) -> Recipe:
    """The recipe of that name, or the one that is passed. SettingError for a name that is not known, TypeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise wrong_type("recipe", recipe, "a recipe's name, or a Recipe")
    if recipe not in RECIPES:
        raise SettingError("recipe", shown(recipe), ", ".join(RECIPES), nearest(recipe, RECIPES))
    return RECIPES[recipe]


def _all(rule: str) -> dict[str, str]:
    return dict.fromkeys(OPERANDS, rule)


def _once(inputs: str, weights: str, errors: str) -> dict[str, str]:
    """Each of the three tensors is rounded once, and both products that read it read the same numbers."""
    return {
        "forward.inputs": inputs,
        "forward.weights": weights,
        "dgrad.errors": errors,
        "dgrad.weights": "forward.weights",
        "wgrad.errors": "dgrad.errors",
        "wgrad.inputs": "forward.inputs",
    }


_TE = "TransformerEngine d0067d0 (2026-08)"
_AO = "torchao 0.18"
_E4M3, _E5M2, _FP4 = "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"
_HEAD: dict[str, Any] = {"wider": "the head, the embedding, norms and attention's products"}
_HEAD |= {"wider_sites": ("head/*=float32",)}
_BF16 = "--precision bfloat16 --quantize inputs,activations,errors"


def _quartet(rounding: str = "") -> dict[str, str]:
    forward, back = f"{_FP4}@32@quest", f"{_FP4}@32@headroom{rounding}"
    return {
        "forward.inputs": forward,
        "forward.weights": forward,
        "dgrad.errors": back,
        "dgrad.weights": f"forward.weights>{back}",
        "wgrad.errors": back,
        "wgrad.inputs": f"forward.inputs>{back}",
    }


_QUARTET = {"forward": "hadamard32", "dgrad": "hadamard32:random", "wgrad": "hadamard32:random"}
_QUARTET_DIFFERS = (
    "the repository rounds ties of the forward product toward zero, and draws the signs once for both products on the"
    " way back"
)

_ROWS = (
    Recipe(
        "te-current",
        "FP8 with one scale a tensor, from the tensor itself: E4M3 forward, E5M2 errors",
        "Micikevicius et al. 2022, arXiv:2209.05433",
        f"code: {_TE}, Float8CurrentScaling with Format.HYBRID",
        operands=_once(f"{_E4M3}@tensor", f"{_E4M3}@tensor", f"{_E5M2}@tensor"),
        **_HEAD,
        claim="FP8 ends at bfloat16's loss with bfloat16's hyper-parameters; contradicted by a gap to bfloat16 beyond"
        " the spread of the seeds",
    ),
    Recipe(
        "te-delayed",
        "FP8 with one scale a tensor, from its largest magnitude in the last 1024 steps",
        "Micikevicius et al. 2022, arXiv:2209.05433",
        f"code: {_TE}, DelayedScaling with amax_history_len=1024, amax_compute_algo=max",
        operands=_once(f"{_E4M3}@tensor@delayed1024", f"{_E4M3}@tensor@delayed1024", f"{_E5M2}@tensor@delayed1024"),
        **_HEAD,
        claim="scales of earlier steps are as good as the tensor's own; contradicted by a higher loss than"
        " te-current's, above all after a jump of the activations",
    ),
    Recipe(
        "ao-tensorwise",
        "FP8 with one scale a tensor; the operands are te-current's",
        "torchao float8, recipe tensorwise",
        f"code: {_AO}",
        operands=_once(f"{_E4M3}@tensor", f"{_E4M3}@tensor", f"{_E5M2}@tensor"),
        **_HEAD,
        claim="of torchao's three float8 recipes the fastest and the least accurate; contradicted by a lower loss than"
        " ao-rowwise's",
    ),
    Recipe(
        "ao-rowwise",
        "E4M3 for all six, the errors too, a scale for each row along the sum, which is a power of two",
        "torchao float8, recipe rowwise",
        f"code: {_AO}",
        operands=_all(f"{_E4M3}@row@pow2"),
        **_HEAD,
        claim="more accurate than ao-tensorwise; contradicted by a higher loss than ao-tensorwise's",
        differs="torchao finds the power of two by a rounded logarithm, which is twice as large for a few scales just"
        " below a power of two",
    ),
    Recipe(
        "ao-rowwise-gw-hp",
        "ao-rowwise, with the weight's gradient in high precision",
        "torchao float8, recipe rowwise_with_gw_hp",
        f"code: {_AO}",
        operands={
            "forward.inputs": f"{_E4M3}@row@pow2",
            "forward.weights": f"{_E4M3}@row@pow2",
            "dgrad.errors": f"{_E4M3}@row@pow2",
            "dgrad.weights": f"{_E4M3}@tensor@pow2",
        },
        **_HEAD,
        claim="the most accurate of torchao's three float8 recipes; contradicted by a higher loss than ao-rowwise's",
        differs="as ao-rowwise",
    ),
    Recipe(
        "deepseek",
        "E4M3 for all six: tiles of 1x128 along the sum for inputs and errors, blocks of 128x128 for weights",
        "DeepSeek-V3 2024, arXiv:2412.19437, section 3.3",
        f"code: {_AO}, blockwise_fp8_training: float32 scales, each tile from the unrounded tensor",
        operands={
            "forward.inputs": f"{_E4M3}@128",
            "forward.weights": f"{_E4M3}@128x128",
            "dgrad.errors": f"{_E4M3}@128",
            "dgrad.weights": "forward.weights",
            "wgrad.errors": f"{_E4M3}@128",
            "wgrad.inputs": f"{_E4M3}@128",
        },
        wider="the head, the embedding, norms, attention's products and gates of experts; moments in bfloat16"
        " (--site momentum=bfloat16)",
        wider_sites=("head/*=float32",),
        claim="the loss is within 0.25 % of bfloat16's; contradicted by a larger relative gap, or by one scale a"
        " tensor that does as well",
        differs="the paper's wgrad reads the numbers of the forward product, in tiles of its own"
        f" (--site 'wgrad.inputs=forward.inputs>{_E4M3}@128'); TransformerEngine's scales are powers of two (@pow2);"
        " the matrix unit's sums keep about 14 bits",
    ),
    Recipe(
        "mxfp8",
        "E4M3 in blocks of 32 along the sum, each operand from the unrounded tensor; the scale is rounded up",
        "Mishra et al. 2025, arXiv:2506.08027",
        f"paper, as {_TE} and {_AO} (RCEIL) have it",
        operands=_all(f"{_E4M3}@32@e8m0_rceil"),
        **_HEAD,
        claim="with the scale rounded up, E4M3 for all six ends at bfloat16's loss, with OCP's floor it ends higher or"
        " diverges; contradicted by a floor (--site products=mxfp8_e4m3) that does as well",
        differs="the format mxfp8_e4m3 is OCP's, whose scale is rounded down, so that the largest number of a block may"
        " saturate: this recipe does not use it",
    ),
    Recipe(
        "nvfp4",
        "4 bits for all six: blocks of 16, squares of 16x16 for weights, errors stochastically, a Hadamard transform in"
        " wgrad",
        "NVIDIA 2025, arXiv:2509.25149",
        f"code: {_TE}, NVFP4BlockScaling: 8 random bits a number, its fixed signs",
        operands={
            "forward.inputs": "nvfp4",
            "forward.weights": f"{_FP4}@16x16@{_E4M3}",
            "dgrad.errors": "nvfp4:stochastic:8",
            "dgrad.weights": "forward.weights",
            "wgrad.errors": "nvfp4:stochastic:8",
            "wgrad.inputs": "nvfp4",
        },
        transforms={"wgrad": "hadamard16:fixed:bfloat16"},
        wider="the first two and the last eight blocks of 12B (the last four are enough in an ablation), the head, the"
        " embedding, norms and attention's products",
        wider_sites=("head/*=float32", "blocks.0/*=float32", "blocks.11/*=float32"),
        claim="the loss is within 1.5 % of FP8's, and each of stochastic errors, the transform in wgrad, squares for"
        " weights and wider blocks is needed; contradicted by a run without one of them that does as well",
        differs=f"all that TransformerEngine reads is bfloat16 ({_BF16}); it multiplies by the two tensors' scales at"
        " the end of a product",
    ),
    Recipe(
        "mxfp4-rht",
        "MXFP4 in the backward pass alone, stochastically of 3/4 x, after a Hadamard transform with fresh signs;"
        " forward in float32",
        "Tseng et al. 2025, arXiv:2502.20586",
        "code: mxfp4-llm 0cc57fe, mode 3",
        operands=dict.fromkeys(OPERANDS[2:], f"{_FP4}@32@headroom:stochastic"),
        transforms={"dgrad": "hadamard64:random", "wgrad": "hadamard64:random"},
        **_HEAD,
        claim="with transform and stochastic rounding there is minimal loss against bfloat16, and without either there"
        " is more; contradicted by plain MXFP4 (--transform none --site products=mxfp4) that does as well",
    ),
    Recipe(
        "quartet",
        "MXFP4 for all six: forward by the deviation of a block, after a fixed Hadamard transform; back to nearest of"
        " 3/4 x, after one with fresh signs, from the numbers that the forward product read",
        "Castro et al. 2025, arXiv:2505.14669",
        "paper, the NeurIPS 2025 version, algorithm 1",
        operands=_quartet(),
        transforms=_QUARTET,
        **_HEAD,
        claim="backward, nearest is no worse than stochastic rounding (efficiency of data 0.93 and 0.88);"
        " contradicted by --recipe quartet-sr that ends lower",
        differs=_QUARTET_DIFFERS,
    ),
    Recipe(
        "quartet-sr",
        "quartet, with the errors and what they meet rounded stochastically",
        "Castro et al. 2025, arXiv:2505.14669",
        "code: Quartet 00ccd38, main_setup.sh, and the paper's first draft",
        operands=_quartet(":stochastic"),
        transforms=_QUARTET,
        **_HEAD,
        claim="backward, stochastic rounding is better than nearest, which the authors have withdrawn; contradicted by"
        " --recipe quartet that ends lower",
        differs=f"{_QUARTET_DIFFERS}; its signs turn the rotated numbers, not what is rotated",
    ),
    Recipe(
        "int8",
        "INT8 for all six, a scale for each row along the sum",
        "torchao, int8_mixed_precision_training",
        f"code: {_AO}",
        operands=_all("int8@row"),
        **_HEAD,
        claim="the loss is bfloat16's (2.90 and 2.97 of a 1B Llama on C4); contradicted by a gap beyond the spread"
        " of the seeds",
        differs="torchao's integers go down to -128, which no scale of a largest magnitude reaches",
    ),
    Recipe(
        "switchback",
        "INT8 forward and for the input's gradient; the weight's gradient in high precision",
        "Wortsman et al. 2023, arXiv:2304.13013",
        operands={
            "forward.inputs": "int8@row",
            "forward.weights": "int8@tensor",
            "dgrad.errors": "int8@row",
            "dgrad.weights": "forward.weights",
        },
        wider="wgrad in 16 bits (--site wgrad.errors=bfloat16 --site wgrad.inputs=bfloat16); the head, the embedding"
        " and norms",
        wider_sites=("head/*=float32",),
        claim="wgrad, whose sum runs over all rows of the batch, is what 8 bits spoil; contradicted by INT8 there"
        " (--site wgrad.errors=int8@row --site wgrad.inputs=int8@row) that does as well, for many rows too",
    ),
    Recipe(
        "jetfire",
        "INT8 in squares of 32x32, which serve both products that read a tensor; errors stochastically",
        "Xi et al. 2024, arXiv:2403.12422",
        "code: Jetfire 5556355",
        operands=_once("int8@32x32", "int8@32x32", "int8@32x32:stochastic"),
        **_HEAD,
        claim="accuracy is 16-bit training's, and squares beat one scale a tensor or a row; contradicted by --recipe"
        " int8 that does as well",
        differs="scales in half precision; what lies between layers is INT8 too, the inner gradients stochastically",
    ),
    Recipe(
        "unit-scaling",
        "FP8 without any scale: each tensor cast once, stochastically; the casts alone",
        "Blake et al. 2023, arXiv:2303.11257",
        "code: unit-scaling a7b5b3c, simulate_fp8, whose largest E4M3 number is 240",
        operands=_once("float8_e4m3fnuz:stochastic", "float8_e4m3fnuz:stochastic", "float8_e5m2fnuz:stochastic"),
        wider="all but the inputs of Linear layers and of attention",
        claim="a model whose numbers have the deviation 1 needs no scales; contradicted by flushed or saturated"
        " numbers in such a model",
        differs="the factors that bring each tensor to the deviation 1, which belong to the model; casts of q, k and v",
    ),
    Recipe(
        "adam8bit",
        "Adam's two moments in 8 bits, with a table of numbers and a scale for each 256",
        "Dettmers et al. 2022, arXiv:2110.02861",
        "code: bitsandbytes 95f9af3 (blocks of 256; the paper has 2048)",
        states={"momentum.exp_avg": "dynamic8@flat256", "momentum.exp_avg_sq": "dynamic8u@flat256"},
        smallest_state=4096,
        wider="the states of embeddings",
        claim="it ends where Adam in 32 bits ends, and a linear table for the second moment diverges; contradicted by a"
        " gap to Adam",
        differs="bitsandbytes on a GPU keeps the sign of a first moment that becomes zero",
    ),
    Recipe(
        "coat",
        "both moments of AdamW in E4M3, each group of 128 with its range expanded",
        "Xi et al. 2024, arXiv:2410.19313",
        "code: COAT 80ec99f, its optimizer alone",
        states=dict.fromkeys(("momentum.exp_avg", "momentum.exp_avg_sq"), f"{_E4M3}@flat128@expand"),
        claim="the expansion makes the error of an update 1.6 times smaller than E4M3 without it; contradicted by the"
        " same loss with --site momentum.exp_avg_sq=float8_e4m3fn@flat128",
        differs="activations in FP8: its Linear layers read E4M3 with one scale a tensor, as te-current",
    ),
    # How tensors are stored, everywhere.
    Recipe(
        "collage-plus",
        "bfloat16 to nearest everywhere; each weight and each second moment is the sum of two bfloat16 numbers",
        "Yu et al. 2024, arXiv:2405.03637",
        "paper; its code multiplies a pair in place, so that its second moments do not decay",
        sites=dict.fromkeys(ALL_SITES[:4], "bfloat16"),
        states=dict.fromkeys(ALL_SITES[4:], "bfloat16"),
        claim="it ends where a float32 master copy ends, and bfloat16 to nearest does not; contradicted by a gap to"
        " --recipe bfloat16 --site accumulator=float32",
        differs="from Python, the optimizer that keeps the pairs: lp.CollageAdamW",
    ),
    Recipe(
        "qtorch-tutorial",
        "1-5-2 to nearest everywhere, momentum and an accumulator in 1-6-9 stochastically, loss scale 1000",
        "Wang et al. 2018, arXiv:1812.08011",
        "code: QPyTorch's CIFAR10_Low_Precision_Training_Example.ipynb",
        sites={**dict.fromkeys(ALL_SITES[:4], "float8"), "accumulator": "float16:stochastic"},
        states={"gradients": "float8", "momentum": "float16:stochastic"},
        loss_scale=1000.0,
    ),
    Recipe(
        "ocp-fp8",
        "E4M3 weights, inputs and activations, E5M2 errors and gradients, a float32 master copy of the weights; one"
        " loss scale in place of a scale for each tensor",
        "Micikevicius et al. 2022, arXiv:2209.05433",
        sites={**dict.fromkeys(ALL_SITES[:3], _E4M3), "errors": _E5M2, "accumulator": "float32"},
        states={"gradients": _E5M2},
        loss_scale=1024.0,
    ),
    Recipe(
        "bfloat16",
        "bfloat16 to nearest everywhere, without a master copy",
        "Zamirai et al. 2020, arXiv:2010.06192: its baseline, nearest rounding",
        sites=dict.fromkeys(ALL_SITES[:4], "bfloat16"),
        states=dict.fromkeys(ALL_SITES[4:], "bfloat16"),
        claim="updates below half a spacing of a weight are lost; contradicted by float32's loss",
    ),
    Recipe(
        "bfloat16-stochastic",
        "bfloat16 to nearest, the weights stochastically",
        "Zamirai et al. 2020, arXiv:2010.06192: stochastic rounding of the weight updates",
        sites={**dict.fromkeys(ALL_SITES[:4], "bfloat16"), "weights": "bfloat16:stochastic"},
        states=dict.fromkeys(ALL_SITES[4:], "bfloat16"),
        claim="the loss is float32's; contradicted by a gap beyond the spread of the seeds",
    ),
    Recipe(
        "bfloat16-kahan",
        "bfloat16 to nearest everywhere, and what the weights' rounding cuts off is added to the next update",
        "Zamirai et al. 2020, arXiv:2010.06192: Kahan summation of the weight updates",
        sites={**dict.fromkeys(ALL_SITES[:4], "bfloat16"), "compensation": "bfloat16"},
        states=dict.fromkeys(ALL_SITES[4:], "bfloat16"),
        claim="the loss is float32's; contradicted by a gap beyond the spread of the seeds",
    ),
    Recipe(
        "swalp",
        "8-bit block floating point, stochastically, everywhere, and the weights of the last half of the epochs"
        " averaged in float32",
        "Yang et al. 2019, arXiv:1904.11943",
        sites=dict.fromkeys(ALL_SITES[:4], "bfp8_row:stochastic"),
        states=dict.fromkeys(ALL_SITES[4:], "bfp8_row:stochastic"),
        claim="the average of weights takes the noise of their rounding away; contradicted by an average that is no"
        " better than the last weights",
    ),
)

RECIPES: dict[str, Recipe] = {row.name: row for row in _ROWS}
