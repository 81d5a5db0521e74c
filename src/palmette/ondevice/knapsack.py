"""One choice for each item, the least error within a bound on bytes: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_BUCKETS = 2000


@dataclass(frozen=True)
class Choice:
    """One way to treat an item: its bytes, its error, and whatever it stands for."""

    nbytes: int
    error: float
    what: Any = None


def choose(items: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """Index of the choice for each item, so that bytes sum to at most `budget` and the error is as small as found.

    Dynamic programming over 2,000 buckets, each choice rounded up, so that the bound always holds; then exact
    improvement with the bytes that rounding left over. None when even the smallest choices exceed the budget.
    """
    smallest = [min(range(len(item)), key=[(c.nbytes, c.error) for c in item].__getitem__) for item in items]
    spare = budget - sum(item[i].nbytes for item, i in zip(items, smallest, strict=True))
    if spare < 0:
        return None
    fronts = [_front(item, item[i].nbytes) for item, i in zip(items, smallest, strict=True)]
    chosen = _by_buckets(fronts, spare)
    _improve(fronts, chosen, spare)
    return [front[i][2] for front, i in zip(fronts, chosen, strict=True)]


def _front(item: Sequence[Choice], smallest: int) -> list[tuple[int, float, int]]:
    """(bytes above the smallest choice, error, index): the choices that no other beats, in order of bytes."""
    found: list[tuple[int, float, int]] = []
    for index in sorted(range(len(item)), key=lambda i: (item[i].nbytes, item[i].error)):
        if not found or item[index].error < found[-1][1]:
            found.append((item[index].nbytes - smallest, item[index].error, index))
    return found


def _by_buckets(fronts: list[list[tuple[int, float, int]]], spare: int) -> list[int]:
    width = max(1, -(-spare // _BUCKETS))
    count = spare // width + 1
    least = np.zeros(count)
    taken: list[np.ndarray] = []
    for front in fronts:
        table = np.full((len(front), count), np.inf)
        for row, (size, error, _) in enumerate(front):
            steps = -(-size // width)
            if steps < count:
                table[row, steps:] = least[: count - steps] + error
        taken.append(table.argmin(0))
        least = table.min(0)
    place, chosen = count - 1, []
    for front, rows in zip(reversed(fronts), reversed(taken), strict=True):
        row = int(rows[place])
        chosen.append(row)
        place -= -(-front[row][0] // width)
    return chosen[::-1]


def _improve(fronts: list[list[tuple[int, float, int]]], chosen: list[int], spare: int) -> None:
    """Spend, in exact bytes, what the buckets left over: the best gain first."""
    left = spare - sum(front[i][0] for front, i in zip(fronts, chosen, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for number, (front, at) in enumerate(zip(fronts, chosen, strict=True)):
            for other in range(at + 1, len(front)):
                if front[other][0] - front[at][0] > left:
                    break
                gain = front[at][1] - front[other][1]
                if best is None or gain > best[0]:
                    best = gain, number, other
        if best is None:
            return
        _, number, other = best
        left -= fronts[number][other][0] - fronts[number][chosen[number]][0]
        chosen[number] = other
