"""What is worth ranking: every removal of one kind that can be done, with what it would save and where it reaches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from palmette.errors import PlanError
from palmette.graph.activations import Activation, find_activations
from palmette.graph.blocks import find_blocks
from palmette.graph.gains import Gains
from palmette.graph.layers import layers
from palmette.graph.linear_fit import fit_reason, linear_macs
from palmette.graph.paths import Path, Reader
from palmette.graph.plan import Edit, drop, fit_linear, identity, linearize, parallelize
from palmette.graph.sites import (
    Site,
    Window,
    activation_sites,
    block_macs,
    convolution_sites,
    element_macs,
    run_site,
    window_of,
)
from palmette.graph.spans import Run, closed_reason, inside, runs
from palmette.graph.widen import Strands, wide_reason

if TYPE_CHECKING:
    from palmette.meter.table import CostTable

EDITS = {
    "activation": ("linearize",),
    "block": ("drop", "fit_linear"),
    "span": ("drop", "fit_linear", "parallelize"),
    "layer": ("drop", "fit_linear"),
    "convolution": ("identity",),
}
"""What can be done at each kind of site; the first is what is done unless asked otherwise."""

TIMED = 3
"""A window whose merge takes more than this many times the MACs of its elements is not timed: it cannot pay."""


@dataclass(frozen=True)
class Candidate:
    """One possible removal: the sites that go together, and what that is predicted to save per sample.

    `pays`: whether it saves something on the chosen cost (ms with a timing table, else MACs); `reason` says why not.
    `edit`: what is done at each site ("linearize", "drop", "fit_linear", "parallelize" or "identity"). `reach`:
    half-open interval of positions, in execution order of the graph given, of the nodes that it changes: candidates
    whose reaches are disjoint can be done together.
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
    edit: str = "",
    cost: CostTable | None = None,
    pad: str = "repad",
    protect: Iterable[str] = (),
    longest: int = 1,
    windows: bool = False,
) -> list[Candidate]:
    """Everything of one kind that could be removed from a captured graph, in execution order, each by its own name.

    kind: "activation", "block", "span" (every run of 2 to `longest` consecutive blocks, at least pairs), "layer" (the
    run of blocks that is a whole numbered layer, named by its path) or "convolution" (or linear, that keeps the shape
    of its input). edit: one of `EDITS` of that kind, the first by
    default. windows: instead of the cheapest group for each activation, every group of up to `longest` neighbouring
    ones whose merge pays. A parallelised span saves depth, not MACs: without a timing table it pays where `collapse`
    can make it wide. protect: path prefixes that stay; the first and last operations with weights always do.
    Raises PlanError for an unknown kind, or an edit of another kind.
    """
    if kind not in EDITS:
        raise PlanError(f"Unknown kind of site '{kind}'", fix=f"Use one of {', '.join(EDITS)}.")
    if edit and edit not in EDITS[kind]:
        raise PlanError(f"A site of kind {kind} knows no edit '{edit}'", fix=f"Use one of {', '.join(EDITS[kind])}.")
    finder = _Finder(gm, edit or EDITS[kind][0], cost, pad, tuple(protect))
    if kind == "activation":
        return list(finder.windows(longest) if windows else finder.groups())
    if kind == "convolution":
        return list(finder.convolutions())
    blocks = find_blocks(gm)
    if kind == "layer":
        return [replace(finder.run(run), name=path) for path, run in layers(gm, blocks).items()]
    found: list[Run] = [(b,) for b in blocks] if kind == "block" else runs(gm, max(longest, 2), blocks)
    return [finder.run(run) for run in found]


