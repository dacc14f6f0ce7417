"""A run's rounding, from its settings; and what rounding makes of numbers: `python quant.py float8 0.3 1.1`.

`python quant.py --show float8` tells what a format can hold, and how far rounding to it goes wrong.

`from quant import quantize, quantize_model, quantize_optimizer` gives the calls of the library low_precision.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from low_precision import by_layer, quantize, quantize_model, quantize_optimizer
from low_precision.clock import BatchPart
from low_precision.errors import SettingError, shown
from low_precision.formats import BlockFormat, Format
from low_precision.loss_scale import LossScale
from low_precision.model import LowPrecision
from low_precision.rounding import Overflow, Rounding, is_random
from low_precision.rules import rule_of
from low_precision.scheme import Scheme
from low_precision.watcher import Watcher, watch
from settings.config import Config, ConfigError
from settings.stdout import show

__all__ = ["RunRounding", "quantize", "quantize_model", "quantize_optimizer", "round_run"]


class RunRounding:
    """The rounding of one run, around its model and its optimizer.

    optimizer: the one to step; with the backend qtorch it is qtorch's, around the plain one. watcher: hears what
    rounding loses, where somebody asked for that.
    """

    def __init__(self, low: LowPrecision, optimizer: torch.optim.Optimizer, watcher: Watcher | None = None) -> None:
        self._low, self.optimizer, self.watcher = low, optimizer, watcher

    @property
    def loss_scale(self) -> LossScale:
        return self._low.loss_scale

    def at(self, first_row: int, rows: int) -> None:
        """What passes next is these rows of the whole batch: noise does not depend on processes and micro-batches."""
        self._low.clock.begin_part(BatchPart(rows, first_row))

    def begin_aside(self) -> None:
        """What the model computes from now on is rounded with noise that does not depend on what it computed before.

        For what comes after the last step and is no part of the training.
        """
        self._low.clock.move_to(self._low.clock.step)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward() on."""
        return self._low.scale(loss)

    def unscale(self) -> bool:
        """Rounds the gradients and divides the loss scale out of them, before the step does, for what reads or changes
        them; whether that step will be skipped. Not with the backend qtorch.
        """
        self.loss_scale.unscale(self.optimizer)
        return self.optimizer.low_precision.overflowed  # type: ignore[attr-defined]

    def kept(self) -> list[Tensor]:
        """The accumulators, and what compensations hold."""
        return list(self._low.kept())


def round_run(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    over_processes: Callable[[bool], bool] | None = None,
) -> RunRounding:
    """Puts the rounding that `config` asks for around the model and its optimizer.

    over_processes: from whether an error overflowed in this process to whether one did in any; None for one process.
    ConfigError for a pattern of --layers or --site that matches nothing, and for rules that do not go together in a
    module: only the model knows its names.
    """
    check_names(config, model)
    scheme = Scheme(
        config.rules(),
        config.noise_seed,
        Overflow(config.overflow),
        config.backend,
        lines=config.lines(),
        transforms=config.transforms(),
        weights_only=config.recipe is not None,
        smallest_state=config.smallest_state,
    )
    try:
        low = LowPrecision(model, scheme, config.layers)
    except SettingError as error:
        raise ConfigError.of(error) from None
    optimizer = low.attach(optimizer, config.loss_scale)
    low.loss_scale.overflow.over_processes = over_processes
    watcher = watch(model, config.watch, config.watch_also) if config.watch else None
    return RunRounding(low, optimizer, watcher)


def check_names(config: Config, model: nn.Module) -> None:
    """ConfigError for a pattern of --layers or --site that matches none of the model's modules."""
    patterns = by_layer.patterns_of(config.layers)
    try:
        by_layer.check_patterns(model, patterns)
        by_layer.check_lines(model, config.lines(), patterns, setting="site")
    except SettingError as error:
        raise ConfigError.of(error) from None


def table(spec: str, numbers: Sequence[float], key: int = 0) -> str:
    """What `python quant.py` prints: each number, what it becomes, its neighbours in the format and the error.

    spec: FORMAT[:ROUNDING]. The numbers are one tensor: in a block format they share a scale. key: of random bits.
    SettingError for an unknown name.
    """
    rule = rule_of(spec)
    x = torch.tensor(list(numbers), dtype=torch.float64)
    x = x.float() if not isinstance(rule.format, Format) or rule.format.fits_float32 else x
    rounded = quantize(x, rule.format, rule.rounding, key)
    below, above = (quantize(x, rule.format, mode) for mode in (Rounding.DOWN, Rounding.UP))
    head = ["number", "rounded", "below", "above", "relative error"]
    head += ["probability of above"] if rule.rounding is Rounding.STOCHASTIC else []
    rows = [head]
    for value, result, low, high in zip(x.tolist(), rounded.tolist(), below.tolist(), above.tolist(), strict=True):
        error = f"{(result - value) / abs(value):+.2g}" if value and math.isfinite(value) else "-"
        row = [*(f"{number:.7g}" for number in (value, result, low, high)), error]
        if rule.rounding is Rounding.STOCHASTIC:
            row.append(f"{(value - low) / (high - low):.4g}" if low < high else "-")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    block = ", one tensor" if isinstance(rule.format, BlockFormat) else ""
    noise = f", key {key}" if is_random(rule.rounding) else ""
    lines = [f"{rule.format} ({rule.format.bits}), {rule.rounding}{noise}{block}"]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quant.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("format", metavar="FORMAT[:ROUNDING]", nargs="?", help="as --site takes it")
    parser.add_argument("numbers", metavar="NUMBER", nargs="*", help="what to round, from float32")
    parser.add_argument(
        "--show", metavar="FORMAT[:ROUNDING]", help="print its values, range and errors by magnitude, and exit"
    )
    parser.add_argument("--amax", help="with --show: the largest magnitude of a group that shares a scale [default: 1]")
    parser.add_argument("--key", default="0", help="a whole number: the key of the random bits [default: 0]")
    argv = sys.argv[1:] if argv is None else argv
    # With a space before it, argparse takes a number such as -1e-9 for a number, and not for a flag.
    words = [f" {word}" if word.startswith("-") and _is_number(word) else word for word in argv]
    arguments = parser.parse_args(words)
    if arguments.show is None and not arguments.numbers:
        parser.error("the following arguments are required: FORMAT[:ROUNDING] NUMBER ..., or --show FORMAT[:ROUNDING]")
    try:
        if arguments.show is not None:
            show(_shown(arguments))
            return 0
        if arguments.amax is not None:
            raise SettingError("--amax", shown(arguments.amax), "with --show alone")
        show(table(arguments.format, [_number(text) for text in arguments.numbers], _key(arguments.key.strip())))
    except SettingError as error:
        print(f"quant.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _shown(arguments: argparse.Namespace) -> str:
    """What --show prints. SettingError."""
    if arguments.format is not None:
        raise SettingError("--show", shown(arguments.format) + " beside it", "no numbers to round")
    from low_precision import format_pages  # which no run needs

    return format_pages.describe(rule_of(arguments.show), format_pages.amax_of(arguments.amax))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> float:
    if not _is_number(text):
        raise SettingError("NUMBER", shown(text), "a number")
    return float(text)


def _key(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**64):
        raise SettingError("--key", shown(text), "a whole number below 2**64")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
