"""The names of torch's functions, one for all ways to write the same (`a @ b`, torch.matmul), and their kinds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# All functions of torch with matrix products.
PRODUCT_NAMES = frozenset(
    [
        *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "convolution", "conv_tbc"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("matmul", "mm", "mv", "dot", "vdot", "inner", "bmm", "chain_matmul"),
        *("addmm", "addmv", "addbmm", "baddbmm", "multi_dot", "vecdot", "tensordot", "einsum", "rmatmul"),
        *("grouped_mm", "scaled_mm", "scaled_grouped_mm", "foreach_mm", "int_mm", "linear_cross_entropy"),
        *("sparse_mm", "sparse_addmm", "smm", "spmm", "dsmm", "hsmm", "hspmm", "saddmm", "sspaddmm"),
        *("scaled_dot_product_attention", "multi_head_attention_forward"),
        *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    ]
)
# Functions that compute no numbers, by name: they make views and copies, choose, fill, or count.
_MOVING = frozenset(
    [
        *("view", "reshape", "view_as", "reshape_as", "transpose", "swapaxes", "swapdims", "permute", "movedim", "t"),
        *("moveaxis", "adjoint", "unbind", "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit"),
        *("dsplit", "select", "narrow", "squeeze", "unsqueeze", "flatten", "unflatten", "ravel", "expand", "expand_as"),
        *("broadcast_to", "broadcast_tensors", "contiguous", "clone", "detach", "alias", "to", "type", "type_as"),
        *("float", "half", "bfloat16", "double", "cpu", "cuda", "pin_memory", "copy", "index_select", "gather", "take"),
        *("take_along_dim", "masked_select", "getitem", "setitem", "cat", "concat", "concatenate", "stack", "hstack"),
        *("vstack", "dstack", "column_stack", "row_stack", "block_diag", "pad", "constant_pad_nd", "roll", "flip"),
        *("fliplr", "flipud", "rot90", "repeat", "repeat_interleave", "tile", "tril", "triu", "where", "masked_fill"),
        *("masked_scatter", "index_copy", "index_fill", "diag", "diagonal", "diag_embed", "diagflat", "as_strided"),
        *("select_scatter", "slice_scatter", "diagonal_scatter", "pixel_shuffle", "pixel_unshuffle", "unfold"),
        *("channel_shuffle", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d", "real", "imag", "set", "resize"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like", "fill"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zero", "normal", "uniform", "bernoulli"),
        *("random", "exponential", "requires_grad", "retain_grad", "register_hook", "backward", "get", "data"),
        *("pack_padded_sequence", "pad_packed_sequence", "lazy_clone", "as_subclass", "resolve_conj", "resolve_neg"),
        *("deepcopy", "reduce_ex", "tolist", "item", "numpy", "apply", "map"),
        "histc",  # whole numbers, by which tokens are handed out to experts
    ]
)
# Losses that have no "loss" in their names.
_LOSSES = frozenset(["cross_entropy", "kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits"])


def name_of(function: Callable[..., Any]) -> str:
    """Of linalg_vecdot, mm.default (in torch.ops), _grouped_mm, __matmul__ and addmm_ the word that counts."""
    return getattr(function, "__name__", "").partition(".")[0].removeprefix("linalg_").strip("_")


@functools.cache
def multiplies(function: Callable[..., Any]) -> bool:
    """Whether a function has matrix products: those of torch, and kernels of attention, of other packages too."""
    name = name_of(function)
    return name in PRODUCT_NAMES or "attention" in name or "attn" in name


@functools.cache
def computes(function: Callable[..., Any]) -> bool:
    """Whether a function computes numbers that the site rounds."""
    name = name_of(function)
    return not (name in _MOVING or name in _LOSSES or "loss" in name)
