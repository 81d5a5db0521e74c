"""Pieces of a captured graph as modules of their own, to be timed and compared."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.graph.affine import Affine
from palmette.graph.capture import make_inputs
from palmette.graph.ops import CONVOLUTIONS, ChannelAffine, get_tensor, is_state, is_transparent, module_of, op_name
from palmette.graph.paths import Element, Reader

GAIN = 0.98
"""A merge must bring the measured time below this share of what it replaces."""


def conv_module(a: Affine, *, bias: bool = True, like: Tensor | None = None) -> nn.Module:
    """`a` as a plain nn.Conv or nn.Linear (its padding only if even).

    Weights are copied unless `a` is on the meta device.
    """
    o, i = a.out_channels, a.in_channels
    if a.rank == 0:
        module: nn.Module = torch.nn.utils.skip_init(nn.Linear, i, o, bias=bias)
    else:
        padding = a.before if a.before == a.after else 0
        kind = CONVOLUTIONS[a.rank - 1]
        module = torch.nn.utils.skip_init(
            kind, i, o, a.kernel, stride=a.stride, padding=padding, dilation=a.dilation, groups=a.groups, bias=bias
        )
    if like is not None:
        module.to(like)
    if not a.weight.is_meta:
        weight = a.weight[:, : a.weight.shape[1] - a.edge]
        with torch.no_grad():
            module.weight.copy_(weight)  # type: ignore[operator]
            if bias:
                module.bias.copy_(a.bias)  # type: ignore[operator]
    return module


class Merged(nn.Module):
    """A merged map as it will stand in the graph: uneven padding, convolution, and the edge correction of bias_map."""

    def __init__(self, a: Affine, *, like: Tensor | None = None) -> None:
        super().__init__()
        self.main = conv_module(a, like=like)
        uneven = a.before != a.after
        self.sizes = (
            [v for pair in zip(reversed(a.before), reversed(a.after), strict=True) for v in pair] if uneven else None
        )
        self.edge = edge_module(a, like=like) if a.edge else None

    def forward(self, x: Tensor) -> Tensor:
        """The merged map of `x` [batch, channels, ...]."""
        padded = x if self.sizes is None else torch.constant_pad_nd(x, self.sizes)
        y: Tensor = self.main(padded)
        if self.edge is not None:
            ones = torch.ones_like(x[:1, :1])
            y = y + self.edge(ones if self.sizes is None else torch.constant_pad_nd(ones, self.sizes))
        return y


def edge_module(a: Affine, *, like: Tensor | None = None) -> nn.Module:
    """The part of `a` that reads the constant-one channel, as a bias-free convolution of one input channel."""
    padding = a.before if a.before == a.after else 0
    kind = CONVOLUTIONS[a.rank - 1]
    module: nn.Module = torch.nn.utils.skip_init(
        kind, 1, a.out_channels, a.kernel, stride=a.stride, padding=padding, dilation=a.dilation, bias=False
    )
    if like is not None:
        module.to(like)
    if not a.weight.is_meta:
        with torch.no_grad():
            module.weight.copy_(a.weight[:, -1:])  # type: ignore[operator]
    return module


def extract(gm: fx.GraphModule, nodes: Iterable[fx.Node], output: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """The given nodes as a graph of their own, and inputs of batch 1 for it: one for each tensor read from outside."""
    inside, graph = set(nodes), fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    outside: list[fx.Node] = []
    spine = [n for n in gm.graph.nodes if n in inside]
    first = next(n for n in spine[0].all_input_nodes if not is_state(n) and n.meta.get("shape") is not None)

    def place(node: fx.Node) -> fx.Node:
        if node not in made:
            if op_name(node) == "sym_size" and node.args[1] == 0 and node not in inside:
                made[node] = graph.call_function(torch.ops.aten.sym_size.int, (place(first), 0))
            elif node in inside or is_state(node) or (node.meta.get("shape") is None and node.op == "call_function"):
                made[node] = graph.node_copy(node, place)
            else:
                made[node] = graph.placeholder(f"input_{len(outside)}")
                made[node].meta.update({key: node.meta[key] for key in ("shape", "dtype", "path") if key in node.meta})
                outside.append(node)
        return made[node]

    place(first)
    for node in spine:
        for source in node.all_input_nodes:
            place(source)
        place(node)
    _placeholders_first(graph)
    graph.output(made[output])
    batch = first.meta["shape"][0]
    inputs = tuple(_batch_one(n, batch) for n in outside)
    module = fx.GraphModule(gm, graph)
    return copy.deepcopy(module).eval(), inputs


def _placeholders_first(graph: fx.Graph) -> None:
    root = graph._root
    for node in reversed([n for n in graph.nodes if n.op == "placeholder"]):
        root.append(node)


def _batch_one(node: fx.Node, batch: int) -> Any:
    shape = [1 if i == 0 and s == batch else s for i, s in enumerate(node.meta["shape"])]
    dtype = node.meta["dtype"]
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    return make_inputs({"shape": shape, "dtype": str(dtype).removeprefix("torch.")})


def geometry(gm: fx.GraphModule, nodes: Iterable[fx.Node], *, sizes: bool = True) -> str:
    """A name for the given nodes that depends on operations, wiring and sizes only: the key of stored timings.

    sizes: whether those of what comes from outside count.
    """
    inside, names = set(nodes), dict[fx.Node, str]()
    lines = []

    def named(node: fx.Node) -> str:
        if node not in names:
            shape = get_tensor(gm, str(node.target)).shape if is_state(node) else (node.meta.get("shape") or (1,))[1:]
            kind = "state" if is_state(node) else "input"
            names[node] = f"{kind}{len(names)}{list(shape) if sizes else ''}"
        return names[node]

    for node in (n for n in gm.graph.nodes if n in inside):
        if is_transparent(gm, node):  # whatever its probability, it costs nothing
            names[node] = named(node.all_input_nodes[0])
            continue
        what = module_of(gm, node) or node.target
        lines.append(f"{what} {fx.node.map_arg((node.args, node.kwargs), named)}")
        names[node] = f"step{len(names)}"
    return f"{len(lines)} operations {hashlib.sha256(' ; '.join(lines).encode()).hexdigest()[:16]}"


def unmerged(reader: Reader, elements: list[Element]) -> nn.Sequential:
    """The elements as they run when they are not merged: padding, operation, batch norm.

    Former activations cost nothing then.
    """
    layers: list[nn.Module] = []
    for element in elements:
        layers.extend(_layers(reader, element))
    return nn.Sequential(*layers).eval()


def _layers(reader: Reader, element: Element) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for pad in element.pads:
        before, after = reader.zero_pad(pad) or ([], [])
        sizes: Any = [v for p in zip(reversed(before), reversed(after), strict=True) for v in p]
        layers.append(nn.ConstantPad2d(sizes, 0.0))
    for node in [element.main, *element.tail]:
        module = module_of(reader.gm, node)
        if isinstance(module, ChannelAffine) and node is not element.main:
            layers.append(_FoldedAffine(copy.deepcopy(module)))
        elif module is not None:
            layers.append(copy.deepcopy(module))
        else:
            weight, _ = reader.parameters(node)
            plain = Element(node, element.rank, [node])
            layers.append(conv_module(reader.affine(plain), like=weight))
    return layers


class _FoldedAffine(nn.Module):
    """A former activation: kept for the comparison of values, left out when timed."""

    def __init__(self, affine: ChannelAffine) -> None:
        super().__init__()
        self.affine = affine
        self.timed = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.timed else self.affine(x)


def for_timing(module: nn.Module) -> nn.Module:
    """A copy in which former activations cost nothing, as they do once absorbed."""
    twin = copy.deepcopy(module)
    for m in twin.modules():
        if isinstance(m, _FoldedAffine):
            m.timed = True
    return twin


def signature(reader: Reader, elements: list[Element]) -> str:
    """A name for the elements that depends on their geometry only: the key of stored timings."""
    parts = []
    for e in elements:
        a = reader.shape_of(e)
        norms = "+bn" * sum(reader.kind(n) == "norm" for n in e.tail)
        if a.rank == 0:
            parts.append(f"linear({a.in_channels}>{a.out_channels}){norms}")
        else:
            pads = ",".join(f"{b}:{c}" for b, c in zip(a.before, a.after, strict=True))
            sizes = ["x".join(map(str, v)) for v in (a.kernel, a.stride, a.dilation)]
            parts.append(
                f"conv({a.in_channels}>{a.out_channels} k{sizes[0]} s{sizes[1]} d{sizes[2]} p{pads} g{a.groups}){norms}"
            )
    return f"in{input_shape(elements[0])} " + " ".join(parts)


def input_shape(element: Element) -> list[int]:
    """Shape of what the element reads, at batch 1."""
    source: Any = element.nodes[0].args[0]
    return [1, *source.meta["shape"][1:]]
