"""Memory of a training step: what autograd holds for backward, who holds it, and how much is alive at the peak.

Everything is counted per storage, whole: two tensors that share a storage are one, and what two operations keep is
freed only when both let go. The step really runs, under torch's own hooks; nothing is estimated from formulas. Under
fake tensors it runs without data, and gives the same bytes for batches that would not fit.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palmette.device import format_bytes
from palmette.errors import InputError
from palmette.graph.inputs import call, main_output, map_tensors, tensors
from palmette.meter.calls import Calls, HeldBy, is_measuring, labelled, opened, recording
from palmette.meter.compute import param_bytes
from palmette.seeding import global_state, restore_globals

__all__ = ["HeldBy", "Holder", "TrainingMemory", "is_measuring", "labelled", "measure_training", "opened"]

_SHOWN = 12  # holders in the printed table; all are in `holders`


@dataclass(frozen=True)
class Holder:
    """One storage that autograd holds: its bytes, shape and dtype of the tensor in it, and the calls that keep it."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    holders: tuple[HeldBy, ...]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"{format_bytes(self.bytes)}  {self.dtype} {shape}  {' + '.join(map(str, self.holders))}"


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of one training step.

    saved_bytes: the most that autograd held for backward at one time, parameters and buffers left out.
    forward_saved_bytes: the same when the loss has been computed; `holders` lists these storages, the largest first.
    peak_bytes: the most that was alive at one time, gradients, inputs and targets included, parameters and buffers not;
    peak_where: the call at that time. gradient_bytes: gradients of the parameters after the step.
    device_peak_bytes: what the CUDA allocator gave out at most beyond what it had given before; None without CUDA.
    """

    saved_bytes: int
    forward_saved_bytes: int
    peak_bytes: int
    peak_where: str
    gradient_bytes: int
    param_bytes: int
    device_peak_bytes: int | None
    holders: tuple[Holder, ...]

    def by_operation(self) -> list[tuple[str, int, float]]:
        """(operations, bytes, share of `forward_saved_bytes`), the largest first.

        A storage that several operations keep is in one group of its own: "batch_norm + conv2d".
        """
        return self._grouped(lambda held: held.operation)

    def by_module(self, depth: int | None = None) -> list[tuple[str, int, float]]:
        """(modules, bytes, share of `forward_saved_bytes`), the largest first; paths cut to `depth` parts.

        A storage that several modules keep is in one group of its own. The model itself is "(model)".
        """
        return self._grouped(lambda held: ".".join(held.module.split(".")[:depth]) or "(model)")

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON."""
        totals = {name: value for name, value in vars(self).items() if name != "holders"}
        holders = [
            {
                "bytes": holder.bytes,
                "shape": list(holder.shape),
                "dtype": holder.dtype,
                "holders": [{"operation": held.operation, "module": held.module} for held in holder.holders],
            }
            for holder in self.holders
        ]
        return totals | {"holders": holders}

    def __str__(self) -> str:
        device = [] if self.device_peak_bytes is None else [("Peak of the CUDA allocator", self.device_peak_bytes, "")]
        again = f"{format_bytes(self.forward_saved_bytes)} of it when the loss was computed"
        totals = [
            ("Held for backward", self.saved_bytes, again),
            ("Peak", self.peak_bytes, self.peak_where),
            *device,
            ("Gradients", self.gradient_bytes, ""),
            ("Parameters", self.param_bytes, ""),
        ]
        lines = [f"{name:<26} {format_bytes(size):>10}  {note}".rstrip() for name, size, note in totals]
        lines += ["", "By operation"]
        lines += [f"{share:>7.1%} {format_bytes(size):>10}  {name}" for name, size, share in self.by_operation()]
        lines += ["", "Held at the end of forward"]
        lines += [f"  {holder}" for holder in self.holders[:_SHOWN]]
        if len(self.holders) > _SHOWN:
            rest = sum(holder.bytes for holder in self.holders[_SHOWN:])
            lines.append(f"  {format_bytes(rest)} in {len(self.holders) - _SHOWN} others")
        return "\n".join(lines)

    def _grouped(self, name: Callable[[HeldBy], str]) -> list[tuple[str, int, float]]:
        sizes: Counter[str] = Counter()
        for holder in self.holders:
            sizes[" + ".join(sorted({name(held) for held in holder.holders}))] += holder.bytes
        total = max(self.forward_saved_bytes, 1)
        return [(group, size, size / total) for group, size in sizes.most_common()]


