"""One forward pass of the sample, watched: which calls would keep what for backward, and who reads whose output.

Nothing is kept meanwhile: autograd's hooks are handed a number in place of each tensor, so that watching needs no more
memory than inference. Storages are numbered, since a freed one's address comes back.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from palmette.graph.inputs import call
from palmette.meter.calls import opened
from palmette.meter.training import check_loss, left_as_found
from palmette.ondevice.bits import packed_bytes
from palmette.ondevice.layer import Layer
from palmette.ondevice.mode import is_checkpointed, saving_hooks
from palmette.ondevice.names import Namer
from palmette.ondevice.operations import Operation, is_move, parse
from palmette.ondevice.plan import Fold


@dataclass
class Call:
    """One call of the forward pass.

    tensor, storage: numbers of the input that codecs care for. trains: a weight (or gamma) wants a gradient from it.
    grad: anything wants a gradient through it. stock: storages (number -> bytes) that torch's own form keeps.
    source: storage of the tensor from which the input could be computed again, where the operation between keeps it.
    """

    key: str
    kind: str
    name: str
    shape: torch.Size = field(default_factory=torch.Size)
    itemsize: int = 4
    tensor: int = -1
    storage: int = -1
    storage_bytes: int = 0
    x_grad: bool = False
    grad: bool = False
    trains: bool = False
    stays: bool = False  # torch's own form is used whatever the plan says
    own_bytes: int = 0  # of the form used here: masks, places, copies
    out_storage: int = -1
    source: int | None = None
    layer: Layer | None = None
    weights: tuple[str, ...] = ()  # names of the parameters
    made: dict[int, int] = field(default_factory=dict)  # computed weights that are kept: no parameters
    stock: dict[int, int] = field(default_factory=dict)
    reader_of: int = -1  # index of the call whose output this one reads, for norms


@dataclass(frozen=True)
class Trace:
    """All calls in order, and which norm can be computed with the layer before it."""

    calls: tuple[Call, ...]
    folds: dict[str, Fold]
    folded_calls: frozenset[int]  # norms that are computed with their layer
    folded_weights: dict[str, tuple[str, ...]]  # layer -> parameters of its norm

    def stock_bytes(self) -> int:
        """What torch's own forms keep for backward: the network without Palmette."""
        return sum({number: size for entry in self.calls for number, size in entry.stock.items()}.values())

    def uses(self) -> dict[str, tuple[int, int]]:
        """First and last call that each parameter takes part in."""
        found: dict[str, tuple[int, int]] = {}
        for index, entry in enumerate(self.calls):
            for name in entry.weights:
                found[name] = (found.get(name, (index, index))[0], index)
        return found

    def times_used(self, name: str) -> int:
        """How many calls a parameter takes part in."""
        return sum(name in entry.weights for entry in self.calls)

    def layers(self) -> list[Call]:
        """Layers and norms whose parameters want a gradient that needs the input."""
        return [c for i, c in enumerate(self.calls) if c.trains and i not in self.folded_calls]


