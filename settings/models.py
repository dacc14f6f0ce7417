"""The models by name, what each reads, and their options: one text, NAME=VALUE,NAME=VALUE in the order of the names."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from low_precision.errors import SettingError, shown
from settings.errors import refused
from settings.kinds import Kind

if TYPE_CHECKING:
    from data import DataSet
    from settings.config import Config

# The models that models.MODELS builds, and what the last layer of each is named. In those with blocks, these are
# named blocks.0, blocks.1, ...
HEADS = {"linear": "linear", "mlp": "output", "cnn": "output", "resnet20": "fc", "vit": "head", "gpt": "head"}
MODEL_NAMES = tuple(HEADS)
IMAGE_MODELS = ("cnn", "resnet20", "vit")
TEXT_MODELS = ("gpt",)
BLOCK_MODELS = ("vit", "gpt")

Option = bool | int | float | str


def options_of(text: str) -> dict[str, Option]:
    """The options by name, each the value that its text stands for: true or false, a number, or else the text itself.

    SettingError for what is no NAME=VALUE, and for a name that stands there twice.
    """
    options: dict[str, Option] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (equals and name.isidentifier() and re.fullmatch(r"[^\s;]+", value)):
            raise SettingError(None, shown(part), "")
        if name in options:
            raise SettingError(None, shown(text), "", note=f" ({name} stands there twice)")
        options[name] = _value(value)
    return options


def _value(text: str) -> Option:
    if text in ("true", "false"):
        return text == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number) or "_" in text:
        return text
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _canonical(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    options = options_of(value)
    texts = {name: str(option).lower() if isinstance(option, bool) else str(option) for name, option in options.items()}
    return ",".join(f"{name}={texts[name]}" for name in sorted(texts))


OPTIONS = Kind("NAME=VALUE,NAME=VALUE: parameters of the model's function that have a default", _canonical)


def check_model(config: Config, spec: DataSet) -> None:
    """ConfigError for a model that does not read what the data set holds, as far as that is known, and for what is for
    text alone.
    """
    is_text, is_image = spec.task == "language", spec.shape is not None and len(spec.shape) == 3
    if spec.task and config.model_name in MODEL_NAMES:
        fitting = [name for name in MODEL_NAMES if (name in TEXT_MODELS) == is_text]
        fitting = [name for name in fitting if is_image or is_text or name not in IMAGE_MODELS]
        if config.model_name not in fitting:
            holds = "a text" if is_text else "no text" if config.model_name in TEXT_MODELS else "no images"
            raise refused("model", config.model, f"{', '.join(fitting)} ({config.dataset} holds {holds})")
    if is_text and config.scale_on != type(config).scale_on:
        raise refused("scale_on", config.scale_on, f"{type(config).scale_on} (a text is not scaled)")
    if config.sample and not is_text:
        raise refused("sample", config.sample, f"0 ({config.dataset} holds no text)")
