"""Whether a model fits its data and the settings its modules: asked before anything is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

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

    Of others it is asked once they are loaded, as loading takes no time or tells what a sample is. ConfigError for what
    does not fit.
    """
    spec = spec_of(config.placed(config.dataset))
    context = config.options.get("context", CONTEXT)
    if spec.text:
        check_context(context)
    shape = (context,) if spec.text else spec.shape
    if config.model_name in MODEL_NAMES and shape is not None and (spec.text or spec.downloaded):
        with draws_kept(torch.device("cpu")):  # not on "meta", where drawing weights imports torch's compiler
            model = models.build(config.model_name, shape, spec.outputs or 1, config.seed, config.options)
        quant.check_names(config, model)


def check_fit(config: Config, model: nn.Module, batches: Batches, spec: DataSet) -> None:
    """A pass of the first rows through the model in its evaluation mode, through one of somebody's own in training too.

    No random number is used up, and buffers stay as they are. Of our own models on our own sets nothing is asked.
    ConfigError for what gives no output of the right shape, or writes into its input; what a model of somebody's own
    raises is raised.
    """
    if config.dataset in DATASETS and config.model_name in MODEL_NAMES:
        return
    data, processes = batches.data, batches.processes
    count = data.windows if isinstance(data, Text) else len(data.train_x)
    rows = torch.arange(min(count, 2 * processes.count), device=processes.device)
    batch = batches.part(rows, torch.Generator())
    is_ours, before = config.model_name in MODEL_NAMES, batch.x.clone()
    for training in (False,) if is_ours else (False, True):
        output = _output(config, model, batch.x, training)
        gives = _kind(output) if torch.is_tensor(output) else f"a {type(output).__name__}"
        value = f"{shown(config.model_name)}, which gives {gives} of {_kind(before)}" + " in training" * training
        expected = tuple(batch.y.shape) if spec.task == "regression" else (*batch.y.shape, spec.outputs)
        if not torch.is_tensor(output) or not output.is_floating_point() or tuple(output.shape) != expected:
            raise refused("model", value, f"what gives floats of the shape {expected}, for {_asked(spec)}")
        if training and not output.requires_grad:
            raise refused("model", f"{value}, without gradients", "what parameters lead to, and is not detached")
        if not torch.equal(batch.x, before):  # test rows would be others each time, and those of --shadow too
            value = f"{shown(config.model_name)}, which writes into what it reads"
            raise refused("model", value, "a model that leaves its input as it is")


def _output(config: Config, model: nn.Module, x: torch.Tensor, training: bool) -> Any:
    """What the model gives in that mode; afterwards it is in that of training, with the buffers that it had."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # which batch norm moves
    with torch.set_grad_enabled(training), draws_kept(x.device):
        model.train(training)
        try:
            return functional_call(model, buffers, (x,))
        except Exception as error:
            if config.model_name not in MODEL_NAMES:
                raise
            what = f"a model for samples of {_kind(x[0])}" + ", or floats as features" * (not x.is_floating_point())
            raise refused("model", config.model_name, f"{what} ({in_a_line(error)})") from error
        finally:
            model.train()


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _asked(spec: DataSet) -> str:
    return "a target a row" if spec.task == "regression" else f"{spec.outputs} outputs"
