"""Training in low precision: number formats, rounding, and rounding around any PyTorch model and optimizer.

    import low_precision as lp

    lp.quantize(x, "float8", "stochastic", key=7)
    lp.quantize_model(model, weights="float8", inputs="float8", activations="float8", errors="float8", seed=1)
    lp.quantize_optimizer(optimizer, model, gradients="float8", momentum="float16:nearest", loss_scale="dynamic")

The names are loaded on first use: importing this package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from low_precision.apart import compare as compare
    from low_precision.collage import CollageAdamW as CollageAdamW
    from low_precision.errors import SettingError as SettingError
    from low_precision.formats import BlockFormat as BlockFormat
    from low_precision.formats import Format as Format
    from low_precision.formats import format_named as format_named
    from low_precision.layers import LayerRounding as LayerRounding
    from low_precision.loss_scale import LossScale as LossScale
    from low_precision.losses_report import Report as Report
    from low_precision.losses_report import report as report
    from low_precision.model import LowPrecision as LowPrecision
    from low_precision.noise import Key as Key
    from low_precision.noted import Coverage as Coverage
    from low_precision.recipe import Recipe as Recipe
    from low_precision.recipes import RECIPES as RECIPES
    from low_precision.rounding import FewBits as FewBits
    from low_precision.rounding import Overflow as Overflow
    from low_precision.rounding import Rounding as Rounding
    from low_precision.rounding import rounding_named as rounding_named
    from low_precision.rules import OPERANDS as OPERANDS
    from low_precision.rules import SITES as SITES
    from low_precision.rules import Line as Line
    from low_precision.rules import Rule as Rule
    from low_precision.rules import rule_of as rule_of
    from low_precision.scales import Scaling as Scaling
    from low_precision.scheme import Scheme as Scheme
    from low_precision.tables import Table as Table
    from low_precision.tensor import quantize as quantize
    from low_precision.watcher import Watcher as Watcher
    from low_precision.watcher import watch as watch
    from low_precision.wrap import Quantize as Quantize
    from low_precision.wrap import coverage as coverage
    from low_precision.wrap import plain_copy as plain_copy
    from low_precision.wrap import quantize_model as quantize_model
    from low_precision.wrap import quantize_optimizer as quantize_optimizer
    from low_precision.wrap import remove as remove
    from low_precision.wrap import unquantized as unquantized

_HOMES = {
    "BlockFormat": "formats",
    "CollageAdamW": "collage",
    "Coverage": "noted",
    "FewBits": "rounding",
    "Format": "formats",
    "Key": "noise",
    "LayerRounding": "layers",
    "Line": "rules",
    "LossScale": "loss_scale",
    "LowPrecision": "model",
    "OPERANDS": "rules",
    "Overflow": "rounding",
    "Quantize": "wrap",
    "RECIPES": "recipes",
    "Recipe": "recipe",
    "Report": "losses_report",
    "Rounding": "rounding",
    "Rule": "rules",
    "SITES": "rules",
    "Scaling": "scales",
    "Scheme": "scheme",
    "SettingError": "errors",
    "Table": "tables",
    "Watcher": "watcher",
    "compare": "apart",
    "coverage": "wrap",
    "format_named": "formats",
    "plain_copy": "wrap",
    "quantize": "tensor",
    "quantize_model": "wrap",
    "quantize_optimizer": "wrap",
    "remove": "wrap",
    "report": "losses_report",
    "rounding_named": "rounding",
    "rule_of": "rules",
    "unquantized": "wrap",
    "watch": "watcher",
}

__all__ = list(_HOMES)
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """A public name, from its home; it stays here afterwards."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
