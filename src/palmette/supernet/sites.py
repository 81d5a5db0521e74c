"""Where a captured network can be made elastic: groups of channels, kernels, stages of residual blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from palmette.graph.blocks import Block, find_blocks
from palmette.graph.candidates import is_protected
from palmette.graph.channel_rules import first
from palmette.graph.channels import Channels
from palmette.graph.groups import nearest, width_groups
from palmette.graph.heads import HeadSite, head_sites
from palmette.graph.ops import ACTIVATIONS, CONVOLUTIONS, is_state, is_transparent, module_of, op_name, skip_transparent
from palmette.graph.paths import Reader
from palmette.graph.resize import decide, ranges
from palmette.graph.sliced_channels import SlicedChannels
from palmette.graph.spans import Run
from palmette.supernet.bits import INT8, BitsSite, bits_sites
from palmette.supernet.elastic import Cut
from palmette.supernet.resolution import RESOLUTION
from palmette.supernet.space import Choice, Config, Space


@dataclass(frozen=True)
class WidthSite:
    """Layers that can only be narrowed together.

    `name`: the path of the first layer that writes the channels. `classes` [n]: classes of `SlicedChannels`, the most
    important first. `writers`: the nodes of the layers. `reason`: why it stays as it is, "" if it need not.
    """

    name: str
    classes: Tensor
    writers: tuple[fx.Node, ...]
    reason: str = ""


@dataclass(frozen=True)
class Stage:
    """A chain of residual blocks of one shape, of which the last may be left out, `period` blocks at a time."""

    name: str
    blocks: Run
    period: int

    @property
    def units(self) -> int:
        """How many times its period it is long."""
        return len(self.blocks) // self.period


def width_sites(channels: SlicedChannels, protect: Iterable[str] = ()) -> list[WidthSite]:
    """Every group of channels that may be narrowed, in the order of the network."""
    found = []
    for group in width_groups(channels, protect):
        members = set(group.tolist())
        writers = tuple(n for n in channels.writers if members & set(channels.of(n).tolist()))
        order = importance(channels, group).argsort(descending=True, stable=True)
        reason = "it is the squeeze of a gate, which is small" if _is_gate(channels, members) else ""
        found.append(WidthSite(str(writers[0].meta["path"]), group[order], writers, reason))
    return found


def importance(channels: SlicedChannels, group: Tensor) -> Tensor:
    """Of each class [n] of a group: the L1 norm of all weights that read it (of those that write it if none does).

    Source: Once-for-All (ICLR 2020), which sorts the channels of an inner layer so.
    """
    place = torch.full((len(channels.classes),), -1)
    place[group] = torch.arange(len(group))
    scores = torch.zeros(len(group), dtype=torch.float64)
    readers = [(n, channels.of(first(n)), 1) for n in channels.readers]
    writers = [(n, channels.of(n), 0) for n in channels.writers]
    for ends in (readers, writers):
        for node, classes, axis in ends:
            own = place[classes] >= 0
            if bool(own.any()):
                norms = channels.weight(node).detach().double().cpu().abs().transpose(0, axis).flatten(1).sum(1)
                scores.index_add_(0, place[classes][own], norms[own])
        if bool(scores.any()):
            return scores
    return scores


def _is_gate(channels: Channels, members: set[int]) -> bool:
    """Whether all that is computed from the channels scales another tensor, as in squeeze and excitation."""
    readers = [n for n in channels.readers if members & set(channels.of(first(n)).tolist())]
    return bool(readers) and all(_scales(channels.gm, n) for n in readers)


def _scales(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's output, after activations, is multiplied with a larger tensor."""
    source = node
    while len(node.users) == 1:
        user = next(iter(node.users))
        if op_name(user) == "mul" and len(user.all_input_nodes) == 2:
            return bool(source.meta["shape"][2:] != user.meta["shape"][2:])
        if not (op_name(user) in ACTIVATIONS or is_transparent(gm, user)):
            return False
        node = user
    return False


def widths(most: int, ratios: Iterable[float], multiple: int) -> tuple[int, ...]:
    """The numbers of channels that a group of `most` may have, ascending; all of them among these."""
    return tuple(sorted({most, *(nearest(most * r, multiple, most) for r in ratios)}))


