"""The two calls around any plain model and torch optimizer: `quantize_model` and `quantize_optimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from low_precision.engines import choice
from low_precision.errors import SettingError
from low_precision.model import LowPrecision
from low_precision.rounding import AnyRounding, Overflow, Rounding, rounding_named
from low_precision.rules import Rule, Spec, rule_of
from low_precision.scheme import Scheme
from low_precision.torch_private import inside_compiled


def quantize_model(
    model: nn.Module,
    *,
    weights: Spec | None = None,
    inputs: Spec | None = None,
    activations: Spec | None = None,
    errors: Spec | None = None,
    accumulator: Spec | None = None,
    compensation: Spec | None = None,
    rounding: AnyRounding | str = Rounding.NEAREST,
    seed: int = 0,
    layers: Iterable[str] | None = None,
    overflow: Overflow | str = Overflow.SATURATE,
    backend: str = "auto",
) -> nn.Module:
    """Round what `model` computes with, from now on: the same model, in place, weights rounded at once.

    weights, ... compensation: for each site (docs/sites.md) how it is rounded, a text "FORMAT[:ROUNDING]", a Format
    or a Rule; None: not at all. An accumulator, a master copy of the weights for the optimizer, starts from the weights
    before they are rounded; a compensation keeps what their rounding cuts off for the next update. rounding: where a
    site names none. seed: of all stochastic rounding, that of the optimizer too. layers: name patterns of the modules
    to round, see LowPrecision.
    A layer or parameter that is added or replaced later: RuntimeError at the next forward pass or step, until
    quantize_model(model), without a site, takes it in. What is compiled or parallel is wrapped after, or before: both
    work, with the same noise. Raises ValueError for unknown names and a model that is rounded already, TypeError for
    parameters that are not float32.
    """
    sites = {"weights": weights, "inputs": inputs, "activations": activations, "errors": errors}
    rules = _rules(sites | {"accumulator": accumulator, "compensation": compensation}, rounding)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise SettingError("seed", repr(seed), "a whole number >= 0")
    choice.check(backend)
    plain = _unwrapped(model)
    low = getattr(plain, "low_precision", None)
    if not isinstance(low, LowPrecision):
        rounding = rounding_named(rounding) if isinstance(rounding, str) else rounding
        LowPrecision(plain, Scheme(rules, seed, Overflow(overflow), backend, rounding), layers)
    elif rules or layers is not None:
        raise ValueError("this model is rounded already: start from a new one, or give no site to take in new layers")
    else:
        low.extend()
    return model


def quantize_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    gradients: Spec | None = None,
    momentum: Spec | None = None,
    rounding: AnyRounding | str | None = None,
    loss_scale: float | str = 1.0,
) -> torch.optim.Optimizer:
    """Round what `optimizer` does to a model of `quantize_model`: the same optimizer, in place.

    Each step rounds the gradients, then the optimizer's state (momentum, moments), accumulator and weights; its
    state_dict holds accumulator, compensation and the count of steps, from which all noise follows. gradients,
    momentum: as the sites of quantize_model. rounding: the model's unless given. Parameters that are not the model's
    stay in float32.
    loss_scale: a number, or "dynamic" (LossScale): optimizer.loss_scale.scale(loss).backward().
    Several optimizers may share a model, with one fixed loss scale. Raises ValueError for a model or an optimizer that
    does not fit. With the backend qtorch, returns qtorch's OptimLP around the optimizer.
    """
    plain = _unwrapped(model)
    low = getattr(plain, "low_precision", None)
    if not isinstance(low, LowPrecision):
        raise ValueError("quantize_optimizer: this model is not rounded: call quantize_model(model, ...) first")
    of_model = {id(p) for p in plain.parameters()}
    if not any(id(p) in of_model for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("quantize_optimizer: the optimizer has no parameter of this model: make it from parameters()")
    rules = _rules({"gradients": gradients, "momentum": momentum}, rounding or low.scheme.rounding)
    return low.attach(optimizer, loss_scale, replace(low.scheme, rules=low.scheme.rules | rules))


def _rules(specs: Mapping[str, Spec | None], rounding: AnyRounding | str) -> dict[str, Rule]:
    """The rules of these sites; errors name the site."""
    rules = {}
    for site, spec in specs.items():
        try:
            if spec is not None:
                rules[site] = rule_of(spec, rounding)
        except SettingError as error:
            name = f"{site}: {error.setting}"
            raise SettingError(name, error.value, error.allowed, error.nearest, error.note) from None
        except TypeError as error:
            raise TypeError(f"{site}: {error}") from None
    return rules


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the parallel wrappers."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(model.module)
    inner = inside_compiled(model)
    return model if inner is None else _unwrapped(inner)