class _Finder:
    """Makes the candidates of one graph for one edit."""

    def __init__(
        self, gm: fx.GraphModule, edit: str, cost: CostTable | None, pad: str, protect: tuple[str, ...]
    ) -> None:
        self.gm, self.edit, self.pad, self.protect = gm, edit, pad, protect
        self.order = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.reader = Reader(gm, find_activations(gm))
        self.gains = Gains(self.reader, cost, pad) if cost is not None and cost.runtime != "macs" else None
        plain = Reader(gm)
        affine = [str(n.meta["path"]) for n in gm.graph.nodes if plain.is_affine(n)]
        self.strands = Strands(gm)
        self.ends = {affine[0], affine[-1]} if affine else set()

    # -- activations ---------------------------------------------------------------------------------------------------

    def groups(self) -> Iterator[Candidate]:
        """For each activation the cheapest group to reach: alone, or the shortest that saves MACs together."""
        sites = {s.path: s for s in activation_sites(self.gm, self.pad)}
        places = self._places()
        done: set[str] = set()
        for path, site in sites.items():
            if path in done:
                continue
            group = tuple(sites[p] for p in site.partners)
            done.update(site.partners)
            where = self._stretch(group, places)
            saved = self.gains.merge(where) if self.gains and site.removable and where else None
            nodes = [n for e in where or () for n in e.nodes] or self._region(path)
            yield self._candidate(tuple(replace(s, ms_saved=saved) for s in group), site.macs_saved, saved, nodes)

    def windows(self, longest: int) -> Iterator[Candidate]:
        """Every group of up to `longest` neighbouring activations whose merge pays."""
        sites = {s.path: s for s in activation_sites(self.gm, self.pad)}
        names: set[str] = set()
        for path in self.reader.paths():
            for i in range(len(path)):
                for elements in (path[i:j] for j in range(i + 2, min(i + longest + 2, len(path) + 1))):
                    window = window_of(self.reader, elements, self.pad)
                    found = None if window is None else self._window(window, sites)
                    if found is not None and found.name not in names:
                        names.add(found.name)
                        yield found

    def _window(self, window: Window, sites: dict[str, Site]) -> Candidate | None:
        group = tuple(sites[a.path] for a in window.activations)
        saved = None
        if self.gains is not None:
            before = sum(element_macs(self.reader, e) for e in window.elements)
            if before - window.macs_saved > TIMED * before:
                return None
            saved = self.gains.merge(list(window.elements))
        if (window.macs_saved if saved is None else saved) <= 0:
            return None
        group = tuple(replace(s, ms_saved=saved) for s in group)
        return self._candidate(group, window.macs_saved, saved, [n for e in window.elements for n in e.nodes])

    def _places(self) -> dict[str, tuple[Path, int]]:
        """For each activation its path of elements and the number of the element before it."""
        return {
            link.path: (path, i)
            for path in self.reader.paths()
            for i, e in enumerate(path)
            for link in e.links
            if isinstance(link, Activation)
        }

    def _stretch(self, group: tuple[Site, ...], places: dict[str, tuple[Path, int]]) -> Path:
        """The elements that become one when the group goes, [] where there are none."""
        if not all(s.path in places for s in group):
            return []
        path, first = places[group[0].path]
        last = places[group[-1].path][1] + 1
        return path[first : last + 1] if path[first].nodes and last < len(path) else []

    def _region(self, path: str) -> list[fx.Node]:
        return [n for a in find_activations(self.gm) if a.path == path for n in a.region]

    # -- blocks, spans, convolutions -----------------------------------------------------------------------------------

    def run(self, run: Run) -> Candidate:
        """A block or a run of blocks, by the finder's edit."""
        site = run_site(run, {b.path: block_macs(self.gm, b) for b in run})
        reason = site.reason or self._reason(run)
        macs, saved = 0 if self.edit == "parallelize" else site.macs_saved, None
        if self.edit == "fit_linear" and not reason:
            macs -= linear_macs(self.gm, run[0].source)
        if self.gains is not None and not reason:
            saved = {"drop": self.gains.drop, "fit_linear": self.gains.fit, "parallelize": self.gains.parallel}[
                self.edit
            ](run)
        site = replace(site, ms_saved=saved, removable=not reason, reason=reason)
        nodes = [*(inside(run) if self.edit != "drop" else [n for b in run for n in b.region]), run[-1].output]
        return self._candidate((site,), macs, saved, nodes)

    def _reason(self, run: Run) -> str:
        if self.edit == "drop":
            return closed_reason(run)
        return fit_reason(self.gm, run) if self.edit == "fit_linear" else wide_reason(self.gm, run, self.strands)

    def convolutions(self) -> Iterator[Candidate]:
        """Every convolution and linear that keeps the shape of its input."""
        nodes = {str(n.meta["path"]): n for n in self.gm.graph.nodes if self.reader.is_affine(n)}
        for site in convolution_sites(self.gm):
            node = nodes[site.path]
            saved = self.gains.identity(node) if self.gains is not None else None
            yield self._candidate((replace(site, ms_saved=saved),), site.macs_saved, saved, [node])

    # -- all -----------------------------------------------------------------------------------------------------------

    def _candidate(self, group: tuple[Site, ...], macs: int, saved: float | None, nodes: list[fx.Node]) -> Candidate:
        name = " + ".join(s.path for s in group)
        reason = next((s.reason for s in group if not s.removable), "")
        if not reason and any(is_protected(p, self.protect) for s in group for p in (s.path, *s.members)):
            reason = "protected by the user"
        touched = {p for s in group for p in (s.producer, *s.consumers)} & self.ends
        if not reason and touched:
            reason = f"protected: '{min(map(str, touched))}' is the network's first or last operation with weights"
        if not reason and not (saved > 0 if saved is not None else macs > 0 or self.edit == "parallelize"):
            reason = (
                f"{'merging' if self.edit == 'linearize' else 'it'} would not save {'MACs' if saved is None else 'ms'}"
            )
        positions = [self.order[n] for n in nodes]
        reach = (min(positions), max(positions) + 1) if positions else (0, 0)
        return Candidate(name, group, macs, saved, not reason, reason, self.edit, reach)


def edits_of(candidate: Candidate, fit: str = "affine", *, force: bool = False) -> list[Edit]:
    """The edits that do a candidate's removal, one for each of its sites; `fit` and `force` are for activations."""
    if candidate.edit == "linearize":
        return [linearize(site, fit=fit, force=force) for site in candidate.sites]
    make = {"drop": drop, "fit_linear": fit_linear, "parallelize": parallelize, "identity": identity}[candidate.edit]
    return [make(site) for site in candidate.sites]


def is_protected(path: str, protect: Iterable[str]) -> bool:
    """Whether `path` is one of the protected paths, or lies below one."""
    return any(path == p or path.startswith(f"{p}.") for p in protect)


def with_measured_gain(gm: fx.GraphModule, sites: list[Site], cost: CostTable, pad: str) -> list[Site]:
    """The sites with `ms_saved` measured at batch 1 (or looked up): the piece as it is against the piece after."""
    gains: dict[str, float | None] = {}
    for kind in dict.fromkeys(s.kind for s in sites if s.kind != "span"):
        for candidate in candidates(gm, None, kind=kind, cost=cost, pad=pad):
            gains |= {f"{kind} {s.path}": candidate.ms_saved for s in candidate.sites}

    def gain(site: Site) -> float | None:
        if not site.removable or site.kind != "span":
            return gains.get(f"{site.kind} {site.path}") if site.removable else None
        return sum(gains[f"block {m}"] or 0.0 for m in site.members)

    return [replace(site, ms_saved=gain(site)) for site in sites]
