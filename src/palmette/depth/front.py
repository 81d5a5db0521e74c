"""The front of `auto` as it is in truth: picks of the knapsack applied, collapsed and timed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from palmette.depth.knapsack import Pick
from palmette.depth.options import Option, joined
from palmette.depth.session import Session
from palmette.errors import PlanError, RefusedEdit
from palmette.graph import Plan, collapse
from palmette.meter.compute import macs
from palmette.train.progress import progress


@dataclass(frozen=True, kw_only=True)
class Point:
    """One plan of the front: its options, predicted loss, MACs and the measured ms of the collapsed network."""

    keys: tuple[str, ...]
    plan: Plan
    loss: float
    macs: int
    latency_ms: float | None

    @property
    def cost(self) -> float:
        """Milliseconds, or MACs where nothing is timed."""
        return float(self.macs) if self.latency_ms is None else self.latency_ms


def measured_front(session: Session, picks: Sequence[Pick], options: Mapping[str, Option], most: int) -> list[Point]:
    """At most `most` points, costs falling and predicted losses rising; what turned out no faster is left out.

    Picks are thinned evenly in gain. Gains of parts add up only roughly, so each pick is collapsed and timed as a
    whole; measurements are journaled.
    """
    chosen = thinned([pick for pick in picks if pick.keys], most)
    points: list[Point] = []
    best = math.inf
    with progress("front", len(chosen)) as report:
        for number, pick in enumerate(chosen):
            found = session.run.once(f"front-{_key(pick)}", partial(_measured, session, pick, options))
            report(number + 1, "")
            if "macs" not in found:
                continue
            point = Point(
                keys=pick.keys,
                plan=Plan.from_json(found["plan"]),
                loss=pick.loss,
                macs=found["macs"],
                latency_ms=found["latency_ms"],
            )
            if point.cost < best:
                points.append(point)
                best = point.cost
    return points


def thinned(picks: Sequence[Pick], most: int) -> list[Pick]:
    """At most `most` of the picks, the last among them, their gains as evenly spaced as the picks allow."""
    if len(picks) <= most:
        return list(picks)
    last = picks[-1].gain
    wanted = [last * (k + 1) / most for k in range(most)]
    nearest = {min(range(len(picks)), key=lambda i: (abs(picks[i].gain - gain), i)) for gain in wanted}
    return [picks[i] for i in sorted(nearest)]


def _key(pick: Pick) -> str:
    return hashlib.sha256("\n".join(pick.keys).encode()).hexdigest()[:12]


def _measured(session: Session, pick: Pick, options: Mapping[str, Option]) -> dict[str, Any]:
    """Plan, MACs and latency of a pick; only the reason where its edits do not go together."""
    plan = joined(options[key] for key in pick.keys)
    try:
        edited = plan.apply(session.dense, session.example, pad=session.settings.pad)
    except (RefusedEdit, PlanError) as error:
        return {"refused": str(error)}
    small, _ = collapse(edited, cost=session.table)
    return {"plan": plan.to_json(), "macs": macs(small, session.single), "latency_ms": session.clock(small)}
