"""The epochs of a selection method: compact parameters for what is trained, and an optimizer that follows them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from palmette.errors import InputError
from palmette.ondevice.install import Before, freeze, unfreeze, without
from palmette.ondevice.mode import Engine
from palmette.ondevice.plan import MemoryPlan, Slice
from palmette.ondevice.search import Request
from palmette.ondevice.selection import Selector, View, fill, open_view
from palmette.ondevice.slices import moved_state, put_back, taken
from palmette.ondevice.trace import Trace


@dataclass
class Tuning:
    """A selector at work on one model."""

    model: nn.Module
    request: Request
    selector: Selector
    view: View
    epoch: int = 0
    optimizers: list[Any] = field(default_factory=list)  # weak references
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)  # weights as last read or written
    closed: bool = False

    @classmethod
    def open(cls, model: nn.Module, request: Request, found: Trace, selector: Selector) -> tuple[Tuning, MemoryPlan]:
        """Look at the network, choose for the first epoch, and return the plan."""
        view = open_view(model, request, found, selector.axis, getattr(getattr(selector, "config", None), "seed", 0))
        selector.start(view)
        tuning = cls(model, request, selector, view)
        return tuning, fill(view, selector.choose(view, 0))

    def begin(self, engine: Engine) -> None:
        """Make the compact parameters of the plan in force."""
        engine.tuned = {key: taken(self._weight(key), part) for key, part in engine.plan.slices.items()}
        self._note(engine)

    def sync(self, engine: Engine) -> None:
        """Write the compact parameters back into the weights."""
        for key, part in engine.plan.slices.items():
            put_back(self._weight(key), part, engine.tuned[key])
        self._note(engine)

    def refresh(self, engine: Engine) -> None:
        """Take anew from weights that someone else has written (a checkpoint that was loaded, an average)."""
        for key, part in engine.plan.slices.items():
            weight = self._weight(key)
            if (id(weight), weight._version) != self.seen.get(key):
                with torch.no_grad():
                    engine.tuned[key].copy_(taken(weight, part))
        self._note(engine)

    def close(self, engine: Engine) -> None:
        """Leave the weights as they are; optimizers that are still around write nothing any more."""
        self.refresh(engine)
        self.closed = True

    def _note(self, engine: Engine) -> None:
        self.seen = {key: (id(self._weight(key)), self._weight(key)._version) for key in engine.plan.slices}

    def next_epoch(self, engine: Engine, before: Before) -> None:
        """Choose anew: other compact parameters, in the same optimizers, with the state of what stays in training."""
        self.refresh(engine)
        self.epoch += 1
        if not self.selector.dynamic:
            self.view.gradients.clear()
            return
        chosen = dict(self.view.chosen)
        plan = engine.plan
        try:
            with without(self.model, engine, before):
                unfreeze(self.model, before)
                plan = fill(self.view, self.selector.choose(self.view, self.epoch))
        except BaseException:
            self.view.chosen = chosen
            raise
        finally:
            freeze(self.model, plan.frozen, before)
        self.view.gradients.clear()
        old_parts, old = engine.plan.slices, engine.tuned
        engine.plan = plan
        self.begin(engine)
        for reference in self.optimizers:
            optimizer = reference()
            if optimizer is not None:
                _replace_parameters(optimizer, old, old_parts, engine.tuned, engine.plan.slices)

    def attach(self, optimizer: Optimizer, engine: Engine) -> None:
        """Before each step of the optimizer gather the gradients' norms, after it write the weights back."""
        self.optimizers.append(weakref.ref(optimizer))
        optimizer.register_step_pre_hook(lambda *_: self._before_step(engine))
        optimizer.register_step_post_hook(lambda *_: None if self.closed else self.sync(engine))

    def _before_step(self, engine: Engine) -> None:
        if self.closed:
            return
        self.refresh(engine)
        for key, tuned in engine.tuned.items():
            if tuned.grad is None:
                continue
            if dist.is_available() and dist.is_initialized():  # compact gradients are no parameters of the model's
                dist.all_reduce(tuned.grad)
                tuned.grad /= dist.get_world_size()
            norms = _norms(tuned.grad, engine.plan.slices[key])
            held = self.view.gradients.get(key)
            self.view.gradients[key] = norms if held is None else held + norms

    def _weight(self, key: str) -> Tensor:
        name = self.view.layers[key].weights[0]
        weight: Tensor = self.model.get_parameter(name)
        return weight


def _norms(grad: Tensor, part: Slice) -> Tensor:
    """The norm of each chosen channel's gradient."""
    norms: Tensor = torch.linalg.vector_norm(grad.detach().movedim(part.axis, 0).flatten(1), dim=1)
    return norms


def _replace_parameters(
    optimizer: Optimizer,
    old: dict[str, nn.Parameter],
    old_parts: Any,
    new: dict[str, nn.Parameter],
    parts: Any,
) -> None:
    """Put the new compact parameters into the place of the old ones, with what the optimizer kept for them."""
    former = {id(parameter): key for key, parameter in old.items()}
    placed: set[str] = set()
    for group in optimizer.param_groups:
        kept: list[Any] = []
        for parameter in group["params"]:
            key = former.get(id(parameter))
            if key is None:
                kept.append(parameter)
                continue
            state = optimizer.state.pop(parameter, {})
            if key in new:
                kept.append(new[key])
                placed.add(key)
                moved = {n: _moved(v, old_parts[key], parts[key], new[key].shape) for n, v in state.items()}
                if moved:
                    optimizer.state[new[key]] = moved
        group["params"] = kept
    optimizer.param_groups[0]["params"] += [parameter for key, parameter in new.items() if key not in placed]


def _moved(value: Any, before: Slice, after: Slice, shape: torch.Size) -> Any:
    return moved_state(value, before, after, shape) if isinstance(value, Tensor) else value


def check_optimizer(kind: Any) -> None:
    """InputError for what is no optimizer class."""
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise InputError(f"{kind!r} is no optimizer class", fix="Pass a class, such as torch.optim.SGD.")
