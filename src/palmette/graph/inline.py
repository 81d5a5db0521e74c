"""Write out the regions that an exporter wraps into graphs of their own: autocast and grad-mode contexts."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn


def inline_regions(gm: fx.GraphModule) -> list[str]:
    """Inline every wrapped region of an exported graph, in place; says which contexts no longer act, a line each.

    A disabled autocast needs no trace in a graph of fixed dtypes; a region without gradients gets them in training.
    """
    lost = []
    for node in list(gm.graph.nodes):
        name = str(getattr(node.target, "__name__", ""))
        region = _region(gm, node)
        if region is None:
            continue
        if "grad" in name:
            lost.append("a region under torch.no_grad or torch.enable_grad: gradients now follow the caller's mode")
        _inline(gm, node, region)
    return lost


def _region(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The graph that a wrapping operator runs, None for other nodes."""
    for value in node.args if node.op == "call_function" else ():
        if isinstance(value, fx.Node) and value.op == "get_attr":
            owner: Any = gm
            for part in str(value.target).split("."):
                owner = getattr(owner, part)
            if isinstance(owner, fx.GraphModule):
                return owner
    return None


def _inline(gm: fx.GraphModule, node: fx.Node, region: fx.GraphModule) -> None:
    position = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and _is_module(gm, a))
    values: dict[fx.Node, Any] = {}
    inputs = list(node.args[position + 1 :])
    results: Any = None
    for inner in region.graph.nodes:
        if inner.op == "placeholder":
            values[inner] = inputs.pop(0)
        elif inner.op == "output":
            results = fx.node.map_arg(inner.args[0], lambda n: values[n])
        else:
            with gm.graph.inserting_before(node):
                values[inner] = gm.graph.node_copy(inner, lambda n: values[n])
            if inner.op == "get_attr" and not hasattr(gm, str(inner.target)):
                setattr(gm, str(inner.target), getattr(region, str(inner.target)))
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results)
    gm.graph.erase_node(node)


def _is_module(gm: fx.GraphModule, node: fx.Node) -> bool:
    owner: Any = gm
    for part in str(node.target).split(".") if node.op == "get_attr" else ():
        owner = getattr(owner, part)
    return node.op == "get_attr" and isinstance(owner, nn.Module)
