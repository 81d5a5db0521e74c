"""Watch tensors inside a captured graph during one pass over calibration data, in eval mode."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

import palmette.ranks as ranks
from palmette.errors import DataError
from palmette.graph.activations import find_activations
from palmette.graph.blocks import find_blocks
from palmette.graph.inputs import call, inputs_of, to_device
from palmette.graph.padding import MaskTap
from palmette.graph.spans import run_at, total
from palmette.ranks import Summable

Watcher = Callable[[Tensor, Tensor], None]
"""Receives what goes into a site and what comes out of it, both [batch, ...]."""


class Probe(nn.Module):
    """Shows two tensors to a watcher and hands the second one on."""

    def __init__(self, watch: Watcher) -> None:
        super().__init__()
        self.watch = watch

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """`after`, unchanged."""
        self.watch(before, after)
        return after


def instrument(gm: fx.GraphModule, watchers: Mapping[str, Watcher], *, at_sum: bool = False) -> fx.GraphModule:
    """A twin of `gm` with the same weights that calls a watcher at each named activation, block or span.

    at_sum: blocks and spans are watched at their last sum, in front of an activation or norm that belongs to them.
    Raises PlanError for a path that is no site of the graph.
    """
    twin = twin_of(gm)
    ends = {a.path: (a.source, a.output) for a in find_activations(twin)}
    blocks = find_blocks(twin)
    for path in watchers:
        if path not in ends:
            run = run_at(twin, path, blocks)
            ends[path] = run[0].source, total(run[-1]) if at_sum else run[-1].output
    for i, (path, watch) in enumerate(watchers.items()):
        source, output = ends[path]
        name = f"palmette_probe_{i}"
        twin.add_module(name, Probe(watch))
        with twin.graph.inserting_after(output):
            probe = twin.graph.call_module(name, (source, output))
        probe.meta.update(output.meta, path=name)
        output.replace_all_uses_with(probe, delete_user_cb=partial(operator.is_not, probe))
    twin.recompile()
    return twin


def twin_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A captured network with a graph of its own and the same modules."""
    twin = fx.GraphModule(gm, _copied(gm.graph))
    twin.meta.update(gm.meta)
    return twin


def _copied(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph(tracer_cls=getattr(graph, "_tracer_cls", None))
    val_map: dict[fx.Node, fx.Node] = {}
    output: Any = copied.graph_copy(graph, val_map, return_output_node=True)
    if output is not None:
        value, old = output
        node = copied.output(value)
        node.meta.update(old.meta)
    for old_node, new_node in val_map.items():
        new_node.meta.update(old_node.meta)
    copied.set_codegen(graph._codegen)
    return copied


def observe(
    gm: fx.GraphModule,
    watchers: Mapping[str, Watcher],
    loader: Iterable[Any],
    *,
    max_batches: int | None = None,
    sums: Sequence[Summable] = (),
    at_sum: bool = False,
) -> int:
    """Run `gm` once over `loader` in eval mode and call the watchers at every batch; returns the number of batches.

    `sums` and `max_batches` are those of `run_over`, `at_sum` that of `instrument`.
    Raises DataError if the loader is empty, PlanError for a path that is no site.
    """
    return run_over(instrument(gm, watchers, at_sum=at_sum), loader, max_batches=max_batches, sums=sums)


def run_over(
    twin: fx.GraphModule,
    loader: Iterable[Any],
    *,
    max_batches: int | None = None,
    sums: Sequence[Summable] = (),
) -> int:
    """Run a network with probes once over `loader` in eval mode; returns the number of batches.

    sums: what the watchers fill, all of it, where it can be added up: several processes that work together then see a
    share of the batches each, and the totals are put in its place at the end. Without it each of them sees all.
    Raises DataError if the loader is empty.
    """
    modes = {m: m.training for m in twin.modules()}
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    count = 0
    try:
        twin.eval()
        with torch.no_grad(), ranks.joint() if sums else contextlib.nullcontext():
            for batch in itertools.islice(loader, max_batches):
                if not sums or ranks.mine(count):
                    call(twin, to_device(inputs_of(batch), device))
                count += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
    if count == 0:
        raise DataError("The calibration loader is empty", fix="Give it at least one batch.")
    if sums:
        ranks.add_up(sums)
    return count


class Moments:
    """Per-channel first and second moments of an activation's input z and output y, in float64.

    `tap`: the loader that the batches come from; padding tokens by its mask are then left out.
    """

    def __init__(self, axis: int, tap: MaskTap | None = None) -> None:
        self.axis, self.tap = axis, tap
        self.count = 0
        self.sums: Tensor | None = None  # [5, C]: z, y, z*z, z*y, y*y

    def __call__(self, before: Tensor, after: Tensor) -> None:
        """Take in one batch: z and y, both [batch, ...] with channels along `axis`."""
        z = before.detach().transpose(self.axis, -1).reshape(-1, before.shape[self.axis]).double()  # [positions, C]
        y = after.detach().transpose(self.axis, -1).reshape(-1, after.shape[self.axis]).double()
        mask = None if self.tap is None else self.tap.for_tokens(before, -1 if self.axis == before.dim() - 1 else 1)
        if mask is not None:
            kept = mask.flatten().bool()
            z, y = z[kept], y[kept]
        if self.sums is None:
            self.sums = z.new_zeros(5, z.shape[1])
        self.sums += torch.stack([z.sum(0), y.sum(0), (z * z).sum(0), (z * y).sum(0), (y * y).sum(0)])
        self.count += z.shape[0]

    def totals(self) -> dict[str, Tensor]:
        """What was added up so far."""
        return {} if self.sums is None else {"sums": self.sums, "count": torch.tensor(self.count)}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on with the sums of all processes."""
        if totals:
            self.sums, self.count = totals["sums"], int(totals["count"])

    def affine(self) -> tuple[Tensor, Tensor]:
        """Least-squares slope and offset [C] of y = slope * z + offset; slope 0 for a constant z."""
        z, y, zz, zy, _ = self._means()
        variance = (zz - z * z).clamp_min(0)
        steady = variance <= 1e-12 * (zz + 1e-300)
        slope = torch.where(
            steady, torch.zeros_like(z), (zy - z * y) / torch.where(steady, torch.ones_like(z), variance)
        )
        return slope, y - slope * z

    def mask(self) -> tuple[Tensor, Tensor]:
        """Slope 1 where the channel is mostly on (mean z > 0), else 0; no offset."""
        z = self._means()[0]
        return (z > 0).double(), torch.zeros_like(z)

    def residual(self) -> float:
        """Relative squared error of the affine fit, over all channels: 0 for a linear activation."""
        _, y, _, _, yy = self._means()
        slope, offset = self.affine()
        z, _, zz, zy, _ = self._means()
        error = yy - 2 * slope * zy - 2 * offset * y + slope**2 * zz + 2 * slope * offset * z + offset**2
        return float(error.clamp_min(0).sum() / yy.sum().clamp_min(1e-300))

    def _means(self) -> tuple[Tensor, ...]:
        if self.sums is None:
            raise DataError("No calibration data has been seen")
        return tuple(self.sums / self.count)
