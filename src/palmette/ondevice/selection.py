"""Selection: which channels of which layers are trained, within the budget, and how that changes between epochs.

A selection method is a function `make(config) -> Selector`. The selector sees the network through a `View` and says
which channels come first; the view takes them in that order for as long as the budget has room. Everything else but the
last layer is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from palmette.errors import PlanError
from palmette.graph.inputs import call
from palmette.meter.calls import opened
from palmette.ondevice.codec import Codec
from palmette.ondevice.layer import Layer
from palmette.ondevice.names import Namer
from palmette.ondevice.operations import parse
from palmette.ondevice.plan import MemoryPlan
from palmette.ondevice.planner import Costs, Draft, always_kept, draft, infeasible, lossless, memory_plan, parameters_of
from palmette.ondevice.probe import channel_norms
from palmette.ondevice.search import Request, training_only
from palmette.ondevice.slices import Channels, Rows, slice_bytes, slice_of
from palmette.ondevice.trace import Call, Trace, trace

Axis = Literal["inputs", "outputs"]
_REFILLS = 2
_FIXED_SHARES = (0.5, 0.75, 0.95)  # of the budget, for what is kept whatever channels are chosen; the first that works


class Selector(Protocol):
    """What a selection method implements."""

    axis: Axis
    dynamic: bool

    def start(self, view: View) -> None:
        """Look at the network once, before training."""

    def choose(self, view: View, epoch: int) -> Iterable[tuple[str, int]]:
        """(layer, channel) in the order in which they are to be trained in this epoch."""


@dataclass
class View:
    """A network as a selector sees it.

    layers: the layers that may be trained, by key, in the order of the forward pass. head: the last layer, always
    trained. gradients: norms of the gradients of what is trained, by layer, gathered since the epoch began.
    """

    model: nn.Module
    request: Request
    found: Trace
    costs: Costs
    generator: torch.Generator
    axis: Axis
    layers: dict[str, Call] = field(default_factory=dict)
    head: str = ""
    chosen: dict[str, tuple[int, ...]] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def channels(self, key: str) -> int:
        """How many channels of this layer there are to choose from."""
        layer = self.layer(key)
        return layer.x_shape[layer.channel_axis] if self.axis == "inputs" else layer.out_channels

    def weights_per_channel(self, key: str) -> int:
        """Numbers of the weight that belong to one channel."""
        return math.prod(self.layer(key).weight_shape) // self.channels(key)

    def elements_per_channel(self, key: str) -> int:
        """C_W + C_A of TraDy: numbers of the weight, and of the input of one sample."""
        layer = self.layer(key)
        return self.weights_per_channel(key) + math.prod(layer.x_shape[1:]) // layer.x_shape[layer.channel_axis]

    def weight(self, key: str) -> Tensor:
        """The layer's weight."""
        return dict(self.model.named_parameters())[self.layers[key].weights[0]].detach()

    def gradient_norms(self) -> dict[str, Tensor]:
        """The norm of each channel's weight gradient on the sample, a few layers at a time."""
        limit = max([entry.storage_bytes for entry in self.layers.values()] + [self.request.budget or 0])
        request = self.request
        return channel_norms(
            self.model, self.found, request.x, request.y, request.loss, set(self.layers), self.axis, limit=limit
        )

    def outputs(self) -> dict[str, Tensor]:
        """The layers' outputs on the sample, in eval mode: [samples, channels, positions]."""
        recorder = _Outputs(self.model, set(self.layers))
        modes = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            with torch.no_grad(), recorder:
                call(self.model, self.request.x)
        finally:
            for module, training in modes.items():
                module.training = training
        return recorder.found

    def codec(self, key: str, index: Sequence[int]) -> Codec:
        """The codec that keeps what these channels need."""
        layer = self.layer(key)
        ordered = tuple(sorted(index))
        if self.axis == "outputs":
            return Rows(index=ordered)
        return Channels(axis=layer.channel_axis, index=ordered)

    def layer(self, key: str) -> Layer:
        """The geometry of a layer that may be trained."""
        return layer_of(self.layers[key])


def layer_of(entry: Call) -> Layer:
    """The geometry of a call that is a layer's."""
    if entry.layer is None:
        raise PlanError("Only convolutions and linear layers have channels to choose", where=entry.key)
    return entry.layer


class _Outputs(torch.overrides.TorchFunctionMode):
    """Keeps the outputs of layers of a forward pass without gradients."""

    def __init__(self, model: nn.Module, keys: set[str]) -> None:
        super().__init__()
        self.namer, self.keys = Namer(model), keys
        self.found: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = parse(func, args, kwargs)
        composite = opened(func) if operation is None else None
        if composite is not None:
            with self:
                return composite(*args, **kwargs)
        result = func(*args, **kwargs)
        if operation is not None and operation.kind == "layer" and operation.weight is not None:
            key = self.namer.layer(operation.weight)
            if key in self.keys:
                conv = operation.layer is not None and operation.layer.kind == "conv"
                moved = result if conv else result.movedim(-1, 1)
                self.found[key] = moved.reshape(moved.shape[0], moved.shape[1], -1).clone()
        return result


def open_view(model: nn.Module, request: Request, found: Trace, axis: Axis, seed: int = 0) -> View:
    """The view for a request: with as many layers, counted from the last, as leave half of the budget to channels."""
    costs = Costs.of(model, request.copies)
    view = View(model, request, found, costs, torch.Generator().manual_seed(seed), axis)
    layers = [entry for entry in found.layers() if entry.layer is not None and not entry.made and entry.weights]
    if axis == "inputs":  # a column of a grouped weight belongs to a channel of every group
        layers = [e for e in layers if layer_of(e).groups == 1 or layer_of(e).weight_shape[1] == 1] or layers[-1:]
    single = [entry for entry in layers if "#" not in entry.key and found.times_used(entry.weights[0]) == 1]
    view.head = layers[-1].key
    pool = [entry for entry in single if entry.key != view.head]
    view.layers = {entry.key: entry for entry in pool}
    if request.budget is not None:
        for share in _FIXED_SHARES:
            view.layers = {entry.key: entry for entry in _reached(view, pool, share * request.budget)}
            room = request.budget - _fixed_bytes(view, list(view.layers.values()))
            if any(sum(_price(view, key)) <= room for key in view.layers):
                break
    return view


