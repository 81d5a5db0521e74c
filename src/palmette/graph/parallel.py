"""Residual blocks in parallel: x + F1, + F2, ... become x + F1(x) + F2(x) + ..., and what that leaves out.

Source: Make Deep Networks Shallow Again (2023). Applied to trained weights it drops the cross terms, whose size
`cross_terms` measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from palmette.errors import DataError, PlanError
from palmette.graph.blocks import Block, find_blocks
from palmette.graph.observe import Probe, run_over, twin_of
from palmette.graph.ops import skip_transparent
from palmette.graph.padding import MaskTap
from palmette.graph.sites import Site, axis_of
from palmette.graph.spans import Run, closed_reason, run_at, total

MARK = "parallel"
"""Node metadata: the node adds branches that stand in parallel."""


def branch_of(gm: fx.GraphModule, block: Block) -> fx.Node | None:
    """What a block adds to its input, None where the input does not go into the sum as it is."""
    left, right = (n for n in total(block).args[:2] if isinstance(n, fx.Node))
    plain = [skip_transparent(gm, n) is block.source for n in (left, right)]
    if plain[0] == plain[1]:
        return None
    return right if plain[0] else left


def parallel_reason(gm: fx.GraphModule, run: Run) -> str:
    """Why the blocks of a run cannot stand in parallel, "" if they can."""
    if len(run) < 2:
        return "it is a single block"
    reason = closed_reason(run)
    if reason:
        return reason
    for block in run:
        if total(block) is not block.output:
            return f"'{block.path}' ends in an activation or norm behind its sum"
        if branch_of(gm, block) is None:
            return f"'{block.path}' changes what it adds its branch to"
    return ""


def make_parallel(gm: fx.GraphModule, run: Run) -> None:
    """Let every block of a run read the run's input, in place; `parallel_reason` must be empty."""
    source, end = run[0].source, total(run[-1])
    branches: list[Any] = [branch_of(gm, block) for block in run]
    for block in run[1:]:
        for node in block.region - {block.output}:
            node.replace_input_with(block.source, source)
    summed = branches[0]
    for i, branch in enumerate(branches[1:], 1):
        with gm.graph.inserting_before(end):
            summed = gm.graph.call_function(torch.ops.aten.add.Tensor, (summed, branch))
        summed.meta.update({k: v for k, v in end.meta.items() if k != "block"}, path=f"{end.meta['path']}.parallel{i}")
        summed.meta[MARK] = True
    end.args = (source, summed)
    end.meta["block"] = f"{run[0].path}..{run[-1].path}"


# -- what is lost ------------------------------------------------------------------------------------------------------


class CrossTerm:
    """Mean over samples of |F(x + ...) - F(x)| / |F(x + ...)| for one branch F, in float64."""

    def __init__(self, axis: int, tap: MaskTap) -> None:
        self.axis, self.tap = axis, tap
        self.sums = torch.zeros(2, dtype=torch.float64)  # ratios, samples

    def __call__(self, apart: Tensor, true: Tensor) -> None:
        """Take in one batch: the branch of the run's input, and of what the network gives it, both [batch, ...]."""
        mask = self.tap.for_tokens(true, -1 if self.axis == true.dim() - 1 else self.axis)
        a, b = (
            t.detach().double() if mask is None else t.detach().double() * mask.unsqueeze(-1) for t in (apart, true)
        )
        lost, size = ((t * t).flatten(1).sum(1).sqrt() for t in (b - a, b))
        ratio = torch.where(lost > 0, lost / size.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp_max(1e6)
        if not bool(torch.isfinite(lost).all()):
            raise DataError("a block's features are not finite", fix="Look for NaN or infinite values in the data")
        self.sums = self.sums + torch.tensor([float(ratio.sum()), float(len(ratio))], dtype=torch.float64)

    def totals(self) -> dict[str, Tensor]:
        """What was added up so far."""
        return {"sums": self.sums}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on with the sums of all processes."""
        self.sums = totals["sums"]

    def mean(self) -> float:
        """The mean over all samples."""
        return float(self.sums[0] / self.sums[1])


def cross_term(gm: fx.GraphModule, span: Site | str, loader: Iterable[Any]) -> float:
    """How much the branches of a span change when they read the span's input: 0 where parallel form is exact.

    For two blocks the mean over samples of |F2(x + F1(x)) - F2(x)| / |F2(x + F1(x))|; of more, the mean over the later
    blocks. Padding tokens are left out. Raises PlanError for an unknown span, DataError for an empty loader.
    """
    path = span if isinstance(span, str) else span.path
    return cross_terms(gm, [path], loader)[path]


def cross_terms(gm: fx.GraphModule, spans: Sequence[Site | str], loader: Iterable[Any]) -> dict[str, float]:
    """`cross_term` of every span, by path, from one pass over `loader`; later branches then run once more per span."""
    tap = MaskTap(loader)
    twin = twin_of(gm)
    blocks = find_blocks(twin)
    runs = {path: run_at(twin, path, blocks) for path in (s if isinstance(s, str) else s.path for s in spans)}
    found: dict[str, list[CrossTerm]] = {path: [] for path in runs}
    known: dict[tuple[fx.Node, str], CrossTerm] = {}
    for path, run in runs.items():
        reason = parallel_reason(twin, run)
        if reason:
            raise PlanError(f"'{path}' cannot be parallelised", why=reason)
    for path, run in runs.items():
        for block in run[1:]:
            key = (run[0].source, block.path)
            if key not in known:
                known[key] = CrossTerm(axis_of(twin, run[0].source), tap)
                _probe(twin, run[0].source, block, known[key], len(known))
            found[path].append(known[key])
    twin.recompile()
    run_over(twin, tap, sums=list(known.values()))
    return {path: sum(t.mean() for t in terms) / max(len(terms), 1) for path, terms in found.items()}


def _probe(twin: fx.GraphModule, source: fx.Node, block: Block, term: CrossTerm, number: int) -> None:
    """Run the branch of a block a second time, on `source`, and show both results to `term`."""
    branch: Any = branch_of(twin, block)
    end = total(block)
    copies: dict[fx.Node, fx.Node] = {block.source: source}
    order = {n: i for i, n in enumerate(twin.graph.nodes)}
    for node in sorted(block.region, key=order.__getitem__):
        if node is not end:
            with twin.graph.inserting_before(end):
                copies[node] = twin.graph.node_copy(node, lambda n: copies.get(n, n))
    name = f"palmette_probe_{number}"
    twin.add_module(name, Probe(term))
    with twin.graph.inserting_before(end):
        probe = twin.graph.call_module(name, (copies[branch], branch))
    probe.meta.update(branch.meta, path=name)
