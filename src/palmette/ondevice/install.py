"""Putting a plan onto a model and taking it off again; modules, parameters and names stay the same objects."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from palmette.errors import InputError
from palmette.graph.inputs import tensors
from palmette.meter.training import is_measuring
from palmette.ondevice.mode import AdaptMode, Engine
from palmette.ondevice.plan import MemoryPlan

_ENGINE = "_palmette_engine"
_WANTED = "_palmette_wanted_mode"


@dataclass
class Before:
    """What `remove` puts back: forward overrides, training flags, and what was trainable."""

    training: dict[str, bool] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    forward: Any = None


def is_adapted(model: nn.Module) -> bool:
    """Whether a plan lies on the model."""
    return _ENGINE in model.__dict__


def engine_of(model: nn.Module) -> Engine:
    """The engine of an adapted model. InputError for another model."""
    if not is_adapted(model):
        raise InputError("The model is not adapted", fix="Call adapt(model, ...) first.")
    engine: Engine = model.__dict__[_ENGINE]
    return engine


def freeze_norms(model: nn.Module, before: Before) -> None:
    """Put batch norms with running statistics into eval mode, where `train()` does not reach them."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and "train" not in module.__dict__:
            before.training[path] = module.training
            module.eval()
            module.__dict__["train"] = types.MethodType(_stay, module)


def _stay(self: nn.Module, mode: bool = True) -> nn.Module:
    self.__dict__[_WANTED] = mode  # what it goes back to
    return self


def freeze(model: nn.Module, names: tuple[str, ...], before: Before) -> None:
    """Take parameters out of training."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        if name in wanted and parameter.requires_grad:
            parameter.requires_grad_(False)
            parameter.grad = None
            before.trainable += (name,)


def unfreeze(model: nn.Module, before: Before) -> None:
    """Put back into training what `freeze` took out."""
    parameters = dict(model.named_parameters())
    for name in before.trainable:
        parameters[name].requires_grad_(True)
    before.trainable = ()


@contextmanager
def without(model: nn.Module, engine: Engine, before: Before) -> Iterator[None]:
    """In this block, the model runs as if it were not adapted."""
    _uninstall(model, before)
    try:
        yield
    finally:
        install(model, engine, before)


def install(model: nn.Module, engine: Engine, before: Before) -> None:
    """Run the model's forward passes under the plan from now on."""
    before.forward = model.__dict__.get("forward")
    model.__dict__[_ENGINE] = engine
    engine.forward = before.forward
    model.__dict__["forward"] = types.MethodType(_adapted_forward, model)
    model.__dict__["zero_grad"] = types.MethodType(_zero_grad, model)


def _uninstall(model: nn.Module, before: Before) -> None:
    for name in (_ENGINE, "forward", "zero_grad"):
        model.__dict__.pop(name, None)
    if before.forward is not None:
        model.__dict__["forward"] = before.forward


def remove(model: nn.Module, before: Before) -> None:
    """Leave the model as it was, with the weights that it has now."""
    _uninstall(model, before)
    modules = dict(model.named_modules())
    for path, training in before.training.items():
        modules[path].__dict__.pop("train", None)
        modules[path].training = modules[path].__dict__.pop(_WANTED, training)
    unfreeze(model, before)


def _adapted_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    engine: Engine = self.__dict__[_ENGINE]
    inner = engine.forward or types.MethodType(type(self).forward, self)
    if not torch.is_grad_enabled():
        return inner(*args, **kwargs)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise InputError("An adapted model takes no transform of torch.func", fix="Call backward(), or undo() first.")
    _check_size(engine.plan, args, kwargs)
    if engine.waits_for_optimizer and not is_measuring():
        _warn_without_optimizer(engine)
    with AdaptMode(self, engine) as mode:
        result = inner(*args, **kwargs)
    mode.finish()
    return result


def _zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
    """`Module.zero_grad`, for the compact parameters too."""
    type(self).zero_grad(self, set_to_none)
    for tuned in self.__dict__[_ENGINE].tuned.values():
        tuned.grad = None


def _warn_without_optimizer(engine: Engine) -> None:
    """Say it once, when a second step begins and nothing could have been learned from the first."""
    engine.steps += 1
    if engine.steps == 2:
        warnings.warn(
            f"method {engine.plan.method!r} trains parts of weights, and no optimizer has them: "
            "use adaptation.optimizer(...), and adaptation.next_epoch() after each epoch",
            stacklevel=4,
        )


def _check_size(plan: MemoryPlan, args: Any, kwargs: Any) -> None:
    """Raise before anything is allocated when an input is larger than the one that the plan was made for."""
    given = [tuple(t.shape) for t in tensors((*args, kwargs))]
    most = max((shape[0] for shape in plan.inputs if shape), default=0)
    for place, shape in enumerate(given):
        planned = plan.inputs[place] if place < len(plan.inputs) else ()
        if len(shape) != len(planned):
            planned = (most, *shape[1:])  # of another form: the batch alone can be held against the plan
        if any(a > b for a, b in zip(shape, planned, strict=False)):
            raise InputError(
                f"The batch is larger than planned: {_times(shape)} instead of at most {_times(planned)}",
                why="the budget would be exceeded",
                fix="Split the batch, adapt with a sample of this size, or evaluate under torch.no_grad().",
            )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def input_shapes(x: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of all tensors of the sample."""
    return tuple(tuple(t.shape) for t in tensors(x))