def _reached(view: View, pool: Sequence[Call], most: float) -> Sequence[Call]:
    """The longest tail of the pool that keeps at most this many bytes beside its channels: they fall as it shortens."""
    low, high = 0, len(pool)
    while low < high:
        middle = (low + high) // 2
        if _fixed_bytes(view, pool[middle:]) <= most:
            high = middle
        else:
            low = middle + 1
    return pool[low:]


def _fixed_bytes(view: View, pool: Sequence[Call]) -> int:
    """What is kept, beside the channels, when these layers may be trained."""
    free: dict[str, Codec] = {entry.key: Channels(axis=layer_of(entry).channel_axis) for entry in pool}
    return _drafted(view, free).nbytes


def _drafted(view: View, codecs: Mapping[str, Codec]) -> Draft:
    """The draft in which just these layers and the head are trained."""
    entries = {entry.key: entry for entry in view.found.layers()}
    trained = {entries[key].weights[0] for key in codecs}
    trained |= set(parameters_of(view.found, entries[view.head]))
    frozen = tuple(sorted(view.costs.trained - trained))
    with training_only(view.model, frozen):
        found = trace(view.model, view.request.x, view.request.y, view.request.loss)
    known = {**lossless(found), **codecs}
    used: dict[str, Codec] = {entry.key: known[entry.key] for entry in found.layers()}
    whole: int = view.costs.bytes(entries[key].weights[0] for key in codecs)
    parts: int = sum(slice_bytes(codec, layer_of(entries[key]), entries[key].itemsize) for key, codec in codecs.items())
    made = draft(found, used, view.costs, frozen=frozen)
    total: int = made.nbytes - whole + view.costs.copies * parts
    return replace(made, nbytes=total)


def fill(view: View, order: Iterable[tuple[str, int]]) -> MemoryPlan:
    """The plan that trains channels in this order for as long as the budget has room.

    Raises BudgetError when not even the head and one channel fit.
    """
    budget = view.request.budget
    waiting, places = list(order), {key: place for place, key in enumerate(view.layers)}
    if budget is None:
        _take(view, {}, waiting, None)
        return _plan(view)[0]
    base = _fixed_bytes(view, list(view.layers.values()))
    chosen: dict[str, list[int]] = {}
    waiting = _take(view, chosen, waiting, budget - base)
    plan, nbytes = _plan(view)
    if nbytes > budget or (waiting and not chosen):
        least = max(nbytes, _least(view))
        raise infeasible(
            budget, least, f"the last layer, {view.head}, is always trained, and one channel", view.request
        )
    for _ in range(_REFILLS if chosen else 0):  # layers that were not drawn keep less than was set aside for them
        first, before = min(places[key] for key in chosen), dict(view.chosen)
        waiting = _take(view, chosen, [pair for pair in waiting if places[pair[0]] >= first], budget - nbytes)
        refilled, nbytes = _plan(view)
        if nbytes > budget:
            view.chosen = before
            break
        plan = refilled
    return plan


def _least(view: View) -> int:
    """Bytes of the head and one channel of the layer before it."""
    entries = [entry for entry in view.found.layers() if entry.layer is not None and entry.key != view.head]
    if not entries:
        return 0
    view.layers.setdefault(entries[-1].key, entries[-1])
    return _fixed_bytes(view, entries[-1:]) + sum(_price(view, entries[-1].key))


def _take(
    view: View, chosen: dict[str, list[int]], order: list[tuple[str, int]], left: int | None
) -> list[tuple[str, int]]:
    """Add channels to `chosen` in this order while `left` bytes last; what did not fit. Sets the view's choice."""
    prices = {key: _price(view, key) for key in view.layers}
    kept = always_kept(view.found)
    held = kept | {view.layers[key].storage for key in chosen}
    refused: list[tuple[str, int]] = []
    for key, channel in order:
        each, first = prices[key]
        storage = view.layers[key].storage
        price = each + (0 if storage in held else first)
        if left is not None and price > left:
            refused.append((key, channel))
            continue
        if left is not None:
            left -= price
        held.add(storage)
        chosen.setdefault(key, []).append(channel)
    view.chosen = {key: tuple(sorted(index)) for key, index in chosen.items()}
    return refused


def _price(view: View, key: str) -> tuple[int, int]:
    """Bytes that each channel of this layer costs, and those that the first one of its input costs once."""
    entry = view.layers[key]
    part = view.costs.copies * view.weights_per_channel(key) * entry.itemsize
    if view.axis == "outputs":
        return part, entry.storage_bytes
    return part + view.codec(key, (0,)).nbytes(entry.shape, entry.itemsize), 0


def _plan(view: View) -> tuple[MemoryPlan, int]:
    """The plan for the view's choice, and its bytes in the scope."""
    codecs = {key: view.codec(key, index) for key, index in view.chosen.items()}
    made = _drafted(view, codecs)
    plan = memory_plan(made, view.request.blank(), {})
    slices = {key: slice_of(codec, view.layer(key)) for key, codec in codecs.items()}
    whole = tuple(view.layers[key].weights[0] for key in slices)
    return replace(plan, slices=slices, frozen=tuple(sorted({*plan.frozen, *whole}))), made.nbytes
