"""Peak memory of inference, by liveness over a captured graph.

The graph runs once on fake tensors, which have shapes, strides and storages but no memory. So views, in-place results
and reshapes that must copy are what the operators make them, not what a list of names says. A storage is born in the
step that first returns it and dies after the last step that uses any view of it. What a step allocates beside its
results (the copies inside a matrix product, the statistics of a norm) counts while it runs. Nothing is assumed to be
computed in place. Not counted: parameters and buffers (see `param_bytes`), scratch space inside one kernel (torch does
not report it), and Python variables of the original code that outlive their last use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palmette.errors import InputError
from palmette.meter.compute import evaluating

Operators = Literal["own", "core"]
"""Whose operators run: those that the network calls, or what they become in PyTorch's core set."""


def peak_bytes(
    captured: fx.GraphModule, batch: int = 1, *, hold_inputs: bool = True, operators: Operators = "own"
) -> int:
    """Largest number of bytes that inputs and activations occupy at once during one eval forward pass at `batch`.

    hold_inputs: the caller keeps the inputs for the whole pass, as with PyTorch and ONNX Runtime; False frees them
    after their last use, as a planned arena does. operators: "core" counts what an operator becomes for a runtime that
    has only PyTorch's core set, such as ExecuTorch without a delegate: a hardswish becomes five operators, and needs
    three tensors where its own kernel needs two. Raises InputError when the graph cannot be followed without data.
    """
    return max(live_bytes(captured, batch, hold_inputs=hold_inputs, operators=operators).values(), default=0)


def live_bytes(
    captured: fx.GraphModule, batch: int = 1, *, hold_inputs: bool = True, operators: Operators = "own"
) -> dict[str, int]:
    """For every node of the graph, by name and in execution order: the bytes that are occupied while it runs."""
    steps = follow(captured, batch, operators)
    end = len(steps) - 1
    sizes: dict[int, int] = {}
    birth: dict[int, int] = {}
    death: dict[int, int] = {}
    for position, step in enumerate(steps):
        for storage, size in step.returned.items():
            sizes[storage] = size
            birth.setdefault(storage, position)
            death[storage] = end if step.is_input and hold_inputs else max(position, death.get(storage, 0))
        for storage in step.used & sizes.keys():
            death[storage] = max(position, death[storage])
    change = [0] * (len(steps) + 1)  # in bytes that stand from one step to the next
    for storage, size in sizes.items():
        change[birth[storage] + 1] += size
        change[death[storage] + 1] -= size
    live, standing = {}, 0
    for step, delta in zip(steps, change, strict=False):
        standing += delta
        live[step.name] = standing + step.allocated
    return live


@dataclass
class Step:
    """What a node returned (storage -> bytes, weights left out), what it used, and the most it had newly allocated."""

    name: str
    is_input: bool
    returned: dict[int, int]
    used: set[int]
    allocated: int


def follow(captured: fx.GraphModule, batch: int, operators: Operators = "own") -> list[Step]:
    """What every node of the graph does to memory in an eval forward pass at `batch`, in execution order.

    operators: as in `peak_bytes`. Raises InputError when the graph cannot be followed without data.
    """
    with evaluating(captured), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        follower = _Follower(captured, fake, _core() if operators == "core" else {})
        try:
            follower.run(*fake_inputs(captured, batch), enable_io_processing=False)
        except Exception as error:
            raise InputError(
                "Peak memory cannot be computed",
                where=follower.where,
                why=f"the operation cannot run without data ({type(error).__name__}: {str(error).splitlines()[0]})",
            ) from error
    return follower.steps


def fake_inputs(captured: fx.GraphModule, batch: int) -> list[Tensor | None]:
    """Inputs as captured, with the first axis of all that share the captured batch size set to `batch`."""
    metas = [node.meta for node in captured.graph.nodes if node.op == "placeholder"]
    shapes = [meta["shape"] for meta in metas]
    captured_batch = next((shape[0] for shape in shapes if shape), None)
    found: list[Tensor | None] = []
    for shape, meta in zip(shapes, metas, strict=True):
        if shape and shape[0] == captured_batch:
            shape = (batch, *shape[1:])
        found.append(None if shape is None else torch.zeros(shape, dtype=meta["dtype"]))
    return found


class _Follower(fx.Interpreter):
    """Runs a graph on fake tensors; keeps every value, so that a storage's address is its name."""

    def __init__(self, captured: fx.GraphModule, fake: FakeTensorMode, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__(captured, garbage_collect_values=False)
        self.fake, self.table = fake, table
        self.where = ""
        self.steps: list[Step] = []
        self.weights: set[int] = set()
        self.storages: dict[fx.Node, set[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.where = str(n.meta.get("path", n.name))
        with _Allocations(self.table) as allocations:
            result = super().run_node(n)
        tensors = [] if n.op == "output" else [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        sizes = {_address(t): t.untyped_storage().nbytes() for t in tensors}
        if n.op == "get_attr":
            self.weights |= sizes.keys()
        used = set().union(*(self.storages[source] for source in n.all_input_nodes))
        self.storages[n] = set(sizes)
        returned = {storage: size for storage, size in sizes.items() if storage not in self.weights}
        fresh = sum(size for storage, size in returned.items() if storage not in used)
        self.steps.append(Step(n.name, n.op == "placeholder", returned, used, max(fresh, allocations.peak)))
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.fake.from_tensor(value) if isinstance(value, Tensor) else value


@cache
def _core() -> dict[Any, Callable[..., Any]]:
    """Operators that are not in PyTorch's core set, and what export makes of them; linear layers stay whole."""
    table: dict[Any, Callable[..., Any]] = dict(torch._decomp.core_aten_decompositions())
    table.pop(torch.ops.aten.linear.default, None)
    return table


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Allocations(TorchDispatchMode):
    """The most bytes that operators had newly allocated at one time; what its schema calls an alias is not new.

    table: what operators are taken apart into.
    """

    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.table = table
        self.peak = 0
        self.current = 0
        self.alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.table:
            with self:
                parts = self.table[func](*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        for value, declared in zip(result if len(returns) > 1 else (result,), returns, strict=True):
            if declared.alias_info is None:
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self.alive:
            self.alive[address] = weakref.ref(storage, lambda _: self._remove(address, size))
            self.current += size
            self.peak = max(self.peak, self.current)

    def _remove(self, address: int, size: int) -> None:
        del self.alive[address]
        self.current -= size
