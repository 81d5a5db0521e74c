"""Whole layers: the residual blocks that make up one numbered child of a list of modules, as in a transformer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import fx

from palmette.graph.blocks import Block, find_blocks
from palmette.graph.ops import is_state, is_transparent, module_of, skip_transparent
from palmette.graph.spans import Run


def layers(gm: fx.GraphModule, blocks: Iterable[Block] | None = None) -> dict[str, Run]:
    """Every whole layer by its path ("encoder.layer.3"), in execution order, as the run of its droppable blocks.

    A layer's blocks read one another, and hold all that has weights under the longest path with a number at its end
    that the first of them lies under. A stage of convolutional blocks, each numbered, has layers of one block.
    """
    weighted = {node: path for node in gm.graph.nodes if (path := _home_of_weights(gm, node)) is not None}
    grouped: dict[str, list[Block]] = {}
    for block in find_blocks(gm) if blocks is None else blocks:
        home = _numbered([path for node, path in weighted.items() if node in block.region])
        if home and not block.reason:
            grouped.setdefault(home, []).append(block)
    found: dict[str, Run] = {}
    for home, members in grouped.items():
        outer = tuple(b for b in members if not any(b is not other and b.output in other.region for other in members))
        region = with_feeders(gm, outer)
        whole = all(node in region for node, path in weighted.items() if f"{path}.".startswith(f"{home}."))
        if whole and all(skip_transparent(gm, b.source) is a.output for a, b in itertools.pairwise(outer)):
            found[home] = outer
    return found


def with_feeders(gm: fx.GraphModule, blocks: Iterable[Block]) -> frozenset[fx.Node]:
    """The nodes of the blocks, and what is computed for them alone: tables of positions, casts of masks."""
    blocks = tuple(blocks)
    grown = {n for block in blocks for n in block.region}
    inputs = {_origin(gm, block.source) for block in blocks} - grown
    waiting = list(grown)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            stays = node in grown or node in inputs or node.op == "placeholder"
            if not stays and all(user in grown for user in node.users):
                grown.add(node)
                waiting.append(node)
    return frozenset(grown)


def _origin(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What a run of casts and copies before `node` reads, modules being no copies."""
    while node.op == "call_function" and is_transparent(gm, node):
        node = node.all_input_nodes[0]
    return node


def _home_of_weights(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """The path of the module whose weights an operation reads; None where it reads none."""
    module = module_of(gm, node)
    if module is not None:
        return str(node.target) if any(True for _ in module.parameters()) else None
    state = [n for n in node.all_input_nodes if is_state(n)]
    return str(state[0].target).rpartition(".")[0] if state and node.op == "call_function" else None


def _numbered(paths: list[str]) -> str:
    """The longest common path that ends in a number, "" for none."""
    common: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and not common[-1].isdigit():
        common.pop()
    return ".".join(common)
