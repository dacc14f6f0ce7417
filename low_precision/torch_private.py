"""What this library reads of torch that torch does not document: all of it is in this file.

Another version of torch may lack a name. Then each function here falls back to an answer that is right and costs some
speed: "somebody may watch", so that nothing is rounded in place, or "this may be traced".
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
R = TypeVar("R")

# torch's names for the backward passes of a linear or convolution layer's own operation. None of them reads the result
# of that operation, so the result may be overwritten.
_LAYER_BACKWARDS = ("ConvolutionBackward0", "AddmmBackward0", "MmBackward0")
_FRAMES_TO_A_HOOK = 12  # of Python, at most, from a hook up to its module's call; torch.compile adds some
_another = itertools.count(start=-1, step=-1)  # numbers that are no versions


class _Compiler:
    is_met = False  # torch.compile has come upon a function of ours


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.disable(function), which imports torch's compiler: here, only where it is at work."""
    disable = getattr(torch, "_disable_dynamo", None)
    if disable is None:
        return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]

    def compiled(*arguments: P.args, **named: P.kwargs) -> R:
        _Compiler.is_met = True
        # All hooks have the code of `call`: torch would compile that anew for each of them, up to its limit.
        compiler = sys.modules.get("torch._dynamo.eval_frame")
        skip = getattr(compiler, "skip_code", None)
        code = getattr(call, "__code__", None)
        if skip is not None and code is not None:
            skip(code)
        return function(*arguments, **named)

    disabled = disable(compiled)  # imports the compiler at its first call

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        is_compiled = _Compiler.is_met or torch.compiler.is_compiling()
        return (disabled if is_compiled else function)(*arguments, **named)

    return call


def forget_compiled() -> None:
    """torch.compiler.reset(), where the compiler is loaded: what is compiled already would not see new hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def transforms_are_active() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...) may be at work, whose tensors have no memory of their own."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return True if ask is None else bool(ask())


def hooks_on_all_modules() -> bool:
    """Whether hooks may be registered that see what every module reads, gives, or gets as a gradient."""
    forward = getattr(_module, "_global_forward_hooks", True)
    backward = getattr(_module, "_global_backward_hooks", True)
    return bool(forward) or bool(backward)


def forward_hooks(layer: nn.Module) -> list[Callable[..., Any]] | None:
    """The layer's forward hooks, in the order of their calls; None where torch does not tell."""
    table = getattr(layer, "_forward_hooks", None)
    return None if table is None else list(table.values())


def is_last_pre_hook(layer: nn.Module, hook: Callable[..., Any]) -> bool:
    """Whether no forward pre-hook of the layer comes after `hook`; False where torch does not tell."""
    table = getattr(layer, "_forward_pre_hooks", None)
    return bool(table and next(reversed(table.values())) == hook)


def has_backward_hooks(layer: nn.Module) -> bool:
    """Whether hooks may see the gradients of the layer's input or output."""
    return bool(getattr(layer, "_backward_hooks", True))


def is_made_by_a_layer(output: Tensor) -> bool:
    """Whether autograd says that the operation of a linear or convolution layer made this tensor."""
    return type(output.grad_fn).__name__ in _LAYER_BACKWARDS


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters by name, without those of its children; None for one that is registered as none."""
    table = getattr(module, "_parameters", None)
    return dict(module.named_parameters(recurse=False, remove_duplicate=False)) if table is None else table


def version_of(tensor: Tensor) -> tuple[int, int]:
    """A pair that changes when somebody writes to the tensor in place, or gives it other memory.

    Where torch does not count the writes, it is another pair at each call, so that the numbers have to be compared.
    """
    if tensor.is_inference():
        return tensor.data_ptr(), 0
    version = getattr(tensor, "_version", None)
    return tensor.data_ptr(), next(_another) if version is None else version


def is_replica(layer: nn.Module) -> bool:
    """Whether the layer is one of those that nn.DataParallel makes of its module for each device."""
    return bool(getattr(layer, "_is_replica", False))


def inside_compiled(model: nn.Module) -> nn.Module | None:
    """The module that torch.compile has wrapped; None where `model` is not such a wrapper."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the parallel wrappers."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    inner = inside_compiled(model)
    return model if inner is None else unwrapped(inner)


# Asked at each call of a layer, so that what never changes in a process is asked once.
_is_distributed = torch.distributed.is_initialized if torch.distributed.is_available() else bool


