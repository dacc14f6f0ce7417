"""Whether a model fits its data and the settings its modules: asked before anything is recorded."""

from __future__ import annotations

import torch
from torch import nn

import models
import quant
from data import CONTEXT, DATASETS, DataSet, Text, check_context, spec_of
from lab.batches import Batches
from lab.console import in_a_line
from lab.draws import draws_kept
from settings.config import MODEL_NAMES, Config, refused
from settings.config import shown_value as shown


def check_before_loading(config: Config) -> None:
    """What a model of ours says of its options and of patterns of --layers and --site: before a set is downloaded.

    Nothing is asked where only loading tells what a sample is. ConfigError for what does not fit.
    """
    spec = spec_of(config.placed(config.dataset))
    context = config.options.get("context", CONTEXT)
    if spec.text:
        check_context(context)
    shape = (context,) if spec.text else spec.shape
    if config.model_name in MODEL_NAMES and shape is not None:
        with torch.random.fork_rng([]):  # not on the device "meta", where drawing weights imports torch's compiler
            model = models.build(config.model_name, shape, spec.outputs or 1, config.seed, config.options)
        quant.check_names(config, model)


def check_fit(config: Config, model: nn.Module, batches: Batches, spec: DataSet) -> None:
    """One pass of the first rows through the model, in its evaluation mode; no random number is used up.

    Of our own models on our own sets nothing is asked. ConfigError for what gives no output of the right shape; what a
    model of somebody's own raises is raised.
    """
    if config.dataset in DATASETS and config.model_name in MODEL_NAMES:
        return
    data, processes = batches.data, batches.processes
    count = data.windows if isinstance(data, Text) else len(data.train_x)
    rows = torch.arange(min(count, 2 * processes.count), device=processes.device)
    batch = batches.part(rows, torch.Generator())
    expected = tuple(batch.y.shape) if spec.task == "regression" else (*batch.y.shape, spec.outputs)
    with torch.no_grad(), draws_kept(processes.device):
        model.eval()
        try:
            output = model(batch.x)
        except Exception as error:
            if config.model_name not in MODEL_NAMES:
                raise
            what = f"a model for samples of {_kind(batch.x[0])}"
            raise refused("model", config.model_name, f"{what} ({in_a_line(error)})") from error
        finally:
            model.train()
    if torch.is_tensor(output) and output.is_floating_point() and tuple(output.shape) == expected:
        return
    gives = _kind(output) if torch.is_tensor(output) else f"a {type(output).__name__}"
    value = f"{shown(config.model_name)}, which gives {gives} of {_kind(batch.x)}"
    raise refused("model", value, f"what gives floats of the shape {expected}, for {_asked(spec)}")


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _asked(spec: DataSet) -> str:
    return "a target a row" if spec.task == "regression" else f"{spec.outputs} outputs"
