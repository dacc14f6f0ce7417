"""How far two models have come apart, layer by layer: the distance of their weights, the angle of their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Row = dict[str, float | str | None]


def parameters_by_layer(model: nn.Module) -> dict[str, list[str]]:
    """The names of a model's parameters by the module that holds them, "" for the model itself; shared ones once."""
    layers: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers


@torch.no_grad()
def apart(model: nn.Module, reference: nn.Module, layers: dict[str, list[str]]) -> Tensor:
    """float64 (layers, 2), on the model's device: relative distance of weights, cosine of gradients; nothing waits.

    NaN where there is nothing to divide by: weights that are all zero, a gradient that is zero or not there.
    """
    ours, theirs = (dict(each.named_parameters()) for each in (model, reference))
    rows = []
    for names in layers.values():
        weights, of_reference = (_joined([each[name] for name in names]) for each in (ours, theirs))
        distance = (weights - of_reference).norm() / of_reference.norm()
        with_both = [name for name in names if ours[name].grad is not None and theirs[name].grad is not None]
        gradients = [_joined([each[name].grad for name in with_both]) for each in (ours, theirs)]
        first, second = (gradient / gradient.norm() for gradient in gradients)
        rows.append(torch.stack([distance, first @ second if with_both else distance * math.nan]))
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.float64)


def compare(model: nn.Module, reference: nn.Module) -> list[Row]:
    """How far `model` is from `reference`, a row for each module that holds parameters.

    Both have parameters of the same names and shapes; `reference` may be a copy of the model from before
    `quantize_model`, which is trained beside it on the same batches. A row has "layer", the module's full name;
    "weights_distance", the norm of the difference of all its parameters, weights and biases, over the norm of the
    reference's; "gradient_cosine", of the gradients that the two have at this moment, whatever factor a loss scale has
    left in them. None where there is none: weights that are all zero, a gradient that is zero, not there or not finite.
    ValueError where names or shapes differ.

        reference = copy.deepcopy(model)
        lp.quantize_model(model, products="nvfp4", seed=1)
        ...                                     # train both
        for row in lp.compare(model, reference):
            print(row["layer"], row["weights_distance"], row["gradient_cosine"])
    """
    shapes, reference_shapes = ({n: tuple(p.shape) for n, p in each.named_parameters()} for each in (model, reference))
    if different := sorted({name for name, _ in shapes.items() ^ reference_shapes.items()}):
        name = different[0]
        told = f"{shapes.get(name, 'nothing')} and {reference_shapes.get(name, 'nothing')}"
        raise ValueError(f"compare: given {name} of {told}, allowed: two models with the same parameters")
    layers = parameters_by_layer(model)
    return rows_of(list(layers), apart(model, reference, layers))


def rows_of(layers: list[str], numbers: Tensor) -> list[Row]:
    """What `apart` measured, as rows."""
    rows: list[Row] = []
    for layer, (distance, cosine) in zip(layers, numbers.tolist(), strict=True):
        row = {"weights_distance": distance, "gradient_cosine": cosine}
        rows.append({"layer": layer} | {name: x if math.isfinite(x) else None for name, x in row.items()})
    return rows


def _joined(tensors: Sequence[Tensor | None]) -> Tensor:
    """All their numbers in one row, float64."""
    rows = [tensor.detach().flatten().double() for tensor in tensors if tensor is not None]
    return torch.cat(rows or [torch.zeros(0, dtype=torch.float64)])