class _Numbers:
    """A number for every storage and for every state of a tensor, never used twice."""

    def __init__(self) -> None:
        self._next = 0
        self._storages: dict[int, tuple[Any, int]] = {}
        self._tensors: dict[int, tuple[Any, int, int]] = {}

    def storage(self, tensor: Tensor) -> int:
        """The storage's number."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        found = self._storages.get(address)
        if found is None or found[0]() is None:
            self._next += 1
            found = self._storages[address] = (weakref.ref(storage), self._next)
        return found[1]

    def tensor(self, tensor: Tensor) -> int:
        """The number of this tensor in its present state."""
        found = self._tensors.get(id(tensor))
        if found is None or found[0]() is not tensor or found[1] != tensor._version:
            self._next += 1
            found = self._tensors[id(tensor)] = (weakref.ref(tensor), tensor._version, self._next)
        return found[2]


class _Recorder(TorchFunctionMode):
    """Runs every call as torch would and notes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.namer = Namer(model)
        self.numbers = _Numbers()
        self.weights = {t.untyped_storage()._cdata for t in self.namer.names.all()}
        self.current = Call("", "other", "autograd function")  # no call in flight: a Function of the model's own
        self.calls: list[Call] = [self.current]
        self.hooks: Any = None  # those of the trace itself
        self.norms: dict[int, Fold | None] = {}  # by name: the tensors would stay alive
        self.made_by: dict[int, int] = {}  # number of a tensor -> index of the layer that returned it
        self.reads: Counter[int] = Counter()
        self.recipes: dict[int, int] = {}  # number of a tensor -> storage of its source
        self.watching = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = parse(func, args, kwargs) if self.watching and not is_checkpointed(self.hooks) else None
        composite = opened(func) if operation is None else None
        if composite is not None:
            with self:
                return composite(*args, **kwargs)
        read = [self.numbers.tensor(tensor) for tensor in _tensors((args, kwargs))]
        noted = self._noted(operation) if operation is not None else Call("", "other", getattr(func, "__name__", ""))
        noted.weights = noted.weights or tuple(
            name for t in _tensors((args, kwargs)) if (name := self.namer.name(t)) is not None
        )
        source = None if operation is not None or not is_move(func) else self._source(args[0])
        before, self.current = self.current, noted
        index = len(self.calls)
        self.calls.append(noted)
        try:
            result = func(*args, **kwargs)
        finally:
            self.current = before
        # asking for a size is not reading
        if getattr(func, "__name__", "") in _READERS or any(True for _ in _tensors(result)):
            self.reads.update(read)
        self._finish(index, operation, result, source)
        return result

    def pack(self, tensor: Tensor) -> int:
        """Note that the call in flight keeps this tensor; autograd gets a number instead."""
        if tensor.layout == torch.strided and tensor.untyped_storage()._cdata not in self.weights:
            self.current.stock[self.numbers.storage(tensor)] = tensor.untyped_storage().nbytes()
        return 0

    def _noted(self, operation: Operation) -> Call:
        x = operation.x
        noted = Call(
            "",
            operation.kind,
            operation.name,
            x.shape,
            x.element_size(),
            self.numbers.tensor(x),
            self.numbers.storage(x),
            x.untyped_storage().nbytes() if x.untyped_storage()._cdata not in self.weights else 0,
            x.requires_grad and torch.is_grad_enabled(),
            layer=operation.layer,
        )
        parameters = [t for t in (operation.weight, operation.bias) if t is not None]
        if torch.is_grad_enabled():
            noted.grad = x.requires_grad or any(t.requires_grad for t in parameters)
            noted.trains = operation.weight is not None and operation.weight.requires_grad
        noted.weights = tuple(name for t in parameters if (name := self.namer.name(t)) is not None)
        noted.source = self._source(x)
        noted.stays = operation.inplace and x._is_view()
        if operation.kind == "layer" and operation.weight is not None:
            noted.key = self.namer.layer(operation.weight)
            for t in parameters[:1]:
                if t.untyped_storage()._cdata not in self.weights and t.requires_grad | x.requires_grad:
                    noted.made[self.numbers.storage(t)] = t.untyped_storage().nbytes()
        elif operation.kind == "norm":
            noted.reader_of = self.made_by.get(noted.tensor, -1)
            self.norms[len(self.calls)] = _fold(self.namer, operation)
            if operation.weight is not None:
                noted.key = self.namer.norm(operation.weight)
        else:
            noted.key = self.namer.other(operation.name)
        return noted

    def _finish(self, index: int, operation: Operation | None, result: Any, source: int | None) -> None:
        if not isinstance(result, Tensor):
            return
        number = self.numbers.tensor(result)
        if source is not None:
            self.recipes[number] = source
        if operation is None:
            return
        noted = self.calls[index]
        noted.out_storage = self.numbers.storage(result)
        noted.own_bytes = _own_bytes(operation, result)
        if operation.kind == "layer":
            if operation.bias is None or self.namer.name(operation.bias) is not None:
                self.made_by[number] = index
        elif operation.kind in ("smooth", "recipe"):
            if operation.inplace and not noted.stays:
                noted.storage = -1 - index  # the copy that is kept in place of the input
            self.recipes[number] = noted.storage

    def _source(self, x: Any) -> int | None:
        return self.recipes.get(self.numbers.tensor(x)) if isinstance(x, Tensor) else None


_READERS = {"register_hook", "retain_grad", "tolist", "item", "numpy", "__array__", "__float__", "__int__", "__bool__"}


