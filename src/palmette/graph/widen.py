"""Parallel branches of one form as one wide branch: exact, one big operation instead of several small ones.

B1 act(A1 x) + B2 act(A2 x) + ... = B act(A x) with the A stacked along their outputs, the B along their inputs, and the
biases of the B summed. Norms in front differ in scale and offset only, which go into the A first, so that one norm
without them is left. Operations between the first and the last become one with a group for each branch.
Source: Make Deep Networks Shallow Again (2023).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.graph.activations import Activation, find_activations
from palmette.graph.affine import Affine, compose, diagonal, plus_skip, skip_reason
from palmette.graph.blocks import Block
from palmette.graph.ops import is_state, is_transparent, module_of, remove_dead, skip_transparent
from palmette.graph.parallel import MARK, branch_of, make_parallel, parallel_reason
from palmette.graph.paths import Element, Reader, channel_axis
from palmette.graph.rewrite import describe_map, widen, widen_levels
from palmette.graph.segments import extract, geometry
from palmette.graph.sites import element_macs, positions
from palmette.graph.spans import Run, inside, total


@dataclass(frozen=True)
class Strand:
    """One branch of a parallel sum that can stand in a wide one.

    norm: a layer norm in front, or None. elements: its operations with weights; activations: what lies between them.
    key: what must be equal in strands that become one.
    """

    norm: fx.Node | None
    elements: tuple[Element, ...]
    activations: tuple[Activation | None, ...]
    output: fx.Node
    nodes: frozenset[fx.Node]
    key: str


class Strands:
    """Reads the branches of a graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.reader = gm, Reader(gm)
        self.activations = {a.output: a for a in find_activations(gm)}

    def read(self, source: fx.Node, output: fx.Node) -> Strand | None:
        """The branch from `source` to `output`, None if it is not of a form that can become wide."""
        elements: list[Element] = []
        between: list[Activation | None] = []
        nodes: set[fx.Node] = set()
        node: fx.Node = output
        while True:
            element = self._element(node, output, nodes)
            if element is None:
                return None
            elements.insert(0, element)
            node = self._above(element.nodes[0], nodes)
            norm = self._norm(node, source)
            if node is source or norm is not None:
                break
            activation = self.activations.get(node)
            between.insert(0, activation)
            if activation is not None:
                if len(node.users) != 1 or not set(activation.source.users) <= activation.region:
                    return None
                nodes |= activation.region
                node = activation.source
        nodes |= {norm} if norm is not None else set()
        if norm is not None and elements[0].rank:
            return None
        key = self._key(norm, elements, between)
        return None if key is None else Strand(norm, tuple(elements), tuple(between), output, frozenset(nodes), key)

    def _above(self, node: fx.Node, nodes: set[fx.Node]) -> fx.Node:
        """What a node reads, transparent nodes passed over and added to `nodes`."""
        above = node.all_input_nodes[0]
        while is_transparent(self.gm, above) and len(above.users) == 1:
            nodes.add(above)
            above = above.all_input_nodes[0]
        return above

    def _element(self, node: fx.Node, output: fx.Node, nodes: set[fx.Node]) -> Element | None:
        """The operation with weights that ends at `node`, with norms and former activations behind, padding ahead."""
        if is_transparent(self.gm, node):
            nodes.add(node)
            if node is not output and len(node.users) != 1:
                return None
            node = self._above(node, nodes)
        chain: list[fx.Node] = [node]
        while self.reader.kind(chain[0]) in ("norm", "affine"):
            chain.insert(0, chain[0].all_input_nodes[0])
        main, tail = chain[0], chain[1:]
        if self.reader.kind(main) not in ("conv", "linear"):
            return None
        rank = 0 if self.reader.kind(main) == "linear" else len(main.meta["shape"]) - 2
        axis = 1 if rank else len(main.meta["shape"]) - 1
        pads: list[fx.Node] = []
        while self.reader.kind(chain[0].all_input_nodes[0]) == "pad":
            pads.insert(0, chain[0].all_input_nodes[0])
            chain.insert(0, pads[0])
        too_wide = any(len((self.reader.zero_pad(p) or ([], []))[0]) > rank for p in pads)
        if too_wide or any(len(n.users) != 1 for n in chain if n is not output):
            return None
        if any(channel_axis(self.gm, n) != axis or (self.reader.calls[str(n.target)] > 1) for n in tail):
            return None
        nodes |= set(chain)
        return Element(main, rank, chain, pads, tail)

    def _norm(self, node: fx.Node, source: fx.Node) -> fx.Node | None:
        """`node`, if it is a layer norm over the last axis of `source` that only the branch reads."""
        module: Any = module_of(self.gm, node)
        plain = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and len(node.users) == 1
        reads = plain and skip_transparent(self.gm, node.all_input_nodes[0]) is source
        return node if reads and self.reader.calls[str(node.target)] == 1 else None

    def _key(self, norm: fx.Node | None, elements: list[Element], between: list[Activation | None]) -> str | None:
        parts = []
        if norm is not None:
            module: Any = module_of(self.gm, norm)
            parts.append(f"norm {list(module.normalized_shape)} {module.eps}")
        last = len(elements) - 1
        for i, element in enumerate(elements):
            a = self.reader.shape_of(element)
            inner = 0 < i < last
            if (inner and not a.rank) or (not inner and last and a.groups != 1):
                return None
            sizes = (a.weight.shape[1], a.out_channels // a.groups) if inner else a.groups
            parts.append(f"{a.kernel} {a.stride} {a.before} {a.after} {a.dilation} {sizes} rank {a.rank}")
            activation = between[i] if i < last else None
            if activation is not None:
                if any(is_state(n) for part in activation.region for n in part.all_input_nodes):
                    return None
                parts.append(geometry(self.gm, activation.region, sizes=False))
        return " | ".join(parts)


def wide_reason(gm: fx.GraphModule, run: Run, strands: Strands | None = None) -> str:
    """Why the blocks of a run gain nothing side by side, "" if at least two of them can become one wide branch.

    strands: a reader of the graph, for many runs.
    """
    reason = parallel_reason(gm, run)
    if reason:
        return reason
    strands = strands or Strands(gm)
    read = [strands.read(block.source, branch) for block in run if (branch := branch_of(gm, block)) is not None]
    keys = [s.key for s in read if s is not None]
    return "" if len(set(keys)) < len(keys) else "its branches have no common wide form"


def groups(gm: fx.GraphModule) -> list[list[Strand]]:
    """The strands of every parallel sum that can become one, at least two each, in execution order."""
    strands, found = Strands(gm), []
    for node in gm.graph.nodes:
        if MARK not in node.meta or any(MARK in user.meta for user in node.users) or len(node.users) != 1:
            continue
        others = [n for n in next(iter(node.users)).all_input_nodes if n is not node]
        if len(others) != 1:
            continue
        source = skip_transparent(gm, others[0])
        read = [s for leaf in _leaves(node) if (s := strands.read(source, leaf)) is not None]
        for key in dict.fromkeys(s.key for s in read):
            alike = [s for s in read if s.key == key]
            if len(alike) > 1:
                found.append(alike)
    return found


def _leaves(node: fx.Node) -> list[fx.Node]:
    """The branches that a parallel sum adds up."""
    if MARK not in node.meta:
        return [node]
    return [leaf for n in node.all_input_nodes for leaf in (_leaves(n) if len(n.users) == 1 else [])]


# -- algebra -----------------------------------------------------------------------------------------------------------


def maps_of(reader: Reader, strand: Strand) -> list[Affine]:
    """The maps of a strand in order, scale and offset of its norm taken into the first."""
    maps = [reader.affine(e) for e in strand.elements]
    module: Any = None if strand.norm is None else module_of(reader.gm, strand.norm)
    if module is not None and module.weight is not None:
        offset = torch.zeros_like(module.weight) if module.bias is None else module.bias
        maps[0] = compose(diagonal(module.weight.detach(), offset.detach(), 0), maps[0])
    return maps


def stacked(branches: Iterable[list[Affine]]) -> list[Affine]:
    """The maps of the wide branch from those of its strands, level by level."""
    levels = list(zip(*branches, strict=True))
    if len(levels) == 1:
        return [_summed(levels[0])]
    wide = [
        replace(
            level[0],
            weight=torch.cat([a.weight for a in level]),
            bias=torch.cat([a.bias for a in level]),
            groups=sum(a.groups for a in level) if i else 1,
        )
        for i, level in enumerate(levels[:-1])
    ]
    last = levels[-1]
    weight = torch.cat([a.weight for a in last], 1)
    return [*wide, replace(last[0], weight=weight, bias=torch.stack([a.bias for a in last]).sum(0))]


def _summed(maps: tuple[Affine, ...]) -> Affine:
    return replace(
        maps[0],
        weight=torch.stack([a.weight for a in maps]).sum(0),
        bias=torch.stack([a.bias for a in maps]).sum(0),
    )


class Wide:
    """Several strands about to become one: the decision in JSON, the maps, and both forms as modules to compare."""

    def __init__(self, gm: fx.GraphModule, strands: list[Strand]) -> None:
        self.gm, self.strands = gm, strands
        self.reader = Reader(gm)
        self.maps = stacked(maps_of(self.reader, s) for s in strands)
        first = strands[0]
        norm = None if first.norm is None or module_of(gm, first.norm).weight is None else first.norm.meta["path"]  # type: ignore[union-attr]
        levels = [
            {
                "nodes": [n.meta["path"] for n in element.nodes],
                "map": describe_map(a),
                "result": _result(gm, element),
                "skip": None,
                "norm": norm if i == 0 else None,
            }
            for i, (element, a) in enumerate(zip(first.elements, self.maps, strict=True))
        ]
        self.decision: dict[str, Any] = {
            "type": "widen",
            "levels": levels,
            "leaves": [s.output.meta["path"] for s in strands[1:]],
        }
        self.members = tuple(e.path for s in strands for e in s.elements)

    @property
    def key(self) -> str:
        """A name that depends on geometry only: the key of stored timings."""
        return "wide: " + " + ".join(geometry(self.gm, s.nodes) for s in self.strands)

    @property
    def macs(self) -> tuple[int, int]:
        """MACs per sample of the branches and of the wide one."""
        elements = [e for s in self.strands for e in s.elements]
        wide = zip(self.strands[0].elements, self.maps, strict=True)
        return sum(element_macs(self.reader, e) for e in elements), sum(
            a.weight.numel() * positions(e) for e, a in wide
        )

    def modules(self) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
        """The sum of the branches, the wide branch in float64, and inputs of batch 1 for the former."""
        parts = [extract(self.gm, s.nodes, s.output) for s in self.strands]
        after = copy.deepcopy(parts[0][0]).double()
        widen_levels(after, self.decision, self.maps)
        after.recompile()
        return _Sum(part for part, _ in parts).eval(), after.eval(), parts[0][1]

    def absorb_skip(self) -> None:
        """Let a wide branch of a single operation take in the addition of its input, where that is all there is."""
        strand, top = self.strands[0], self.strands[0].output
        while MARK in next(iter(top.users)).meta:
            top = next(iter(top.users))
        total = next(iter(top.users))
        reads = strand.elements[0].nodes[0].all_input_nodes[0] in total.all_input_nodes
        alone = len(self.maps) == 1 and strand.norm is None and len(_leaves(top)) == len(self.strands)
        if alone and reads and not skip_reason(self.maps[0]):
            self.maps = [plus_skip(self.maps[0])]
            self.decision["levels"][0] |= {"skip": total.meta["path"], "map": describe_map(self.maps[0])}


def _result(gm: fx.GraphModule, element: Element) -> str:
    """Name of the module that takes the place of an element: its own, else one that is free."""
    if element.main.op == "call_module":
        return str(element.main.target)
    name, taken = "merged." + element.path.replace(".", "_").replace("#", "_"), dict(gm.named_modules())
    while name in taken:
        name += "_"
    return name


class _Sum(nn.Module):
    """The sum of what several modules make of one input."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = [part(*inputs) for part in self.parts]
        return torch.stack(outputs).sum(0) if len(outputs) > 2 else outputs[0] + outputs[1]


# -- before any plan ---------------------------------------------------------------------------------------------------


def parallel_form(gm: fx.GraphModule, run: Run) -> tuple[fx.GraphModule, fx.GraphModule, tuple[Any, ...]]:
    """A run of blocks by itself, the same in parallel and wide where it can be, and inputs of batch 1 for both."""
    before, inputs = extract(gm, inside(run), total(run[-1]))
    after = copy.deepcopy(before)
    twins = {n.meta.get("path"): n for n in after.graph.nodes}
    make_parallel(after, tuple(_twin(block, twins) for block in run))
    remove_dead(after)
    for strands in groups(after):
        wide = Wide(after, strands)
        widen(after, wide.decision, wide.maps)
    remove_dead(after)
    return before, after.eval(), inputs


def _twin(block: Block, nodes: dict[Any, fx.Node]) -> Block:
    """The block in a graph whose nodes have the same paths."""
    source, output, *inner = (nodes[n.meta["path"]] for n in (block.source, block.output, *block.region))
    return replace(block, source=source, output=output, region=frozenset(inner))
