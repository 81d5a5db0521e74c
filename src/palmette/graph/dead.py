"""Take out channels that carry nothing: zeros of unstructured pruning become fewer rows and columns, exactly.

A channel is dead if every layer that reads it has only zeros in that column, or if it carries a constant (a zero row, a
scale of zero) that the readers can take into their bias. Zero padding sets a constant other than 0 off at the border,
so such a channel stays. What goes kills rows upstream and makes constants downstream, until nothing changes.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from palmette.errors import InputError
from palmette.graph.capture import example_of, is_captured
from palmette.graph.channel_rules import first
from palmette.graph.channels import Channels, padded
from palmette.graph.inputs import with_batch
from palmette.graph.io import structure_hash
from palmette.graph.ops import module_of
from palmette.graph.resize import decide, give_bias, resize
from palmette.graph.segments import GAIN

if TYPE_CHECKING:
    from palmette.meter.table import CostTable

MULTIPLES = (1, 8, 16)
"""Numbers of channels that are tried in multiples of these where time decides: runtimes compute channels in blocks.

Pairs of 3x3 convolutions in ONNX Runtime with AVX-512, one thread: with 16 of 32 channels between them they take about
0.55 of the time, with 24 of 32 1.04, with 31 of 32 1.35. In eager mode the same take 0.66, 0.88 and 1.03.
"""


@dataclass(frozen=True)
class DeadRecord:
    """What `remove_dead_channels` did.

    `narrowed`: the layers that write fewer channels ("producer", "kept", "of"); `folded`: the layers whose bias took in
    constants; parameters of the network before and after; `refused`: why dead channels stayed, if they did.
    """

    narrowed: list[dict[str, Any]] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    params_before: int = 0
    params_after: int = 0
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def __str__(self) -> str:
        gone = sum(n["of"] - n["kept"] for n in self.narrowed)
        return (
            f"{gone} dead channels of {len(self.narrowed)} layers removed, "
            f"{self.params_before:,} -> {self.params_after:,} parameters"
        )


def remove_dead_channels(network: fx.GraphModule, *, multiple: int = 1) -> tuple[fx.GraphModule, DeadRecord]:
    """A captured network without its dead channels, which computes the same in eval mode, and a record of them.

    `network` stays untouched; every layer keeps at least one channel, the output its shape. `multiple`: layers keep
    some dead channels where their number would not be a multiple of this. The step is noted in the metadata, so that
    the result can be saved and loaded. Raises InputError if `network` is not captured.
    """
    if not is_captured(network):
        raise InputError("Only captured networks can be narrowed", fix="Call pm.capture(model, example_inputs) first.")
    gm = copy.deepcopy(network)
    return gm, narrow_dead(gm, multiple)


def narrow_dead(gm: fx.GraphModule, multiple: int = 1) -> DeadRecord:
    """`remove_dead_channels` in place."""
    before = sum(p.numel() for p in gm.parameters())
    channels = Channels(gm)
    removed = _dead(channels, multiple)
    parts = {n: _constant_part(channels, n, removed) for n in channels.readers}
    parts = {n: part for n, part in parts.items() if bool(part.any())}
    narrowed = [
        {"producer": str(n.meta["path"]), "kept": int((~removed[channels.of(n)]).sum()), "of": len(channels.of(n))}
        for n in channels.writers
        if bool(removed[channels.of(n)].any())
    ]
    decision = decide(channels, removed, [str(n.meta["path"]) for n in parts])
    _fold(gm, parts)
    resize(gm, decision)
    return DeadRecord(narrowed, decision["folded"], before, sum(p.numel() for p in gm.parameters()))


def narrow_where_it_pays(gm: fx.GraphModule, table: CostTable | None) -> tuple[fx.GraphModule, DeadRecord]:
    """`gm` without dead channels as far as that lowers the measured time of the whole network at batch 1.

    Without a table, or by multiply-adds, all of them go.
    """
    if table is None or table.runtime == "macs":
        return remove_dead_channels(gm)
    example = with_batch(example_of(gm), 1)
    whole = f"{structure_hash(gm)} {json.dumps(gm.meta['palmette']['inputs'])}"
    options: dict[str, tuple[fx.GraphModule, DeadRecord]] = {}
    for multiple in MULTIPLES:
        small, record = remove_dead_channels(gm, multiple=multiple)
        if record.narrowed:
            kept = json.dumps([(n["producer"], n["kept"]) for n in record.narrowed])
            options.setdefault(f"dead channels of {whole} -> {kept}", (small, record))
    times = {key: table.compare(key, gm, small, example) for key, (small, _) in options.items()}
    if not times:
        return gm, DeadRecord()
    best = min(times, key=lambda key: times[key][1] / times[key][0])
    before, after = times[best]
    if after < GAIN * before:
        return options[best]
    return gm, DeadRecord(refused=f"without dead channels it would not be faster: {before:.4g} -> {after:.4g} ms")


def remove_again(network: fx.GraphModule, decision: dict[str, Any]) -> fx.GraphModule:
    """`network` narrowed by a decision already taken, constants folded anew: the float64 twin of a narrowed one."""
    gm = copy.deepcopy(network)
    channels = Channels(gm)
    by_path = {str(n.meta["path"]): n for n in gm.graph.nodes if n.op == "call_module"}
    removed = torch.zeros(len(channels.classes), dtype=torch.bool)
    for entry in decision["layers"]:
        node = by_path[entry["path"]]
        for side, carrier in (("rows", node), ("columns", first(node)), ("channels", node)):
            if side in entry:
                gone = torch.ones(entry[side]["of"], dtype=torch.bool)
                for start, stop in entry[side]["keep"]:
                    gone[start:stop] = False
                removed[channels.of(carrier)[gone]] = True
    _fold(gm, {by_path[p]: _constant_part(channels, by_path[p], removed) for p in decision["folded"]})
    return resize(gm, decision)


def _dead(channels: Channels, multiple: int) -> Tensor:
    """[variables], whether the class of that number can go."""
    cells = {n: _zero_cells(channels, n) for n in channels.readers}
    harmless = {n: _harmless(channels, n) for n in channels.readers}
    free = ~channels.pinned & (channels.classes == torch.arange(len(channels.classes)))
    while True:
        removed = _grown(channels, free, cells, harmless)
        kept = {n: int((~removed[channels.of(n)]).sum()) for n in channels.writers}
        short = [(n, min(-k % multiple, len(channels.of(n)) - k)) for n, k in kept.items()]
        if not any(missing for _, missing in short):
            return removed
        for node, missing in short:
            classes = channels.of(node)
            free[classes[removed[classes]][:missing]] = False


def _grown(
    channels: Channels, free: Tensor, cells: dict[fx.Node, Tensor | None], harmless: dict[fx.Node, Tensor]
) -> Tensor:
    """[variables], the dead among the classes that may go; of those a layer keeps one, which is noted in `free`."""
    removed = torch.zeros_like(free)
    while True:
        blocked = torch.zeros_like(free)
        for node, zero in cells.items():
            rows = ~removed[channels.of(node)]
            needed = ~harmless[node] if zero is None else ~(harmless[node] | zero[rows].all(0))
            blocked[channels.of(first(node))[needed]] = True
        grown = free & ~blocked
        for node in channels.writers:
            classes = channels.of(node)
            if bool(grown[classes].all()):
                kept = classes[~removed[classes]][0]
                free[kept] = grown[kept] = False
        if torch.equal(grown, removed):
            return removed
        removed = grown


def _zero_cells(channels: Channels, node: fx.Node) -> Tensor | None:
    """[rows, columns], where the layer's weights are zero; None if nowhere."""
    weight: Any = module_of(channels.gm, node).weight  # type: ignore[union-attr]
    zero: Tensor = (weight.detach().flatten(2) == 0).all(2).cpu() if weight.dim() > 2 else (weight.detach() == 0).cpu()
    return zero if bool(zero.any()) else None


def _harmless(channels: Channels, node: fx.Node) -> Tensor:
    """[columns], which of them read a constant that the layer's bias can hold."""
    values = channels.values[first(node)]
    return values == 0 if padded(module_of(channels.gm, node)) else values.isfinite()


def _constant_part(channels: Channels, node: fx.Node, removed: Tensor) -> Tensor:
    """[rows], what the constants on the columns that go contribute to the layer's output; 0 for rows that go too."""
    source = first(node)
    values = channels.values[source]
    gone = removed[channels.of(source)] & values.isfinite() & (values != 0)
    weight = module_of(channels.gm, node).weight.detach().cpu()[:, gone].double()  # type: ignore[union-attr,operator]
    part: Tensor = (weight.flatten(2).sum(2) if weight.dim() > 2 else weight) @ values[gone]
    return torch.where(removed[channels.of(node)], 0.0, part)


def _fold(gm: fx.GraphModule, parts: dict[fx.Node, Tensor]) -> None:
    for node, part in parts.items():
        bias = give_bias(module_of(gm, node))
        with torch.no_grad():
            bias.copy_(bias.double() + part.to(bias.device))