def process_rank() -> int:
    """The number of this process among those of torch.distributed; 0 where it is alone."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def wrap_checkpointing(
    reentrant: Callable[[Callable[..., Any]], Callable[..., Any]],
    not_reentrant: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Has torch.utils.checkpoint run, in place of a function that it was given, what these make of the function.

    reentrant: is called just before the function's first run; what it gives does that run and each later one.
    not_reentrant: is called just before the first run; what it gives does the later runs alone.
    A warning where torch lacks the names.
    """
    from torch.utils import checkpoint

    function = getattr(checkpoint, "CheckpointFunction", None)
    generator = getattr(checkpoint, "_checkpoint_without_reentrant_generator", None)
    if function is None or generator is None:
        text = (
            f"torch {torch.__version__} has another torch.utils.checkpoint than low_precision knows: what it computes "
            "again is rounded stochastically with other bits than the first time"
        )
        warnings.warn(text, stacklevel=2)
        return
    apply = function.apply

    def apply_wrapped(run: Callable[..., Any], *arguments: Any) -> Any:
        return apply(reentrant(run), *arguments)

    @functools.wraps(generator)
    def generate_wrapped(run: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
        return generator(not_reentrant(run), *arguments, **named)

    function.apply = apply_wrapped
    checkpoint._checkpoint_without_reentrant_generator = generate_wrapped  # type: ignore[assignment]
    composable = sys.modules.get("torch.distributed._composable.checkpoint_activation")
    if getattr(composable, "_checkpoint_without_reentrant_generator", None) is generator:
        composable._checkpoint_without_reentrant_generator = generate_wrapped  # type: ignore[union-attr]


def backward_task() -> int:
    """The number of the backward pass that this thread works for; one for all where torch does not tell."""
    ask = getattr(torch._C, "_current_graph_task_id", None)
    return 0 if ask is None else int(ask())


def keep_during_backward(thing: object) -> bool:
    """Has torch keep `thing` until the backward pass ends in which this is called, by an error too; False where torch
    cannot.
    """
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    if engine is not None:
        engine.queue_callback(functools.partial(id, thing))
    return engine is not None


def process_count() -> int:
    """How many processes torch.distributed has; 1 without it."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def show_grad_scaler(optimizer: torch.optim.Optimizer) -> None:
    """From now on torch.amp.GradScaler.step leaves what it knows in attributes of the optimizer, as for fused ones."""
    vars(optimizer).setdefault("_step_supports_amp_scaling", True)


def hide_grad_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Takes show_grad_scaler back. A fused optimizer keeps its own attribute."""
    if not any(group.get("fused") for group in optimizer.param_groups):
        vars(optimizer).pop("_step_supports_amp_scaling", None)


def grad_scaler_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch.amp.GradScaler that has the optimizer step; for one of show_grad_scaler.

    Takes away what it has left in the optimizer: it would not do so itself after an error of the step.
    """
    steps = getattr(optimizer, "found_inf", None) is not None
    for name in ("found_inf", "grad_scale") if steps else ():
        vars(optimizer).pop(name, None)
    return steps


def dispatch_modes_are_active() -> bool:
    """Whether a TorchDispatchMode may be active, which sees each operation of torch and may keep what comes out."""
    count = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return True if count is None else bool(count())


# What may stand between a call of quantize and a tensor's memory. Read once, because each rounding of a small tensor
# asks all of them.
_function_modes = getattr(torch._C, "_len_torch_function_stack", None)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
_tracing = getattr(torch._C, "_is_tracing", None)
_forward_ad = torch.autograd.forward_ad


def somebody_watches() -> bool:
    """Whether a mode, a transform of torch.func, a tracer or forward-mode differentiation may be at work."""
    if _transforms is None or _dispatch_modes is None or _function_modes is None or _tracing is None:
        return True
    if _transforms() or _dispatch_modes() or _function_modes() or _tracing():
        return True
    return bool(getattr(_forward_ad, "_current_level", 0) >= 0)


def tracer() -> str | None:
    """Who records the operations of torch so that they can be done again with other numbers; None where nobody does."""
    if (_tracing or torch.jit.is_tracing)():  # type: ignore[attr-defined]
        return "torch.jit.trace"
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    proxy_mode = getattr(proxies, "get_proxy_mode", None)
    return "make_fx" if proxy_mode is not None and proxy_mode() is not None else None


@contextlib.contextmanager
def hidden_from_modes() -> Iterator[bool]:
    """No TorchFunctionMode or TorchDispatchMode sees what torch does within. False: torch cannot, and they see it."""
    hide_functions = getattr(torch._C, "DisableTorchFunction", None)
    hide_dispatch = getattr(torch._C, "_DisableTorchDispatch", None)
    if hide_functions is None or hide_dispatch is None:
        yield False
    else:
        with hide_functions(), hide_dispatch():
            yield True


@contextlib.contextmanager
def without_transforms() -> Iterator[bool]:
    """No transform of torch.func is at work within. False: torch cannot, and they are."""
    interpreters = sys.modules.get("torch._functorch.pyfunctorch")
    clear = getattr(interpreters, "temporarily_clear_interpreter_stack", None)
    if clear is None:
        yield False
    else:
        with clear():
            yield True


def is_of_a_transform(x: Tensor) -> bool:
    """Whether the tensor belongs to a transform of torch.func, which keeps its numbers in another one."""
    functorch = getattr(torch._C, "_functorch", None)
    ask = getattr(functorch, "is_functorch_wrapped_tensor", None)
    if ask is not None:
        return bool(ask(x))
    try:
        x.data_ptr()
    except RuntimeError:  # such a tensor has no address
        return True
    return False


def without_wrappers(x: Tensor) -> Tensor:
    """The tensor in which transforms of torch.func keep the numbers of x; of vmap, those of all samples."""
    functorch = getattr(torch._C, "_functorch", None)
    while functorch is not None and is_of_a_transform(x):
        x = functorch.get_unwrapped(x)
    return x


def functionalizes() -> bool:
    """Whether torch.func.functionalize is among the transforms at work. Under it torch calls no autograd.Function."""
    functorch = getattr(torch._C, "_functorch", None)
    ask = getattr(functorch, "get_interpreter_stack", None)
    levels = None if ask is None else ask()  # None where there is none
    return any(level.key().name == "Functionalize" for level in levels or ())


def is_fake(x: Tensor) -> bool:
    """Whether the tensor has a shape and a type, and no numbers. Where torch does not tell, meta tensors alone are."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    fake = getattr(fakes, "FakeTensor", None)
    return x.is_meta or (fake is not None and isinstance(x, fake))


def memory_of(x: Tensor) -> int | None:
    """A number for the memory that a tensor and its views share; None where torch does not tell."""
    try:
        functorch = torch._C._functorch
        while functorch.is_functorch_wrapped_tensor(x):  # in vmap or grad: what it is of
            x = functorch.get_unwrapped(x)
        return int(x.untyped_storage()._cdata)
    except (AttributeError, NotImplementedError, RuntimeError):  # sparse, nested
        return None


def without_mode_check(function: Callable[P, R]) -> Callable[P, R]:
    """The same function of torch.nn.functional, which no longer asks at its beginning whether a mode is active.

    So a mode can have it run with the mode active, and sees what it calls, where it would be called again for ever.
    """
    code = getattr(function, "__code__", None)
    surroundings = getattr(function, "__globals__", None)
    if code is None or surroundings is None or "has_torch_function" not in surroundings:
        raise RuntimeError(f"torch {torch.__version__} has no torch.nn.functional.{function.__name__} in Python")
    same = types.FunctionType(code, surroundings | {"has_torch_function": lambda operands: False}, function.__name__)
    same.__defaults__, same.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return same


def grouped_products() -> list[Callable[..., Any]]:
    """torch._grouped_mm, which torch.nn.functional.grouped_mm was called before it had a name."""
    function = getattr(torch, "_grouped_mm", None)
    return [] if function is None else [function]


def hide_mode(mode: TorchFunctionMode) -> bool:
    """Takes the mode off the top of this thread's stack; False where it does not lie there."""
    count = torch._C._len_torch_function_stack()
    if not count or torch._C._get_function_stack_at(count - 1) is not mode:
        return False
    torch._C._pop_torch_function_stack()
    return True


def show_mode(mode: TorchFunctionMode) -> None:
    """Takes hide_mode back."""
    torch._C._push_on_torch_function_stack(mode)


def module_call() -> FrameType | None:
    """Python's frame of the module's call whose hook calls this; None where it cannot be told, as in compiled code."""
    call = getattr(nn.Module, "_call_impl", None)
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES_TO_A_HOOK):
        if frame is None or call is None:
            return None
        if frame.f_code is call.__code__:
            return frame
        frame = frame.f_back
    return None


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """torch.broadcast_shapes, whose type torch does not declare."""
    return torch.broadcast_shapes(*shapes)  # type: ignore[no-any-return, no-untyped-call]


def is_running(call: FrameType) -> bool:
    """Whether this thread is inside that call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame is call:
            return True
        frame = frame.f_back
    return False


def is_running_in_a_thread(call: FrameType) -> bool:
    """Whether any thread is inside that call."""
    for top in sys._current_frames().values():
        frame: FrameType | None = top
        while frame is not None:
            if frame is call:
                return True
            frame = frame.f_back
    return False
