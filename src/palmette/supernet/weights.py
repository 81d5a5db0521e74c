"""The parameters and multiply-adds of every configuration of a supernet, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from palmette.graph.channel_rules import first
from palmette.graph.ops import get_tensor
from palmette.meter.compute import node_macs
from palmette.supernet.bits import element_bytes, scale_bytes
from palmette.supernet.codes import Codes, Floats, Ints
from palmette.supernet.resolution import RESOLUTION
from palmette.supernet.supernet import Supernet


class Weights:
    """Parameters of configurations: for each tensor the product of its axes, each a sum over choices.

    One more factor are the bytes of an element; scales of weights in 8 bits are tensors of their own.
    """

    def __init__(self, net: Supernet, tables: Codes, item: int, graphs: Sequence[fx.GraphModule]) -> None:
        """`graphs`: the network with its shapes at each resolution."""
        self.net, self.codes, self.item = net, tables, item
        self._heads = {
            (path, side): (name, heads, site, values)
            for name, (site, values) in net.sites.heads.items()
            for path, side, heads in (*site.layers, *((state, "rows", heads) for state, heads in site.states))
        }
        self._bits = {site.state: name for name, (site, _) in net.sites.bits.items()}
        self._kernels = {path: (name, sizes) for name, (path, sizes) in net.sites.kernels.items()}
        inside, beside = tables.gone()
        gone = {**inside, **beside}
        absences: dict[int, Floats] = {}  # a tensor is there as long as one of its readers is
        for node in net.network.graph.nodes:
            for _, tensor in parameters_of(net.network, node):
                own = gone.get(node, np.zeros(tables.width))
                absences[id(tensor)] = np.minimum(own, absences.get(id(tensor), own))
        seen: set[int] = set()
        self.parts: list[tuple[list[Floats], Floats]] = []
        self.elements: list[tuple[list[Floats], Floats]] = []
        self.uses: list[tuple[list[Floats], Floats]] = []
        for node, *sized in zip(net.network.graph.nodes, *(graph.graph.nodes for graph in graphs), strict=True):
            absent = gone.get(node, np.zeros(tables.width))
            for leaf, tensor in parameters_of(net.network, node):
                axes = self._axes(node, leaf, tensor)
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    away = absences[id(tensor)]
                    self.elements.append((axes, away))
                    self.parts += [(stored, away) for stored in self._stored(node, leaf, tensor, axes)]
                if leaf == "weight" and node.op == "call_module":
                    self.uses.append(([*axes, self._often(sized, tensor.numel())], absent))

    def __call__(self, codes: Ints) -> Ints:
        """Bytes [n] of the parameters of codes [n, choices]."""
        return self._sum(self.parts, codes)

    def float_bytes(self, codes: Ints) -> Ints:
        """The same in float32, whatever choices and the device say: what a latency table's rate is about."""
        return 4 * self._sum(self.elements, codes)

    def macs(self, codes: Ints) -> Ints:
        """Multiply-adds [n] with a weight, for a sample, of codes [n, choices]; products of activations not counted."""
        onehot = self.codes.onehot(codes)
        parts = (_amounts(onehot, axes, gone) for axes, gone in self.uses)
        return np.rint(sum(parts, np.zeros(len(codes)))).astype(np.int64)

    def terms(self) -> dict[tuple[int, ...], float]:
        """The bytes as a sum of products of columns of a one-hot code; () is the number one."""
        return self._terms(self.parts, 1.0)

    def float_terms(self) -> dict[tuple[int, ...], float]:
        """The bytes of `float_bytes` as such a sum."""
        return self._terms(self.elements, 4.0)

    def mac_terms(self) -> dict[tuple[int, ...], float]:
        """The multiply-adds as such a sum."""
        return self._terms(self.uses, 1.0)

    def _often(self, nodes: Sequence[fx.Node], elements: int) -> Floats:
        """How often a weight of a sample's layer is used, at each resolution: of the node with its shapes there."""
        often = [node_macs(node) / elements / node.meta["shape"][0] for node in nodes]
        return self.codes.of(RESOLUTION, often) if self.net.sites.resolution else self.codes.constant(often[0])

    def _sum(self, parts: Iterable[tuple[list[Floats], Floats]], codes: Ints) -> Ints:
        onehot = self.codes.onehot(codes)
        total = sum((_amounts(onehot, axes, gone) for axes, gone in parts), np.zeros(len(codes)))
        return total.astype(np.int64)

    def _terms(self, parts: Iterable[tuple[list[Floats], Floats]], factor: float) -> dict[tuple[int, ...], float]:
        total: dict[tuple[int, ...], float] = {}
        for axes, gone in parts:
            product: dict[tuple[int, ...], float] = {(): factor}
            for lengths in (*axes, self.codes.constant(1.0) - gone):
                product = times(product, lengths)
            for columns, amount in product.items():
                total[columns] = total.get(columns, 0.0) + amount
        return {columns: amount for columns, amount in total.items() if amount}

    def _stored(self, node: fx.Node, leaf: str, tensor: Tensor, axes: list[Floats]) -> list[list[Floats]]:
        """Factors whose product is bytes: of the elements, and of the scales where there may be any."""
        choice = self._bits.get(str(node.target) if node.op == "get_attr" else f"{node.target}.{leaf}")
        elements = [*axes, element_bytes(self.codes, choice, self.item)]
        if choice is None:
            return [elements]
        lengths = self._lengths(node, leaf).get(0, self.codes.constant(len(tensor)))
        return [elements, [lengths, scale_bytes(self.codes, choice, self.item)]]

    def _lengths(self, node: fx.Node, leaf: str) -> dict[int, Floats]:
        """By axis its length, of those axes of a tensor of a node that a choice narrows."""
        channels, found = self.net.sites.channels, dict[int, Floats]()
        if node in channels.variables and (node in channels.writers or node in channels.channelwise):
            found[0] = self.codes.kept(channels.of(node))
        if leaf == "weight" and node in channels.readers:
            found[1] = self.codes.kept(channels.of(first(node)))
        if node in channels.states:
            axis, carrier = channels.states[node]
            found[axis] = self.codes.kept(channels.of(carrier))
        key = str(node.target) if node.op == "get_attr" else str(node.meta["path"])
        for axis, side in enumerate(("rows", "columns") if leaf == "weight" else ("rows",)):
            if (key, side) in self._heads:
                found[axis] = self._of_heads(key, side)
        return found

    def _axes(self, node: fx.Node, leaf: str, tensor: Tensor) -> list[Floats]:
        """The lengths of a tensor's axes by one-hot code; what no choice narrows is one axis."""
        found, path = self._lengths(node, leaf), str(node.meta["path"])
        axes, rest = list(found.values()), tensor.numel()
        for axis in found:
            rest //= tensor.shape[axis]
        if leaf == "weight" and path in self._kernels:
            name, sizes = self._kernels[path]
            powers = [float(k ** (tensor.dim() - 2)) for k in sizes]
            axes.append(self.codes.of(name, powers))
            rest //= int(powers[-1])
        return [*axes, self.codes.constant(rest)]

    def _of_heads(self, path: str, side: str) -> Floats:
        name, heads, site, values = self._heads[path, side]
        return self.codes.of(name, [float(torch.isin(heads, site.order[:kept]).sum()) for kept in values])


def _amounts(onehot: Floats, axes: list[Floats], gone: Floats) -> Floats:
    """Elements [n] of a tensor; none where its layer is gone."""
    amount = np.ones(len(onehot))
    for lengths in axes:
        amount *= onehot @ lengths
    return np.where(onehot @ gone > 0, 0.0, amount)


def parameters_of(gm: fx.GraphModule, node: fx.Node) -> list[tuple[str, Tensor]]:
    """Leaves and values of the parameters that a node holds."""
    if node.op == "call_module":
        return list(gm.get_submodule(str(node.target)).named_parameters())
    tensor = get_tensor(gm, str(node.target)) if node.op == "get_attr" else None
    return [("", tensor)] if isinstance(tensor, nn.Parameter) else []


def times(product: dict[tuple[int, ...], float], lengths: Floats) -> dict[tuple[int, ...], float]:
    """A sum of products times a vector over codes; a column times itself is itself."""
    found: dict[tuple[int, ...], float] = {}
    for columns, amount in product.items():
        for column in np.flatnonzero(lengths):
            key = tuple(sorted({*columns, int(column)})) if column else columns
            found[key] = found.get(key, 0.0) + amount * float(lengths[column])
    return found
