"""Run a captured network as one of its sub-networks: the same weights, sliced as they are read, blocks left out.

Nothing is copied or moved: a slice is a view, or a selection, of the one weight that all sub-networks share, so that a
gradient reaches what is active and is exactly zero everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.graph.int8 import rounded
from palmette.graph.ops import BATCH_NORMS, get_tensor
from palmette.graph.resize import narrow, resized_args
from palmette.graph.spans import Run
from palmette.supernet.transforms import KernelTransforms

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Running mean and variance of each batch norm of a sub-network, by its path."""


@dataclass(frozen=True)
class Cut:
    """What a configuration leaves of a captured network.

    `decision`: of `resize`. `dropped`: runs of blocks to be skipped. `int8`: names of weights stored in 8 bits.
    """

    decision: dict[str, Any]
    dropped: tuple[Run, ...] = ()
    int8: frozenset[str] = frozenset()

    @property
    def skipped(self) -> set[fx.Node]:
        """The nodes that do not run."""
        return {node for run in self.dropped for block in run for node in block.region}


class Runner:
    """Runs a captured graph with a cut. `transforms`: what kernels become as they shrink; their centres without it."""

    def __init__(self, gm: fx.GraphModule, cut: Cut, transforms: KernelTransforms | None = None) -> None:
        self.gm, self.int8, self.transforms = gm, cut.int8, transforms
        self.layers = {entry["path"]: entry for entry in cut.decision["layers"]}
        self.states: dict[str, list[dict[str, Any]]] = {}
        for entry in cut.decision["states"]:
            self.states.setdefault(entry["state"], []).append(entry)
        sizes = {entry["path"]: entry for entry in cut.decision["sizes"]}
        skipped = cut.skipped
        became = {block.output: block.source for run in cut.dropped for block in run}

        def standing(node: fx.Node) -> fx.Node:
            while node in became:
                node = became[node]
            return node

        self.nodes = [node for node in gm.graph.nodes if node not in skipped]
        self.args: dict[fx.Node, tuple[Any, Any]] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            args = resized_args(node, sizes[node.meta["path"]]) if _resized(node, sizes) else node.args
            self.args[node] = fx.node.map_arg(args, standing), fx.node.map_arg(node.kwargs, standing)
            for source in node.all_input_nodes:
                last[standing(source)] = node
        self.frees: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            self.frees.setdefault(node, []).append(source)

    def __call__(self, leaves: list[Any], statistics: Statistics | None = None) -> Any:
        """The output for the leaves of the inputs, in the order of the placeholders."""
        values: dict[fx.Node, Any] = {}
        waiting = iter(leaves)
        for node in self.nodes:
            args, kwargs = (fx.node.map_arg(part, values.__getitem__) for part in self.args[node])
            if node.op == "placeholder":
                values[node] = next(waiting)
            elif node.op == "get_attr":
                values[node] = self._state(str(node.target))
            elif node.op == "call_module":
                values[node] = self._module(node, statistics)(*args, **kwargs)
            elif node.op == "output":
                return self.gm.graph.process_outputs(args[0])
            else:
                target: Any = node.target
                values[node] = target(*args, **kwargs)
            for source in self.frees.get(node, ()):
                del values[source]
        raise AssertionError("a captured graph has an output")

    def _state(self, name: str) -> Tensor:
        value = get_tensor(self.gm, name)
        for entry in self.states.get(name, ()):
            value = _select(value, entry["axis"], entry)
        return rounded(value) if name in self.int8 else value

    def _module(self, node: fx.Node, statistics: Statistics | None) -> Any:
        layer: Any = self.gm.get_submodule(str(node.target))
        entry = self.layers.get(node.meta["path"])
        own = None if statistics is None else statistics.get(node.meta["path"])
        normalises = isinstance(layer, BATCH_NORMS)
        int8 = f"{node.target}.weight" in self.int8
        if entry is None and own is None and not int8 and not (normalises and layer.training):
            return layer
        twin = _sharing(layer)
        if entry is not None:
            narrow(twin, entry, _cut)
            if self.transforms is not None and "kernel" in entry:
                whole = _sharing(layer)
                narrow(whole, {key: side for key, side in entry.items() if key != "kernel"}, _cut)
                twin.weight = self.transforms(entry["path"], whole.weight, entry["kernel"])
        if int8:
            twin.weight = rounded(twin.weight)
        if own is not None:
            twin.running_mean, twin.running_var = own
        if normalises and layer.training and layer.running_mean is not None:  # the shared statistics stay as they are
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(twin, name, getattr(twin, name).clone())
        return twin


def _resized(node: fx.Node, sizes: Mapping[str, Any]) -> bool:
    return node.op == "call_function" and node.meta.get("path") in sizes


def _sharing(layer: nn.Module) -> Any:
    """A module that shares everything with `layer`, whose tensors can be replaced by any others."""
    twin: Any = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__)
    tensors = {**layer._parameters, **layer._buffers}
    twin.__dict__.update(_parameters={}, _buffers={}, **tensors)
    return twin


def _cut(value: Tensor, axis: int, side: Mapping[str, Any], _: str) -> Tensor:
    return _select(value, axis, side)


def _select(value: Tensor, axis: int, side: Mapping[str, Any]) -> Tensor:
    """What stays of a tensor along an axis: a view where that is one range, differentiable."""
    keep = side["keep"]
    if len(keep) == 1:
        return value.narrow(axis, keep[0][0], keep[0][1] - keep[0][0])
    index = torch.cat([torch.arange(start, stop, device=value.device) for start, stop in keep])
    return value.index_select(axis, index)
