"""The exact choice among removals: least loss for every saving at once, by dynamic programming over their reach.

Kim et al. 2023 (two-stage DP) and LayerMerge (ICML 2024) choose merges under a latency budget by a knapsack over
discretised time. Here the items are intervals of the network in execution order, two that overlap exclude one another,
and one pass gives the whole front of (saving, loss) instead of the answer for one budget. Savings are whole numbers of
a unit of time, so that the front is exact for them. Cost: (items) x (points of the front), well under a second.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from palmette.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Item:
    """One possible removal: the half-open interval [start, end) that it changes, what it saves, what it costs."""

    key: str
    start: int
    end: int
    gain: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A set of items that exclude one another nowhere, with the sums of their gains and losses."""

    keys: tuple[str, ...]
    gain: int
    loss: float


@dataclass(frozen=True)
class _Point:
    gain: int
    loss: float
    item: Item | None = None
    before: _Point | None = None


def front(items: Iterable[Item]) -> list[Pick]:
    """Every set of disjoint items that no other one beats: gains rise, losses rise, the first has least loss of all.

    Items that save nothing at a loss are left out. Raises InputError for an item with an empty or reversed interval.
    """
    useful = [item for item in items if _checked(item).gain > 0 or item.loss < 0]
    useful.sort(key=lambda item: (item.end, item.start, item.key))
    ends: list[int] = []
    fronts: list[list[_Point]] = [[_Point(0, 0.0)]]  # fronts[k]: over items that end at ends[k - 1] or earlier
    for item in useful:
        if not ends or ends[-1] != item.end:
            ends.append(item.end)
            fronts.append(fronts[-1])
        base = fronts[bisect.bisect_right(ends, item.start)]
        added = [_Point(p.gain + item.gain, p.loss + item.loss, item, p) for p in base]
        fronts[-1] = _undominated([*fronts[-1], *added])
    return [_pick(point) for point in fronts[-1]]


def least_loss(picks: Sequence[Pick], gain: float) -> Pick | None:
    """The pick of a front with the least loss among those that save at least `gain`; None when none saves so much.

    For a greater gain it never answers with a pick that saves less.
    """
    return next((pick for pick in picks if pick.gain >= gain), None)


def _checked(item: Item) -> Item:
    if item.end <= item.start:
        raise InputError(
            f"the removal {item.key!r} changes nothing: [{item.start}, {item.end})",
            fix="Its reach must not be empty",
        )
    return item


def _undominated(points: list[_Point]) -> list[_Point]:
    """The points that no other one beats in gain and loss, gains rising; of equals the first found."""
    kept: list[_Point] = []
    for point in sorted(points, key=lambda p: (-p.gain, p.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept[::-1]


def _pick(point: _Point) -> Pick:
    keys: list[str] = []
    step: _Point | None = point
    while step is not None:
        if step.item is not None:
            keys.append(step.item.key)
        step = step.before
    return Pick(keys=tuple(reversed(keys)), gain=point.gain, loss=point.loss)
