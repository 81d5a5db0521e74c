"""One option per group, the largest sum of scores, sums of costs within bounds: solved exactly.

Lagrange multipliers give an upper bound on every solution, and tell of each option how much of that bound it gives
away. Solutions are put together group by group from options whose losses sum to less than the gap between the bound and
the best solution known, so that none is missed; of those that another beats in score and in all costs, none is kept.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


class Choice(NamedTuple):
    """A solution: the sum of its scores, and the option taken in each group."""

    score: float
    options: list[int]


def choose(scores: Sequence[Array], costs: Sequence[Array], bounds: Array, floor: float = -np.inf) -> Choice | None:
    """The best solution with a score above `floor`; None when there is none.

    scores: [options] per group; costs: [options, C] per group, not negative, C at most 2; bounds [C] on their sums.
    Exact up to the rounding of float64 sums. Time and memory are small where near-optimal solutions are few,
    exponential at worst.
    """
    if not all(len(score) for score in scores):
        return None
    if not len(bounds):
        options = [int(score.argmax()) for score in scores]
        total = float(sum(score[i] for score, i in zip(scores, options, strict=True)))
        return Choice(total, options) if total > floor else None
    least = np.array([cost.min(0) for cost in costs])
    room = bounds - least.sum(0)
    if (room < 0).any():
        return None
    fits = [np.flatnonzero((cost - low <= room).all(1)) for cost, low in zip(costs, least, strict=True)]
    if not all(len(i) for i in fits):
        return None
    fits = [i[_front(score[i], cost[i])] for score, cost, i in zip(scores, costs, fits, strict=True)]
    groups = [_Group(score[i], cost[i]) for score, cost, i in zip(scores, costs, fits, strict=True)]
    found = _search(groups, bounds, floor)
    return found and Choice(found.score, [int(i[o]) for i, o in zip(fits, found.options, strict=True)])


class _Group(NamedTuple):
    score: Array
    cost: Array


def _search(groups: list[_Group], bounds: Array, floor: float) -> Choice | None:
    """Solutions that lose little of the bound first; what they reach shows when nothing better can be left."""
    price, bound = _prices(groups, bounds)
    values = [group.score - group.cost @ price for group in groups]
    losses = [value.max() - value for value in values]
    everything = sum(float(loss.max()) for loss in losses) * (1 + 1e-9)  # no option may fall to rounding
    best, reach = None, everything / 1000
    while True:
        span = min(reach, bound - floor, everything)
        if span < 0:
            return best
        found = _within(groups, losses, bounds, span)
        if found is not None and found.score > floor:
            best, floor = found, found.score
        if span >= min(bound - floor, everything):
            return best
        reach *= 4


def _prices(groups: list[_Group], bounds: Array) -> tuple[Array, float]:
    """Prices [C] of the costs, and the upper bound that they give: bisection, one cost after the other."""
    price = np.zeros(len(bounds))

    def spent(price: Array) -> Array:
        picks = [int((score - cost @ price).argmax()) for score, cost in groups]
        return np.asarray(np.sum([cost[i] for (_, cost), i in zip(groups, picks, strict=True)], axis=0))

    for _ in range(1 if len(bounds) == 1 else 6):
        for c in range(len(bounds)):
            price[c] = 0.0
            if spent(price)[c] <= bounds[c]:
                continue
            low, high = 0.0, sum(float(np.ptp(score)) for score, _ in groups) / max(float(bounds[c]), 1.0)
            for _ in range(60):
                price[c] = high
                if spent(price)[c] <= bounds[c]:
                    break
                low, high = high, 4 * high
            for _ in range(40):
                price[c] = (low + high) / 2
                low, high = (low, price[c]) if spent(price)[c] <= bounds[c] else (price[c], high)
            price[c] = high
    bound = float(price @ bounds) + sum(float((score - cost @ price).max()) for score, cost in groups)
    return price, bound


def _within(groups: list[_Group], losses: list[Array], bounds: Array, reach: float) -> Choice | None:
    """The best solution whose losses sum to at most `reach`; None when none of these is within the bounds."""
    rest = np.cumsum([group.cost.min(0) for group in groups[::-1]], axis=0)[::-1]
    lost, score, cost = np.zeros(1), np.zeros(1), np.zeros((1, len(bounds)))
    taken: list[tuple[Any, Any]] = []
    for number, (group, loss) in enumerate(zip(groups, losses, strict=True)):
        order = loss.argsort(kind="stable")
        count = np.searchsorted(loss[order], reach - lost, side="right")
        parent = np.repeat(np.arange(len(lost)), count)
        option = order[np.arange(len(parent)) - np.repeat(count.cumsum() - count, count)]
        spent = cost[parent] + group.cost[option]
        after = rest[number + 1] if number + 1 < len(groups) else 0
        keep = np.flatnonzero((spent + after <= bounds).all(1))
        gained = score[parent] + group.score[option]
        keep = keep[_front(gained[keep], spent[keep])]
        if not len(keep):
            return None
        lost, score, cost = (lost[parent] + loss[option])[keep], gained[keep], spent[keep]
        taken.append((parent[keep], option[keep]))
    at, options = int(score.argmax()), []
    total = float(score[at])
    for parent, option in reversed(taken):
        options.append(int(option[at]))
        at = int(parent[at])
    return Choice(total, options[::-1])


def _front(score: Array, cost: Array) -> Any:
    """Places of the entries that no other beats in score and in all costs, which are one or two; of equals one stays.

    A stair holds the costs of what is kept so far: the first cost rises along it, the second falls.
    """
    order = np.lexsort((*cost.T[::-1], -score))
    stair: list[tuple[float, float]] = []
    kept = []
    for place, x, y in zip(order.tolist(), cost[order, 0].tolist(), cost[order, -1].tolist(), strict=True):
        before = bisect_right(stair, (x, np.inf))
        if before and stair[before - 1][1] <= y:
            continue
        kept.append(place)
        start = end = bisect_left(stair, (x, -np.inf))
        while end < len(stair) and stair[end][1] >= y:
            end += 1
        stair[start:end] = [(x, y)]
    return np.array(kept, dtype=np.int64)