def measure_training(
    model: nn.Module, x: Any, y: Any = None, loss: Callable[[Any, Any], Tensor] | None = None
) -> TrainingMemory:
    """Bytes of one training step (forward, loss, backward) of `model` in its present mode.

    x: a tensor, tuple or dict, as the model is called; y: the target. loss(output, y) -> scalar; by default the mean of
    the output without y, the cross entropy for integer targets, the mean squared error for floating ones.

    Gradients, buffers and the global random generators are as before afterwards. Gradients start from none, so a step
    that accumulates into earlier ones keeps `gradient_bytes` more. Where `model` and `x` are fake tensors, call this
    inside their FakeTensorMode; the model and the loss may then not ask for a value (`.item()`, a branch on data).
    Not seen: scratch space inside one kernel (under fake tensors also the workspace that an LSTM on a CPU keeps). Part
    of the peak, but not of what autograd holds: tensors that a function keeps by other means than `save_for_backward`,
    and those under someone else's saved-tensor hooks, such as what non-reentrant checkpointing recomputes.

    Raises InputError when the loss is not a scalar, or when nothing that it depends on is trainable.
    """
    modules = _modules(model, loss)
    weights = {
        address for module in modules.values() for tensor in tensors_of(module) for address in storages_of(tensor)
    }
    with left_as_found(modules.values()), torch.inference_mode(mode=False), torch.enable_grad():
        x, y = (map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), given) for given in (x, y))
        with recording(modules.items()) as calls, Live(weights, calls.where) as live, _device_peak(model, x) as device:
            held = _Held(weights, calls)
            live.see((x, y))
            with saved_tensors_hooks(held.pack, held.unpack):
                output = call(model, x)  # kept to the end, as a training loop does
                with calls.inside("loss"):
                    value = _loss(model, output, y, loss)
                holders = held.holders()
                calls.start_backward()
                torch.autograd.backward(value)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return TrainingMemory(
            saved_bytes=held.peak,
            forward_saved_bytes=sum(holder.bytes for holder in holders),
            peak_bytes=live.peak,
            peak_where=live.where,
            gradient_bytes=_unique_bytes(grads),
            param_bytes=param_bytes(model),
            device_peak_bytes=device[0] if device else None,
            holders=holders,
        )


def _modules(model: nn.Module, loss: Any) -> dict[str, nn.Module]:
    """The modules of the step by path; those of a loss that is a module below "loss"."""
    modules = dict(model.named_modules())
    if isinstance(loss, nn.Module):
        known = set(modules.values())
        modules |= {path: module for path, module in loss.named_modules(prefix="loss") if module not in known}
    return modules


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module itself."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _loss(model: nn.Module, output: Any, y: Any, loss: Callable[[Any, Any], Tensor] | None) -> Tensor:
    """The loss of the output, a scalar that something trainable leads to."""
    value: Any = default_loss(output, y) if loss is None else loss(output, y)
    return check_loss(model, value)


def check_loss(model: nn.Module, value: Any) -> Tensor:
    """The loss, if it is a scalar that something trainable leads to; InputError otherwise."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise InputError(
            "The loss is not a scalar", where=found, fix="Reduce it, for instance with .mean(); or pass another loss."
        )
    if not value.requires_grad:
        trainable = any(p.requires_grad for p in model.parameters())
        raise InputError(
            "There is nothing to train",
            why="the loss depends on no trainable parameter" if trainable else "all parameters are frozen",
            fix="Set requires_grad on what is to be trained, and do not detach the output.",
        )
    return value


def default_loss(output: Any, y: Any) -> Tensor:
    """Mean of the output without y; cross entropy for integer targets, mean squared error for floating ones.

    Raises InputError for a target that fits neither.
    """
    logits = main_output(output)
    if y is None:
        return logits.mean()
    if not isinstance(y, Tensor):
        raise InputError(f"No default loss takes a target of type {type(y).__name__}", fix="Pass loss(output, y).")
    if not y.is_floating_point():
        return F.cross_entropy(logits, y)
    if y.shape != logits.shape:
        shapes = f"the output has shape {tuple(logits.shape)}, the target {tuple(y.shape)}"
        raise InputError("The mean squared error cannot be taken", why=shapes, fix="Pass loss(output, y).")
    return F.mse_loss(logits, y)


@contextmanager
def left_as_found(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Take the gradients away for the block; after it, put back gradients, buffers and the global generators."""
    modules = list(modules)
    with unset_fake_temporarily():
        generators = global_state()
    tables = [(m._buffers, dict(m._buffers), m._non_persistent_buffers_set) for m in modules]
    passing = [(names, set(names)) for _, _, names in tables]
    found = {b for _, buffers, _ in tables for b in buffers.values() if b is not None}
    # an expanded tensor cannot be written into, by the model or here
    values = {b: b.detach().clone() for b in found if torch._debug_has_internal_overlap(b) != 1}
    grads = {p: p.grad for m in modules for p in m._parameters.values() if p is not None}
    try:
        for parameter in grads:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in grads.items():
            parameter.grad = grad
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)
        for table, buffers, _ in tables:
            table.clear()
            table.update(buffers)
        for names, before in passing:
            names.clear()
            names.update(before)
        with unset_fake_temporarily():
            restore_globals(generators)


