"""A captured network in parts that another process can be sent: torch's own way loses what the nodes know.

`fx.GraphModule` travels as source code that is traced anew, and arrives without paths, shapes, and the names of sites.
Here the nodes travel as they are. Who sends (Ray, say) decides how; Palmette itself stores networks by `save`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from palmette.graph.capture import is_captured


@dataclass(frozen=True)
class _Ref:
    """Stands for a node in another node's arguments."""

    name: str


@dataclass(frozen=True)
class _Op:
    """Stands for one of torch's operations, such as aten.relu.default."""

    name: str


@dataclass(frozen=True)
class Crate:
    """A captured network in parts, which `unpacked` puts together."""

    modules: nn.Module
    nodes: tuple[tuple[Any, ...], ...]
    codegen: Any
    meta: dict[str, Any]
    modes: dict[str, bool]


def packed(value: Any) -> Any:
    """A captured network as a crate, which shares its weights if they are on the CPU; anything else as it is."""
    if not isinstance(value, fx.GraphModule) or not is_captured(value):
        return value
    modules = nn.Module()
    _hand_over(value, modules)
    if any(tensor.device.type != "cpu" for tensor in modules.state_dict().values()):
        modules = copy.deepcopy(modules).cpu()  # the receiver may have no such device
    nodes = tuple(
        (n.op, n.name, _sent(n.target), _named(n.args), _named(n.kwargs), n.type, dict(n.meta))
        for n in value.graph.nodes
    )
    modes = {path: module.training for path, module in value.named_modules()}
    return Crate(modules, nodes, value.graph._codegen, dict(value.meta), modes)


def unpacked(value: Any) -> Any:
    """The network in a crate, which goes into it; anything else as it is."""
    if not isinstance(value, Crate):
        return value
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def found(argument: Any) -> Any:
        return made[argument.name] if isinstance(argument, _Ref) else argument

    for op, name, target, args, kwargs, kind, meta in value.nodes:
        node = graph.create_node(
            op, _received(target), map_aggregate(args, found), map_aggregate(kwargs, found), name, kind
        )
        node.meta.update(meta)
        made[name] = node
    graph.set_codegen(value.codegen)
    network = fx.GraphModule(value.modules, graph)
    _hand_over(value.modules, network)
    network.meta.update(value.meta)
    for path, module in network.named_modules():
        module.training = value.modes[path]
    return network


def _hand_over(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the parts of `source` as they are: their order, and what is not saved, would else be lost."""
    for part in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(target, part, getattr(source, part).copy())


def _named(arguments: Any) -> Any:
    def named(argument: Any) -> Any:
        return _Ref(argument.name) if isinstance(argument, fx.Node) else argument

    return map_aggregate(arguments, named)


def _sent(target: Any) -> Any:
    return _Op(str(target)) if isinstance(target, torch._ops.OpOverload) else target


def _received(target: Any) -> Any:
    if not isinstance(target, _Op):
        return target
    namespace, name, overload = target.name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)
