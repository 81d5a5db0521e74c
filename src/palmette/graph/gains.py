"""What a removal saves on the clock: each piece of a network is timed as it is, and as it would be after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from palmette.graph.affine import merged_map
from palmette.graph.capture import make_inputs
from palmette.graph.linear_fit import linear_module
from palmette.graph.ops import BATCH_NORMS, module_of
from palmette.graph.paths import Path, Reader
from palmette.graph.rewrite import describe_map
from palmette.graph.segments import GAIN, Merged, extract, geometry, input_shape, signature
from palmette.graph.sites import axis_of
from palmette.graph.spans import Run, inside, total
from palmette.graph.widen import parallel_form

if TYPE_CHECKING:
    from palmette.meter.table import CostTable


class Gains:
    """Milliseconds saved per sample at batch 1, by a table of costs in which equal pieces are measured once."""

    def __init__(self, reader: Reader, cost: CostTable, pad: str) -> None:
        self.reader, self.gm, self.cost, self.pad = reader, reader.gm, cost, pad

    def merge(self, elements: Path) -> float:
        """The elements with their activations against the merged operation."""
        merged = merged_map([self.reader.affine(e) for e in elements], self.pad)
        links: list[Any] = [a for e in elements[:-1] for a in e.links]
        nodes = [n for e in elements for n in e.nodes] + [n for a in links for n in a.region]
        before, _ = extract(self.gm, nodes, elements[-1].nodes[-1])
        after = Merged(merged, like=next(before.parameters()))
        ops = ",".join(a.op for a in links)
        key = f"{signature(self.reader, list(elements))} with {ops} -> {describe_map(merged)}"
        dtype = str(next(before.parameters()).dtype).removeprefix("torch.")
        example = make_inputs({"shape": input_shape(elements[0]), "dtype": dtype})
        return _gain(*self.cost.compare(key, before, after.eval(), example))

    def drop(self, run: Run) -> float:
        """The blocks against nothing."""
        return sum(self._time(block.region, block.output) for block in run)

    def fit(self, run: Run) -> float:
        """The blocks, what stands behind the last sum left out, against one linear map."""
        last, end = run[-1], total(run[-1])
        before = self.drop(run[:-1]) + self._time(inside((last,)), end)
        source = run[0].source
        shape, axis = [1, *source.meta["shape"][1:]], axis_of(self.gm, source)
        size, like = shape[axis], next(self.gm.parameters())
        noise = torch.randn(size, size + 1, generator=torch.Generator().manual_seed(0)) / size**0.5
        module = linear_module(noise, len(shape), axis, like=like).eval()
        example = make_inputs({"shape": shape, "dtype": str(like.dtype).removeprefix("torch.")})
        return before - self.cost.time(f"{module} on {shape}", module, example)

    def parallel(self, run: Run) -> float:
        """The blocks one after the other against side by side, as wide branches where they can be."""
        key = f"parallel {len(run)}: {geometry(self.gm, inside(run))}"
        pieces = _LOOKED_UP if key in self.cost.entries else parallel_form(self.gm, run)
        return _gain(*self.cost.compare(key, *pieces))

    def identity(self, node: fx.Node) -> float:
        """A convolution or linear, with the batch norm behind it, against that batch norm alone."""
        follower = next(iter(node.users)) if len(node.users) == 1 else None
        if follower is None or not isinstance(module_of(self.gm, follower), BATCH_NORMS):
            return self._time([node], node)
        before, inputs = extract(self.gm, [node, follower], follower)
        after, _ = extract(self.gm, [follower], follower)
        key = f"without its first: {geometry(self.gm, [node, follower])}"
        ms_before, ms_after = self.cost.compare(key, before, after, inputs)
        return ms_before - ms_after

    def _time(self, nodes: Any, output: fx.Node) -> float:
        key = geometry(self.gm, nodes)
        module, inputs = _LOOKED_UP[1:] if key in self.cost.entries else extract(self.gm, nodes, output)
        return self.cost.time(key, module, inputs)


_LOOKED_UP: Any = (nn.Identity(), nn.Identity(), ())
"""In place of pieces whose times are in the table: cutting them out would copy their weights for nothing."""


def _gain(before: float, after: float) -> float:
    """What a merge saves; nothing, where it is less than what measurements scatter."""
    return before - after if after < GAIN * before else min(0.0, before - after)