@contextmanager
def _device_peak(model: nn.Module, x: Any) -> Iterator[list[int]]:
    """A list that holds, after the block, what CUDA gave out at most beyond what it had given; empty without CUDA."""
    used = [t for t in (*model.parameters(), *tensors(x)) if t.is_cuda and not isinstance(t, FakeTensor)]
    devices = {t.device for t in used}
    before = {}
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    peak: list[int] = []
    yield peak
    for device in devices:
        torch.cuda.synchronize(device)
    if devices:
        peak.append(sum(torch.cuda.max_memory_allocated(device) - before[device] for device in devices))


def storages_of(tensor: Tensor) -> dict[int, torch.UntypedStorage]:
    """The storages of a tensor by address; a sparse tensor has two, a tensor of an opaque layout has none."""
    if tensor.layout == torch.sparse_coo:
        return storages_of(tensor._indices()) | storages_of(tensor._values())
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return {}
    return {storage._cdata: storage}


def _unique_bytes(found: Iterable[Tensor]) -> int:
    return sum({address: s.nbytes() for t in found for address, s in storages_of(t).items()}.values())


class _Kept:
    """What autograd is given in place of a tensor; while it lives, autograd holds the tensor."""

    __slots__ = ("_held", "_number", "tensor")

    def __init__(self, tensor: Tensor, number: int, held: _Held) -> None:
        self.tensor = tensor
        self._number = number
        self._held = held

    def __del__(self) -> None:
        self._held.release(self._number)


@dataclass
class _Record:
    """A storage that autograd holds, and the calls that hold it, by the number of the tensor."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    calls: dict[int, HeldBy]


class _Held:
    """The storages that autograd holds, weights left out: `pack` and `unpack` are its hooks."""

    def __init__(self, weights: set[int], calls: Calls) -> None:
        self.peak = self._current = self._packed = 0
        self._weights = weights
        self._calls = calls
        self._records: dict[int, _Record] = {}
        self._where: dict[int, list[int]] = {}  # the addresses of a kept tensor, by its number

    def pack(self, tensor: Tensor) -> _Kept:
        """Note who takes this tensor."""
        storages = {a: s for a, s in storages_of(tensor).items() if a not in self._weights}
        self._packed += 1
        self._where[self._packed] = list(storages)
        for address, storage in storages.items():
            if address not in self._records:
                size = storage.nbytes()
                dtype = str(tensor.dtype).removeprefix("torch.")
                self._records[address] = _Record(size, tuple(tensor.shape), dtype, {})
                self._current += size
            self._records[address].calls[self._packed] = self._calls.keeper()
        self.peak = max(self.peak, self._current)
        return _Kept(tensor, self._packed, self)

    @staticmethod
    def unpack(kept: _Kept) -> Tensor:
        """The tensor itself."""
        return kept.tensor

    def release(self, number: int) -> None:
        """Autograd let go of the tensor of this number."""
        for address in self._where.pop(number):
            record = self._records[address]
            del record.calls[number]
            if not record.calls:
                self._current -= record.bytes
                del self._records[address]

    def holders(self) -> tuple[Holder, ...]:
        """What is held now, the largest first."""
        found = [
            Holder(r.bytes, r.shape, r.dtype, tuple(dict.fromkeys(r.calls.values()))) for r in self._records.values()
        ]
        return tuple(sorted(found, key=lambda holder: -holder.bytes))


class Live(TorchDispatchMode):
    """The most bytes of storages, weights left out, that were alive at one time; operators show them."""

    def __init__(self, weights: set[int], caller: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._current = 0
        self.where = ""
        self._weights = weights
        self._caller = caller
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see((args, kwargs, result))
        return result

    def see(self, values: Any) -> None:
        """Every tensor in `values` is alive now."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                for address, storage in storages_of(tensor).items():
                    if address not in self._alive and address not in self._weights:
                        self._add(address, storage, tensor.dtype)

    def _add(self, address: int, storage: torch.UntypedStorage, _dtype: torch.dtype) -> None:
        size = storage.nbytes()
        self._alive[address] = weakref.ref(storage, lambda _: self._remove(address, size))
        self._current += size
        if self._current > self.peak:
            self.peak, self.where = self._current, self._caller()

    def _remove(self, address: int, size: int) -> None:
        del self._alive[address]
        self._current -= size
