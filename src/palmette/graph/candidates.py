"""What is worth ranking: single sites, or groups of activations that pay only together, with what each would save."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from palmette.errors import PlanError
from palmette.graph.activations import find_activations
from palmette.graph.affine import merged_map
from palmette.graph.blocks import Block, find_blocks
from palmette.graph.capture import make_inputs
from palmette.graph.ops import is_state
from palmette.graph.paths import Path, Reader
from palmette.graph.rewrite import describe_map
from palmette.graph.segments import GAIN, Merged, extract, input_shape, signature
from palmette.graph.sites import Site, activation_sites, block_sites

if TYPE_CHECKING:
    from palmette.meter.table import CostTable


@dataclass(frozen=True)
class Candidate:
    """One possible removal: the sites that go together, and what that is predicted to save per sample.

    `pays`: whether it saves something on the chosen cost (ms with a timing table, else MACs); `reason` says why not.
    `edit`: what is done at each site ("linearize", "drop", "fit_linear", "parallelize" or "identity"). `reach`: half-open
    interval of positions, in execution order of the graph given, of the nodes that it changes: candidates whose reaches
    are disjoint can be done together.
    """

    name: str
    sites: tuple[Site, ...]
    macs_saved: int
    ms_saved: float | None
    pays: bool
    reason: str
    edit: str = "linearize"
    reach: tuple[int, int] = (0, 0)


def candidates(
    gm: fx.GraphModule,
    example_inputs: Any,  # noqa: ARG001 (callers pass it; the graph knows its own shapes)
    *,
    kind: str = "activation",
    cost: CostTable | None = None,
    pad: str = "repad",
    protect: Iterable[str] = (),
) -> list[Candidate]:
    """Everything of one kind ("activation" or "block") that could be removed from a captured graph, in execution order.

    `protect`: path prefixes that stay. The network's first and last operations with weights are always protected.
    """
    if kind not in ("activation", "block"):
        raise PlanError(f"Unknown kind of site '{kind}'", fix="Use 'activation' or 'block'.")
    sites = activation_sites(gm, pad) if kind == "activation" else [s for s in block_sites(gm) if s.kind == "block"]
    if cost is not None and cost.runtime != "macs":
        sites = with_measured_gain(gm, sites, cost, pad)
    by_path = {s.path: s for s in sites}
    ends = _ends(gm)
    result: list[Candidate] = []
    done: set[str] = set()
    for site in sites:
        if site.path in done:
            continue
        group = tuple(by_path[p] for p in (site.partners if kind == "activation" else (site.path,)))
        done.update(s.path for s in group)
        result.append(_candidate(group, tuple(protect), ends))
    return result


def _candidate(group: tuple[Site, ...], protect: tuple[str, ...], ends: set[str]) -> Candidate:
    first = group[0]
    name = first.path if len(group) == 1 else " + ".join(s.path for s in group)
    reason = next((s.reason for s in group if not s.removable), "")
    if not reason and any(is_protected(s.path, protect) for s in group):
        reason = "protected by the user"
    touched = {p for s in group for p in (s.producer, *s.consumers)}
    if not reason and touched & ends:
        reason = f"protected: '{next(iter(touched & ends))}' is the network's first or last operation with weights"
    gain = first.ms_saved if first.ms_saved is not None else first.macs_saved
    if not reason and gain <= 0:
        unit = "ms" if first.ms_saved is not None else "MACs"
        reason = f"merging would not save {unit}"
    return Candidate(name, group, first.macs_saved, first.ms_saved, not reason, reason)


def is_protected(path: str, protect: Iterable[str]) -> bool:
    """Whether `path` is one of the protected paths, or lies below one."""
    return any(path == p or path.startswith(f"{p}.") for p in protect)


def _ends(gm: fx.GraphModule) -> set[str]:
    reader = Reader(gm)
    found = [str(n.meta["path"]) for n in gm.graph.nodes if reader.is_affine(n)]
    return {found[0], found[-1]} if found else set()


def with_measured_gain(gm: fx.GraphModule, sites: list[Site], cost: CostTable, pad: str) -> list[Site]:
    """The sites with `ms_saved` measured at batch 1 (or looked up): the piece as it is against the piece after."""
    gains: dict[tuple[str, ...], float] = {}
    reader = Reader(gm, find_activations(gm))
    runs = {
        link.path: (path, i)
        for path in reader.paths()
        for i, e in enumerate(path)
        for link in e.links
        if not isinstance(link, fx.Node)
    }
    blocks = {b.path: b for b in find_blocks(gm)}
    result = []
    for site in sites:
        gain: float | None = None
        if site.removable and site.kind == "activation":
            if site.partners not in gains:
                path, i = runs[site.partners[0]]
                last = runs[site.partners[-1]][1] + 1
                gains[site.partners] = _merge_gain(reader, path[i : last + 1], cost, pad)
            gain = gains[site.partners]
        elif site.removable:
            gain = sum(_block_gain(gm, blocks[m], cost) for m in (site.members or (site.path,)))
        result.append(replace(site, ms_saved=gain))
    return result


def _merge_gain(reader: Reader, elements: Path, cost: CostTable, pad: str) -> float:
    """Time of the elements with their activations minus time of the merged operation."""
    merged = merged_map([reader.affine(e) for e in elements], pad)
    links: list[Any] = [a for e in elements[:-1] for a in e.links]
    ops = [a.op for a in links]
    nodes = [n for e in elements for n in e.nodes] + [n for a in links for n in a.region]
    before, _ = extract(reader.gm, nodes, elements[-1].nodes[-1])
    after = Merged(merged, like=next(before.parameters()))
    key = f"{signature(reader, elements)} with {','.join(ops)} -> {describe_map(merged)}"
    example = _noise(input_shape(elements[0]), before)
    ms_before, ms_after = cost.compare(key, before, after.eval(), example)
    return ms_before - ms_after if ms_after < GAIN * ms_before else min(0.0, ms_before - ms_after)


def _block_gain(gm: fx.GraphModule, block: Block, cost: CostTable) -> float:
    module, inputs = extract(gm, block.region, block.output)
    lines = [f"{n.target}:{n.meta.get('shape')}" for n in gm.graph.nodes if n in block.region and not is_state(n)]
    weights = [tuple(p.shape) for p in module.parameters()]
    return cost.time(f"block {lines} {weights}", module, inputs)


def _noise(shape: list[int], module: Any) -> Any:
    dtype = next(module.parameters()).dtype
    return make_inputs({"shape": shape, "dtype": str(dtype).removeprefix("torch.")})