def _own_bytes(operation: Operation, result: Tensor) -> int:
    count = result.numel()
    if operation.kind in ("masked", "dropout"):
        return packed_bytes(count)
    if operation.kind == "maxpool" and operation.window is not None:
        return packed_bytes(count, operation.window.bits or 8)
    if operation.kind == "smooth" and operation.inplace:
        return count * result.element_size()
    return 0


def _tensors(values: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def trace(model: nn.Module, x: Any, y: Any = None, loss: Callable[[Any, Any], Tensor] | None = None) -> Trace:
    """The calls of one forward pass of `model` on `x`, and of the loss. The model is not changed."""
    recorder = _Recorder(model)
    numbered = torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda number: number)
    with left_as_found(model.modules()), torch.enable_grad(), numbered, recorder:
        recorder.hooks = saving_hooks()
        output = call(model, x)
        for tensor in _tensors(output):
            recorder.reads[recorder.numbers.tensor(tensor)] += 1
        if loss is not None:
            recorder.watching = False
            check_loss(model, loss(output, y))
    return _assembled(recorder)


def _assembled(recorder: _Recorder) -> Trace:
    folds: dict[str, Fold] = {}
    folded: set[int] = set()
    weights: dict[str, tuple[str, ...]] = {}
    for index, fold in recorder.norms.items():
        norm = recorder.calls[index]
        layer = recorder.calls[norm.reader_of] if norm.reader_of >= 0 else None
        if fold is None or layer is None or recorder.reads[norm.tensor] != 1 or layer.made or not layer.weights:
            continue
        if layer.layer is None or layer.layer.channel_axis != 1 or layer.out_storage in recorder.calls[0].stock:
            continue  # a linear layer's outputs lie on the last axis, a norm's channels on the second
        folds[layer.key] = fold
        folded.add(index)
        weights[layer.key] = norm.weights
        layer.trains |= norm.trains
        layer.grad |= norm.grad
    return Trace(tuple(recorder.calls), folds, frozenset(folded), weights)


def _fold(namer: Namer, operation: Operation) -> Fold | None:
    """The norm by the names of its tensors; None when one has no name."""
    given = [operation.mean, operation.var, operation.weight, operation.bias]
    names = [namer.name(t) for t in given]
    if any(t is not None and name is None for t, name in zip(given, names, strict=True)):
        return None
    mean, var, weight, bias = names
    return None if mean is None or var is None else Fold(mean, var, operation.eps, weight, bias)


def saved_bytes(found: Trace, codecs: dict[str, Any], stock: Iterable[str] = ()) -> int:
    """Bytes that autograd will keep for backward under these codecs, by formula; see `holders`."""
    return sum(holders(found, codecs, stock).values())


def holders(found: Trace, codecs: dict[str, Any], stock: Iterable[str] = ()) -> dict[Any, int]:
    """What will be kept: storages by number, and payloads by (tensor, codec); the same thing once."""
    kept: dict[Any, int] = {}
    left = set(stock)
    for index, entry in enumerate(found.calls):
        kept |= _kept_by(found, index, entry, codecs, left)
    return kept


def _kept_by(found: Trace, index: int, entry: Call, codecs: dict[str, Any], stock: set[str]) -> dict[Any, int]:
    if index in found.folded_calls:
        return {}
    if entry.kind == "other" or entry.kind == "recipe" or entry.stays:
        return entry.stock
    if entry.kind in ("layer", "norm"):
        return _kept_by_layer(entry, codecs) if entry.grad else {}
    if not entry.x_grad or entry.kind == "shape_only":
        return {}
    if entry.kind == "smooth":
        return {entry.storage: entry.own_bytes} if entry.own_bytes else entry.stock
    if entry.key in stock:
        return entry.stock
    return {(index, entry.kind): entry.own_bytes}


def _kept_by_layer(entry: Call, codecs: dict[str, Any]) -> dict[Any, int]:
    if not entry.trains:
        return entry.made
    codec = codecs[entry.key]
    if codec.keeps_input:
        return entry.made | ({entry.storage: entry.storage_bytes} if entry.storage_bytes else {})
    if not codec.fresh:
        return entry.made
    return entry.made | {(entry.tensor, codec): codec.nbytes(entry.shape, entry.itemsize)}
