"""Runs of consecutive residual blocks: how they are named, found again, and what may be done with them as a whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from palmette.errors import PlanError
from palmette.graph.blocks import Block, find_blocks
from palmette.graph.ops import skip_transparent

Run = tuple[Block, ...]
"""Blocks of which each reads the one before; a single block is a run of one."""


def name_of(run: Run) -> str:
    """The path of a run: that of its block, or "first..last"."""
    return run[0].path if len(run) == 1 else f"{run[0].path}..{run[-1].path}"


def runs(gm: fx.GraphModule, longest: int, blocks: Iterable[Block] | None = None) -> list[Run]:
    """Every run of 2 to `longest` droppable blocks, by the position of its first block, then by its length."""
    free = [b for b in (find_blocks(gm) if blocks is None else blocks) if not b.reason]
    after = _followers(gm, free)
    return [run for block in free for run in _grown(block, after, longest)]


def run_at(gm: fx.GraphModule, path: str, blocks: Sequence[Block] | None = None) -> Run:
    """The block or the run of that path, droppable or not. Raises PlanError for none."""
    blocks = find_blocks(gm) if blocks is None else blocks
    after = _followers(gm, blocks)
    for block in blocks:
        if block.path == path:
            return (block,)
        if path.startswith(f"{block.path}.."):
            for run in _grown(block, after, len(blocks)):
                if name_of(run) == path:
                    return run
    raise PlanError(f"No block is called '{path}'", fix="List the sites with `palmette sites` or pm.find_sites.")


def _followers(gm: fx.GraphModule, blocks: Iterable[Block]) -> dict[fx.Node, list[Block]]:
    after: dict[fx.Node, list[Block]] = {}
    for block in blocks:
        after.setdefault(skip_transparent(gm, block.source), []).append(block)
    return after


def _grown(first: Block, after: dict[fx.Node, list[Block]], longest: int) -> Iterator[Run]:
    """Every run of at least two blocks that begins with `first`."""
    grown: list[Run] = [(first,)]
    for _ in range(longest - 1):
        grown = [(*run, b) for run in grown for b in after.get(run[-1].output, ())]
        yield from grown


def total(block: Block) -> fx.Node:
    """The sum of a block, in front of an activation or a norm that belongs to the block."""
    node = block.output
    while "block" not in node.meta:
        node = node.all_input_nodes[0]
    return node


def inside(run: Run) -> frozenset[fx.Node]:
    """The nodes between the input of a run and its last sum, the sum included."""
    last = run[-1]
    behind = last.region - {last.output} if total(last) is not last.output else last.region
    between = [node for a, b in itertools.pairwise(run) for node in _upwards(b.source, a.output)]
    return frozenset(itertools.chain(behind, between, *(b.region for b in run[:-1])))


def _upwards(node: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """The transparent nodes from `node` up to `end`, which is left out."""
    while node is not end:
        yield node
        node = node.all_input_nodes[0]


def closed_reason(run: Run) -> str:
    """Why a run cannot be replaced as a whole, "" if nothing but its last sum is read from outside."""
    nodes, end = inside(run), total(run[-1])
    if any(b.reason for b in run):
        return next(b.reason for b in run if b.reason)
    for node in nodes - {end}:
        if any(user not in nodes for user in node.users):
            return f"'{node.meta['path']}' inside is read elsewhere"
    return ""
