"""Activations of a captured graph, by call site: single operations, and composites (x * sigmoid(x), a tanh GELU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from palmette.graph.ops import ACTIVATIONS, ARITHMETIC, NONLINEAR_PARTS, is_state, op_name


@dataclass(frozen=True)
class Activation:
    """One call of an elementwise nonlinearity: `output` = f(`source`); `region` are the nodes it is made of."""

    path: str
    op: str
    source: fx.Node
    output: fx.Node
    region: frozenset[fx.Node]


def find_activations(gm: fx.GraphModule) -> list[Activation]:
    """Every activation of the graph, in execution order."""
    composites = _composites(gm)
    inside = {n for a in composites for n in a.region}
    found = list(composites)
    found += [
        Activation(str(node.meta["path"]), op_name(node), node.args[0], node, frozenset([node]))
        for node in gm.graph.nodes
        if node not in inside and _is_single(node)
    ]
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    return sorted(found, key=lambda a: order[a.output])


def _is_single(node: fx.Node) -> bool:
    if op_name(node) not in ACTIVATIONS or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    others = [n for n in node.all_input_nodes if n is not node.args[0]]
    return (
        node.meta.get("shape") is not None
        and _floating(node)
        and all(is_state(n) for n in others)
        and not is_state(node.args[0])
    )


def _floating(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and dtype.is_floating_point


def _elementwise_inputs(node: fx.Node) -> list[fx.Node] | None:
    """Tensor inputs of an elementwise part, None if the node is not one."""
    name = op_name(node)
    if name not in NONLINEAR_PARTS and name not in ARITHMETIC:
        return None
    if not _floating(node):
        return None
    inputs = list(node.all_input_nodes)
    if not inputs or any(n.meta.get("shape") != node.meta.get("shape") or is_state(n) for n in inputs):
        return None
    return inputs


def _composites(gm: fx.GraphModule) -> list[Activation]:
    """Maximal elementwise regions in which several paths from one tensor meet again."""
    sources: dict[fx.Node, set[fx.Node]] = {}
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    found: dict[fx.Node, tuple[fx.Node, frozenset[fx.Node]]] = {}
    for node in gm.graph.nodes:
        inputs = _elementwise_inputs(node)
        if inputs is None:
            continue
        common = set.intersection(*({n} | sources.get(n, set()) for n in inputs))
        if not common:
            continue
        sources[node] = common
        if len(inputs) < 2:
            continue
        for source in sorted(common, key=lambda n: -order[n]):
            region = _region(source, node)
            closed = all(u in region for n in region if n is not node for u in n.users)
            if closed and any(op_name(n) in NONLINEAR_PARTS or _is_product(n) for n in region):
                found[node] = (source, region)
                break
    return _maximal(found)


def _is_product(node: fx.Node) -> bool:
    return op_name(node) in ("mul", "div") and len(node.all_input_nodes) + (node.args[0] is node.args[1]) > 1


def _region(source: fx.Node, output: fx.Node) -> frozenset[fx.Node]:
    region: set[fx.Node] = set()
    stack = [output]
    while stack:
        n = stack.pop()
        if n is not source and n not in region:
            region.add(n)
            stack.extend(n.all_input_nodes)
    return frozenset(region)


def _maximal(found: dict[fx.Node, tuple[fx.Node, frozenset[fx.Node]]]) -> list[Activation]:
    outer = [
        (source, node, region)
        for node, (source, region) in found.items()
        if not any(node in other and region < other for _, other in found.values())
    ]
    result = []
    for source, node, region in outer:
        output, grown = _with_scaling(node, set(region))
        result.append(Activation(str(output.meta["path"]), "composite", source, output, frozenset(grown)))
    return result


def _with_scaling(node: fx.Node, region: set[fx.Node]) -> tuple[fx.Node, set[fx.Node]]:
    """Take a final scaling by a number (the / 6 of a hard swish) into the region."""
    while len(node.users) == 1:
        user: Any = next(iter(node.users))
        if op_name(user) not in ("mul", "div") or len(user.all_input_nodes) != 1 or user.args[0] is not node:
            break
        node = user
        region.add(user)
    return node, region
