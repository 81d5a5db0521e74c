"""The search space of `auto`: every removal of every kind that pays, with its fitted plan and what it saves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from palmette.graph import Candidate, Plan, candidates, edits_of
from palmette.graph.inputs import Example
from palmette.meter.table import CostTable

KINDS = {
    "linearize": ("activation",),
    "drop": ("block",),
    "fit_linear": ("block", "span"),
    "parallelize": ("span",),
    "identity": ("convolution",),
}
"""Which kinds of sites each edit is tried at."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One possible removal: its name, the candidate, and the fitted plan that does it."""

    key: str
    candidate: Candidate
    plan: Plan

    @property
    def gain(self) -> float:
        """What it saves on the chosen cost: milliseconds, or MACs where nothing is timed."""
        timed = self.candidate.ms_saved
        return float(self.candidate.macs_saved) if timed is None else timed


def find_options(
    dense: fx.GraphModule,
    example: Example,
    table: CostTable,
    calibration: Iterable[Any],
    *,
    edits: Sequence[str],
    pad: str,
    protect: Sequence[str] = (),
    longest: int = 3,
) -> list[Option]:
    """Every removal by one of `edits` that pays, in execution order, all fitted in one pass over the calibration set.

    longest: most activations merged at once, and most blocks in a span. Raises DataError for an empty set.
    """
    found: dict[str, Candidate] = {}
    for edit in edits:
        for kind in KINDS[edit]:
            for candidate in candidates(
                dense,
                example,
                kind=kind,
                edit=edit,
                cost=table,
                pad=pad,
                protect=protect,
                longest=longest,
                windows=kind == "activation",
            ):
                if candidate.pays:
                    found.setdefault(f"{edit} {candidate.name}", candidate)
    ordered = sorted(found.items(), key=lambda pair: (pair[1].reach, pair[0]))
    wanted = {(e.kind, e.site): e for _, candidate in ordered for e in edits_of(candidate)}
    fitted = {(e.kind, e.site): e for e in Plan(wanted.values()).fit(dense, calibration, example)} if wanted else {}
    return [Option(key=key, candidate=c, plan=Plan(fitted[e.kind, e.site] for e in edits_of(c))) for key, c in ordered]


def joined(options: Iterable[Option]) -> Plan:
    """The plan of several removals that exclude one another nowhere."""
    return Plan([edit for option in options for edit in option.plan])
