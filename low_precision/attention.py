"""Attention, told in plain PyTorch, so that each of its two products can have rounded operands.

scores = scale * q k^T + mask, p = softmax(scores), y = p v. The operands of the products `scores` and `values` are
inputs; the result is an activation; scores and p, which hardware keeps inside a kernel, are `elementwise`. The scores
take (queries x keys) numbers of memory for each head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from low_precision import torch_private
from low_precision.calls import Call
from low_precision.forms import Matmul

SCORES, VALUES = "scores", "values"
_REPEATED = ("bmm", "baddbmm")  # by which torch.nn.functional.multi_head_attention_forward multiplies for its weights


def scaled_dot_product_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: query (..., L, E), key (..., S, E), value (..., S, V)."""
    if is_causal and attn_mask is not None:  # torch's own error
        return call.native(query, key, value, attn_mask, dropout_p, is_causal)  # type: ignore[no-any-return]
    query, key, value = (call.inputs(x) for x in (query, key, value))
    if not call.is_retold(query, key, value):
        settings = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        y = call.native(query, key, value, **settings, enable_gqa=enable_gqa)
        call.note_kernel(SCORES, ["inputs", "inputs"], query, key)
        call.note_kernel(VALUES, ["inputs", "inputs"], None, value)
        return call.activations(y)
    if enable_gqa:
        key, value = (call.same(x, x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)) for x in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = call.elementwise(_product(call, SCORES, query, key.mT) * factor, ":scores")
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -math.inf)
    if attn_mask is not None:
        scores = _masked(call, scores, attn_mask)
    weights = torch.softmax(scores, -1)
    # A query that may look at nothing has weights of zero, as in torch.
    weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    weights = call.elementwise(weights, ":softmax")
    if dropout_p > 0:
        weights = call.elementwise(F.dropout(weights, dropout_p), ":dropout")
    return call.activations(_product(call, VALUES, weights, value))


def _product(call: Call, name: str, a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices of their own; leading dimensions are broadcast."""
    shape = torch_private.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    wide_a, wide_b = a.expand(*shape, *a.shape[-2:]), b.expand(*shape, *b.shape[-2:])
    return call.multiply(name, wide_a, wide_b, None, Matmul(len(shape)))


def _masked(call: Call, scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return call.elementwise(scores + mask, ":mask", infinite=mask)


def multi_head_attention_forward(call: Call, *arguments: Any, **named: Any) -> Any:
    """torch's own function, whose calls of other functions are seen."""
    frame = call.frame
    # Where it gives its weights, it multiplies twice: first for the scores, then by the values.
    before, frame.attention = frame.attention, [SCORES, VALUES]
    try:
        with call.mode:
            return _told_by_torch()(*arguments, **named)
    finally:
        frame.attention = before


@functools.cache
def _told_by_torch() -> Callable[..., Any]:
    return torch_private.without_mode_check(F.multi_head_attention_forward)


def scores(call: Call, *arguments: Tensor) -> Tensor:
    """torch.bmm(q, k^T), or torch.baddbmm(mask, q, k^T); q is scaled before."""
    query, key = (call.inputs(x) for x in arguments[-2:])
    result = _product(call, SCORES, query, key)
    if len(arguments) == 2:
        return call.elementwise(result, ":scores")
    return call.elementwise(result + arguments[0], ":scores", infinite=arguments[0])


def values(call: Call, weights: Tensor, value: Tensor) -> Tensor:
    """torch.bmm(p, v)."""
    return call.activations(_product(call, VALUES, weights, call.inputs(value)))


def part_of(attention: list[str], function: str) -> Callable[..., Tensor] | None:
    """What computes the next product of multi_head_attention_forward, where this function is to do it."""
    if function not in _REPEATED or not attention:
        return None
    return scores if attention.pop(0) == SCORES else values
