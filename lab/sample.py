"""Text that a model makes up at the end of a run, character by character. Nothing of it flows into the run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from data import Data, Text
from low_precision.noise import Key
from quant import RunRounding
from settings.config import Config


@torch.no_grad()
def sampled(
    model: nn.Module, data: Data, rounding: RunRounding, config: Config, check: Callable[[], None] | None = None
) -> str:
    """config.sample characters, each drawn as probable as the model says, in evaluation and rounded as it is there.

    The model reads what it made up itself, behind a line end, or behind the text's first character where a text has no
    lines; that one is not told. Draws have a generator of their own, of the seed. check: called before each character.
    """
    assert isinstance(data, Text)
    generator = torch.Generator().manual_seed(Key.of(config.seed, "sample").value)
    device, line_end = data.train_x.device, data.symbols.find("\n")
    numbers = [line_end if line_end >= 0 else int(data.train_x[0])]
    model.eval()
    rounding.begin_aside()
    for _ in range(config.sample):
        if check:
            check()
        logits = model(torch.tensor([numbers[-data.context :]], device=device))  # (1, length, symbols)
        probabilities = logits[0, -1].double().softmax(0).cpu()
        numbers.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return "".join(data.symbols[number] for number in numbers[1:])
