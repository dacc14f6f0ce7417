"""Muon for the hidden matrices of a model and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lab.lean import lean

# The layers that multiply what comes from one layer on its way to the next; their matrices may be hidden ones.
_LAYERS = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_KINDS: dict[str, type[torch.optim.Optimizer]] = {"muon": torch.optim.Muon, "adamw": torch.optim.AdamW}


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The parameters that are Muon's: the matrices of linear, attention and recurrent layers, but not the head's.

    The head is the last linear layer of the model, in the order in which its modules were made. A matrix that is an
    embedding's too, as of a tied head, is none; nor are kernels of convolutions, which have more than two dimensions.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    others = [*linear[-1:], *(m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))]
    left_out = {p for module in others for p in module.parameters(recurse=False)}
    layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
    matrices = [p for layer in layers for p in layer.parameters(recurse=False) if p.ndim == 2 and p not in left_out]
    return list(dict.fromkeys(matrices))


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW, which each step their own groups of parameters.

    hidden, others: groups of parameters, each with its "weight_decay"; matrices alone in `hidden`. Both have the same
    learning rate, because Muon's updates are scaled to have the root mean square of AdamW's (its adjust_lr_fn
    "match_rms_adamw": Liu et al. 2025, arXiv:2502.16982). The Newton-Schulz iteration of Muon is in bfloat16, as torch
    has it. The state is that of one optimizer: momentum_buffer of Muon's parameters; exp_avg, exp_avg_sq of the others.
    """

    def __init__(
        self, hidden: Iterable[dict[str, Any]], others: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> None:
        muon = lean(torch.optim.Muon)(hidden, lr=lr, adjust_lr_fn="match_rms_adamw")  # type: ignore[call-arg]
        adamw = lean(torch.optim.AdamW)(others, lr=lr, betas=betas)  # type: ignore[call-arg]
        groups = [group | {"optimizer": "muon"} for group in muon.param_groups]
        groups += [group | {"optimizer": "adamw"} for group in adamw.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, kind in _KINDS.items():
            inspect.unwrap(kind.step)(self._part(name, kind))  # as it stands, without hooks of its own
        return loss

    def _part(self, name: str, kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """The optimizer of that name, of its groups and of the state of all: made for one step, so that nothing but
        this one has a state to save.
        """
        part = kind.__new__(kind)
        groups = [group for group in self.param_groups if group["optimizer"] == name]
        part.__dict__.update(defaults=self.defaults, state=self.state, param_groups=groups)
        return part