def kernel_sites(gm: fx.GraphModule, sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Convolutions whose kernel can be cropped to its centre, with the sizes from among `sizes`, by path.

    The kernel must be odd and equal in all directions, and padded so that a smaller one gives an output of that shape.
    """
    reader, found = Reader(gm), {}
    for node in gm.graph.nodes:
        module: Any = module_of(gm, node)
        if not isinstance(module, CONVOLUTIONS) or reader.kind(node) != "conv" or isinstance(module.padding, str):
            continue
        size = module.kernel_size[0]
        if set(module.kernel_size) != {size} or size % 2 == 0 or not node.meta.get("shape"):
            continue
        fits = [
            k
            for k in sorted(set(sizes))
            if k % 2
            and 0 < k < size
            and all(p >= (size - k) // 2 * d for p, d in zip(module.padding, module.dilation, strict=True))
        ]
        if fits:
            found[str(node.meta["path"])] = (*fits, size)
    return found


def stages(gm: fx.GraphModule) -> list[Stage]:
    """Every longest chain of residual blocks that can be left out; a block inside another is not one of its own."""
    blocks = [b for b in find_blocks(gm) if not b.reason]
    outer = [b for b in blocks if not any(b.region < other.region for other in blocks)]
    chains: list[list[Block]] = []
    by_end: dict[fx.Node, list[Block]] = {}
    for block in outer:
        chain = by_end.pop(skip_transparent(gm, block.source), None)
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(block)
        by_end[block.output] = chain
    return [Stage(f"depth:{chain[0].path}", tuple(chain), _period(gm, chain)) for chain in chains]


def _period(gm: fx.GraphModule, chain: list[Block]) -> int:
    """After how many blocks their kinds repeat: a transformer's layer is two blocks, attention and MLP."""
    kinds = [tuple(sorted(_kind(gm, n) for n in b.region)) for b in chain]
    for period in range(1, len(chain) // 2 + 1):
        if len(chain) % period == 0 and all(kinds[i] == kinds[i % period] for i in range(len(chain))):
            return period
    return 1


def _kind(gm: fx.GraphModule, node: fx.Node) -> str:
    module = module_of(gm, node)
    return op_name(node) if module is None else type(module).__name__


class Sites:
    """What is elastic in a captured network, and what a configuration makes of it."""

    def __init__(
        self,
        gm: fx.GraphModule,
        protect: tuple[str, ...],
        width: Sequence[float],
        depth: int,
        kernel: Sequence[int],
        heads: Sequence[float],
        round_to: int,
        resolution: tuple[int, ...] = (),
        bits: tuple[int, ...] = (),
    ) -> None:
        self.channels = SlicedChannels(gm)
        self.static: dict[str, str] = {}
        self.widths: dict[str, tuple[WidthSite, tuple[int, ...]]] = {}
        self.kernels: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.heads: dict[str, tuple[HeadSite, tuple[int, ...]]] = {}
        self.stages: dict[str, tuple[Stage, tuple[int, ...]]] = {}
        self.bits: dict[str, tuple[BitsSite, tuple[int, ...]]] = {}
        self.gm, self.resolution = gm, resolution
        if width:
            self._find_widths(width, round_to, protect)
        if heads:
            self._find_heads(heads, protect)
        if kernel:
            found = kernel_sites(gm, kernel).items()
            self.kernels = {f"kernel:{p}": (p, sizes) for p, sizes in found if not is_protected(p, protect)}
        if depth:
            self._find_stages(depth, protect)
        if bits:
            narrowest = self.cut(self.space().min()).decision["layers"]
            layers = bits_sites(self.channels.reader, protect, narrowest)
            self.bits = {f"bits:{site.path}": (site, bits) for site in layers}

    def _find_widths(self, ratios: Sequence[float], round_to: int, protect: tuple[str, ...]) -> None:
        for site in width_sites(self.channels, protect):
            values = widths(len(site.classes), ratios, round_to)
            reason = site.reason or ("" if len(values) > 1 else "no share of its channels is another number")
            if reason:
                self.static[site.name] = reason
            else:
                self.widths[f"width:{site.name}"] = site, values
        self.static |= _pinned(self.channels, {n for site, _ in self.widths.values() for n in site.writers}, protect)

    def _find_heads(self, ratios: Sequence[float], protect: tuple[str, ...]) -> None:
        for site in head_sites(self.gm):
            reason = site.reason or ("it is protected" if is_protected(site.name, protect) else "")
            values = widths(site.count, ratios, 1)
            if reason or len(values) == 1:
                self.static[site.name] = reason or "no share of its heads is another number"
            else:
                self.heads[f"heads:{site.name}"] = site, values
                for path in (*site.paths, *(str(node.meta["path"]) for node in site.between)):
                    self.static.pop(path, None)

    def _find_stages(self, depth: int, protect: tuple[str, ...]) -> None:
        for stage in stages(self.gm):
            if any(is_protected(b.path, protect) for b in stage.blocks):
                self.static[stage.name] = "a block of it is protected"
                continue
            fewest = max(0, stage.units - depth)
            self.stages[stage.name] = stage, tuple(range(fewest, stage.units + 1))

    def space(self) -> Space:
        """The space of all choices, in the order of the network within each kind."""
        owners: dict[fx.Node, tuple[str, int]] = {}
        for name, (stage, _) in self.stages.items():
            for index, block in enumerate(stage.blocks):
                owners |= dict.fromkeys(block.region, (name, index // stage.period + 1))
        by_path = {str(n.meta["path"]): n for n in self.gm.graph.nodes if n.op in ("call_module", "call_function")}
        carriers = self._carriers()

        def owner(nodes: Iterable[fx.Node]) -> tuple[str, int] | None:
            found = {owners.get(n) for n in nodes}
            return found.pop() if len(found) == 1 else None

        choices = [Choice(RESOLUTION, "resolution", self.resolution)] if self.resolution else []
        choices += [Choice(name, "depth", values) for name, (_, values) in self.stages.items()]
        choices += [Choice(n, "width", values, owner(carriers[n])) for n, (_, values) in self.widths.items()]
        choices += [Choice(n, "kernel", values, owner([by_path[p]])) for n, (p, values) in self.kernels.items()]
        choices += [Choice(n, "heads", values, owner([site.node])) for n, (site, values) in self.heads.items()]
        choices += [Choice(n, "bits", values, owner([site.node])) for n, (site, values) in self.bits.items()]
        return Space(tuple(choices))

    def _carriers(self) -> dict[str, list[fx.Node]]:
        """The nodes whose channels each choice of a width narrows: a block owns it only if it has all of them."""
        number = torch.full((len(self.channels.classes),), -1)
        found: list[list[fx.Node]] = [[] for _ in self.widths]
        for index, (site, _) in enumerate(self.widths.values()):
            number[site.classes] = index
        for node in self.channels.variables:
            for index in number[self.channels.of(node)].unique().tolist():
                if index >= 0 and not is_state(node):
                    found[index].append(node)
        return dict(zip(self.widths, found, strict=True))

    def cut(self, config: Config) -> Cut:
        """What a configuration leaves of the network."""
        removed = torch.zeros(len(self.channels.classes), dtype=torch.bool)
        for name, (site, _) in self.widths.items():
            removed[site.classes[config[name] :]] = True
        decision = decide(self.channels, removed)
        layers = {entry["path"]: entry for entry in decision["layers"]}
        for name, (path, sizes) in self.kernels.items():
            if config[name] < sizes[-1]:
                layers.setdefault(path, {"path": path})["kernel"] = config[name]
        for name, (head, _) in self.heads.items():
            if config[name] < head.count:
                _cut_heads(head, config[name], layers, decision)
        decision["layers"] = list(layers.values())
        tails = [stage.blocks[config[name] * stage.period :] for name, (stage, _) in self.stages.items()]
        int8 = frozenset(site.state for name, (site, _) in self.bits.items() if config[name] == INT8)
        return Cut(decision, tuple(tail for tail in tails if tail), int8)


def _cut_heads(site: HeadSite, count: int, layers: dict[str, Any], decision: dict[str, Any]) -> None:
    keep = site.order[:count]
    for path, side, heads in site.layers:
        mask = torch.isin(heads, keep)
        layers.setdefault(path, {"path": path})[side] = {"keep": ranges(mask), "of": len(mask)}
    for state, heads in site.states:
        mask = torch.isin(heads, keep)
        decision["states"].append({"state": state, "axis": 0, "keep": ranges(mask), "of": len(mask)})
    for path, argument, sizes in site.sizes:
        fewer = [s * count // site.count if s is not None and s > 0 else s for s in sizes]
        decision["sizes"].append({"path": path, "argument": argument, "sizes": fewer})


def _pinned(channels: Channels, elastic: set[fx.Node], protect: tuple[str, ...]) -> dict[str, str]:
    """Why layers with weights keep the channels that they write, by path."""
    found = {}
    for node in channels.gm.graph.nodes:
        if node in elastic or not channels.reader.is_affine(node) or node in channels.channelwise:
            continue
        path = str(node.meta["path"])
        if is_protected(path, protect):
            found[path] = "it is protected"
        elif node not in channels.writers:
            found[path] = "its weights are shared, computed or grouped"
        elif bool(channels.pinned[channels.variables[node]].all()):
            found[path] = "its channels reach the output, or an operation that needs all of them"
    return found
