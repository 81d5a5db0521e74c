"""What stands between an adapted model and torch while it runs forward: known calls keep less, all others pass.

A call is told by the torch function in which it ends, so any model will do. A layer is told by the name of its weight;
what has no parameters, by the layer before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from palmette.errors import PlanError
from palmette.meter.calls import opened
from palmette.meter.training import labelled
from palmette.ondevice import functions
from palmette.ondevice.codec import Codec, Keep, Payload, State
from palmette.ondevice.functions import Norm
from palmette.ondevice.layer import Layer
from palmette.ondevice.layer_function import LayerCall, folded_forward, layer_call
from palmette.ondevice.names import Namer, Names
from palmette.ondevice.operations import Operation, is_move, parse
from palmette.ondevice.plan import MemoryPlan

Compute = Callable[[Tensor], Tensor]


def saving_hooks() -> Any:
    """The hook that is handed what autograd keeps just now, or None."""
    found: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if found is None else found[0]


def is_checkpointed(outer: Any) -> bool:
    """Whether a checkpoint within the model (`outer`: the hook around it) will run the call again, without the plan."""
    found = saving_hooks()
    return found is not None and found is not outer and found.__module__ == "torch.utils.checkpoint"


@dataclass(frozen=True)
class Recipe:
    """How a tensor is made from one that is kept anyway."""

    source: Tensor
    steps: tuple[Compute, ...]


@dataclass(frozen=True, kw_only=True)
class Rebuilt(Codec):
    """The input of a layer, made again from its source by the operations before it, as the forward pass ran them."""

    name: ClassVar[str] = ""
    lossless: ClassVar[bool] = True
    steps: tuple[Any, ...] = ()
    autocast: bool = False
    dtype: Any = None

    def __post_init__(self) -> None:
        """Nothing to check: it is made at each call, not by a user."""

    def decode(self, payload: Payload, layer: Layer) -> Tensor:  # noqa: ARG002
        """The input again."""
        x = payload[0]
        with torch.autocast(x.device.type, enabled=self.autocast):
            for step in self.steps:
                x = step(x)
        return x if self.dtype is None else x.to(self.dtype)


@dataclass
class Engine:
    """What an adapted model carries: its plan, what codecs remember, and the trained parts of frozen weights."""

    plan: MemoryPlan
    states: dict[str, State] = field(default_factory=dict)
    tuned: dict[str, nn.Parameter] = field(default_factory=dict)
    names: Names = field(default_factory=Names)
    waits_for_optimizer: bool = False  # trained parts exist, and no optimizer of theirs yet
    steps: int = 0
    forward: Any = None  # an override of the model's forward that was there before


class AdaptMode(TorchFunctionMode):
    """One forward pass of an adapted model."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        super().__init__()
        self.engine, self.plan = engine, engine.plan
        self.namer = Namer(model, engine.names)
        self.payloads: dict[tuple[int, int, torch.dtype, Codec], tuple[Any, Payload]] = {}
        self.recipes: dict[int, tuple[Any, Recipe]] = {}
        self.folded: dict[int, tuple[Any, Tensor]] = {}  # output of a folded layer -> the norm's mean
        self.marks: dict[int, tuple[Any, str]] = {}  # outputs of folded layers that their norm has not read yet
        # a recomputation inside a backward pass must not move what codecs remember
        self.advance = torch._C._current_graph_task_id() == -1
        self.hooks = saving_hooks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = None if is_checkpointed(self.hooks) else parse(func, args, kwargs)
        if operation is not None:
            if self.marks and operation.kind != "norm":
                self._refuse_readers((operation.x,))
            return self._run(operation)
        composite = opened(func)
        if composite is not None:
            with self:
                return composite(*args, **kwargs)
        result = func(*args, **kwargs)
        if self.marks and isinstance(result, Tensor | tuple | list):
            self._refuse_readers(args)
        if is_move(func) and self.recipes:
            self._follow_move(func, args, kwargs, result)
        return result

    def _run(self, operation: Operation) -> Tensor:
        if operation.kind == "layer":
            return self._layer(operation)
        name = self.namer.other(operation.name)
        if not (operation.x.requires_grad and torch.is_grad_enabled()) and operation.kind != "norm":
            return self._recipe(operation, name)
        with labelled(operation.name):
            return _HANDLERS[operation.kind](self, operation, name)

    # ---- layers ------------------------------------------------------------------------------------------------------

    def _layer(self, operation: Operation) -> Tensor:
        x, weight, bias, layer = operation.x, operation.weight, operation.bias, operation.layer
        if weight is None or layer is None:
            return operation.compute(x)
        key = self.namer.layer(weight)
        norm, gamma, beta = self._fold(key)
        tuned = self.engine.tuned.get(key)
        tensors = (x, weight, bias, gamma, beta, tuned)
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
            return self._marked(_without_gradient(operation, norm, gamma, beta), norm)
        dtype = _autocast_dtype(x)
        trains = any(t is not None and t.requires_grad for t in (weight, gamma, tuned))
        codec = self._codec(key) if trains else Keep()
        if norm is None and tuned is None and dtype is None and _torch_does_it(x, layer, codec, trains):
            with labelled(operation.name):
                return operation.compute(x)
        x = x if dtype is None else x.to(dtype)
        payload, codec = self._payload(key, codec, operation.x, x) if trains else ((), codec)
        part = self.plan.slices.get(key) if tuned is not None else None
        rows = part.index if part is not None and part.axis == 0 else None
        with labelled(f"{operation.name} ({codec.name or 'recompute'})" if trains else operation.name):
            y = layer_call(LayerCall(layer, codec, norm, dtype, rows), payload, x, weight, bias, gamma, beta, tuned)
        return self._marked(y, norm)

    def _codec(self, key: str) -> Codec:
        codec = self.plan.codecs.get(key)
        if codec is None:
            raise PlanError(
                "The model runs a layer that the plan does not know",
                where=key,
                why="the sample did not reach it, so its bytes are in no account",
                fix="Adapt with a sample that takes this way, or freeze the layer.",
            )
        return codec

    def _fold(self, key: str) -> tuple[Norm | None, Tensor | None, Tensor | None]:
        fold = self.plan.folds.get(key)
        if fold is None:
            return None, None, None
        get = self.namer.names.tensor
        mean, var = get(fold.mean), get(fold.var)
        if mean is None or var is None:
            raise PlanError("A batch norm of the plan has lost its statistics", where=fold.mean, fix="Adapt anew.")
        return Norm(mean, var, fold.eps), get(fold.weight), get(fold.bias)

    def _marked(self, y: Tensor, norm: Norm | None) -> Tensor:
        if norm is not None:
            self.folded[id(y)] = (weakref.ref(y), norm.mean)
            self.marks[id(y)] = (weakref.ref(y), self.namer.last)
        return y

    def _refuse_readers(self, values: Any) -> None:
        """PlanError when one of these is a folded layer's output: the plan says that its norm alone reads it."""
        for value in values:
            key = _living(self.marks, value) if isinstance(value, Tensor) else None
            if key is not None:
                raise unfolded(key)

    def finish(self) -> None:
        """Hold the forward pass against the plan: every folded layer's output went into its norm."""
        for _, key in self.marks.values():
            raise unfolded(key)

    def _payload(self, key: str, codec: Codec, source: Tensor, x: Tensor) -> tuple[Payload, Codec]:
        """What the codec makes of x; made once for all layers that read the same tensor."""
        if codec.name == "recompute":
            recipe = _living(self.recipes, source)
            if recipe is None:
                raise PlanError("The input of a layer cannot be computed again", where=key, fix="Adapt anew.")
            autocast = torch.is_autocast_enabled(x.device.type)
            return (recipe.source.detach(),), Rebuilt(steps=recipe.steps, autocast=autocast, dtype=x.dtype)
        cached = (id(source), source._version, x.dtype, codec)
        found = self.payloads.get(cached)
        if found is not None and found[0]() is source:
            return found[1], codec
        state = self.engine.states.setdefault(key, {})
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            payload = codec.encode(x, state if self.advance else dict(state))
        self.payloads[cached] = (weakref.ref(source), payload)
        return payload, codec

    # ---- everything else ---------------------------------------------------------------------------------------------

    def _masked(self, operation: Operation, name: str) -> Tensor:
        if name in self.plan.stock or (operation.inplace and operation.x._is_view()):
            return operation.compute(operation.x)
        return functions.masked_activation(operation.x, operation.compute, operation.bends, operation.slopes)

    def _smooth(self, operation: Operation, name: str) -> Tensor:
        if not operation.inplace or operation.backward is None or operation.x._is_view():
            return self._recipe(operation, name)
        source = operation.x.detach().clone()
        y = functions.smooth_in_place(operation.x, source, operation.compute, operation.backward)
        self._remember(operation, y, source)
        return y

    def _recipe(self, operation: Operation, name: str) -> Tensor:  # noqa: ARG002  # one signature for all
        y = operation.compute(operation.x)
        self._remember(operation, y, operation.x)
        return y

    def _norm(self, operation: Operation, name: str) -> Tensor:
        mean = _living(self.folded, operation.x)
        if mean is not None and mean is operation.mean:
            self.marks.pop(id(operation.x), None)
            return operation.x
        x, gamma, beta = operation.x, operation.weight, operation.bias
        if operation.mean is None or operation.var is None:
            return operation.compute(x)
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, gamma, beta)):
            return operation.compute(x)
        norm, codec = Norm(operation.mean, operation.var, operation.eps), None
        payload: Payload = ()
        if gamma is not None and gamma.requires_grad:
            codec = self._codec(self.namer.norm(gamma))
            payload, codec = self._payload(name, codec, x, x)
        return functions.eval_norm(norm, x, gamma, beta, codec, payload)

    def _dropout(self, operation: Operation, name: str) -> Tensor:  # noqa: ARG002
        if operation.inplace and operation.x._is_view():
            return operation.compute(operation.x)
        return functions.dropout(operation.x, operation.p, operation.inplace)

    def _maxpool(self, operation: Operation, name: str) -> Tensor:  # noqa: ARG002
        if operation.window is None:
            return operation.compute(operation.x)
        return functions.max_pool2d(operation.x, operation.window)

    def _shape_only(self, operation: Operation, name: str) -> Tensor:  # noqa: ARG002
        if operation.backward is None:
            return operation.compute(operation.x)
        return functions.shape_only(operation.x, operation.compute, operation.backward)

    # ---- recipes -----------------------------------------------------------------------------------------------------

    def _remember(self, operation: Operation, y: Tensor, source: Tensor) -> None:
        if operation.kind in ("smooth", "recipe"):
            step = operation.plain or operation.compute
            self.recipes[id(y)] = (weakref.ref(y), Recipe(source, (step,)))

    def _follow_move(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        recipe = _living(self.recipes, args[0]) if args and isinstance(args[0], Tensor) else None
        if recipe is not None and isinstance(result, Tensor) and result is not args[0]:
            step = lambda x: func(x, *args[1:], **kwargs)  # noqa: E731
            self.recipes[id(result)] = (weakref.ref(result), Recipe(recipe.source, (*recipe.steps, step)))


_HANDLERS: dict[str, Callable[[AdaptMode, Operation, str], Tensor]] = {
    "masked": AdaptMode._masked,
    "smooth": AdaptMode._smooth,
    "recipe": AdaptMode._recipe,
    "norm": AdaptMode._norm,
    "dropout": AdaptMode._dropout,
    "maxpool": AdaptMode._maxpool,
    "shape_only": AdaptMode._shape_only,
}


def unfolded(key: str) -> PlanError:
    """The error for a batch norm that was not run on the very output that it was folded into."""
    return PlanError(
        "The batch norm after a layer was not run on that layer's output, as it was on the sample",
        where=key,
        why="it is computed with the layer, so another reader would see normalised values",
        fix="Register hooks before adapt(), take the same way through the model, or adapt with a sample that takes it.",
    )


def _without_gradient(operation: Operation, norm: Norm | None, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if norm is None or operation.layer is None or operation.weight is None:
        return operation.compute(operation.x)
    return folded_forward(operation.layer, operation.x, operation.weight, operation.bias, norm, gamma, beta)


def _torch_does_it(x: Tensor, layer: Layer, codec: Codec, trains: bool) -> bool:
    """Whether torch's own function keeps no more: the input itself (not a copy in order), or nothing but the weight."""
    if trains and layer.kind == "conv" and layer.is_depthwise:
        return False
    return codec == Keep() and x.is_contiguous() if trains else layer.kind == "linear"


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which autocast computes layers, or None outside of it."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def _living(table: dict[int, tuple[Any, Any]], tensor: Tensor) -> Any:
    """What is known of this very tensor; None when its number was another's before."""
    found = table.get(id(tensor))
    return found[1] if found is not None and found[0]() is tensor else None
