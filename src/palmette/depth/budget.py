"""How many weights each layer loses in a round of entropy-driven pruning, and which: EGP, steps 4 to 6."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import torch
from torch import Tensor


def entropy_budget(
    scores: Mapping[str, float],
    contents: Mapping[str, int],
    rate: float,
    temperature: float = 1.0,
    limits: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many weights each layer loses: `rate` of all, shared by softmax(sum(I) / I / temperature).

    scores: importance I >= 0 per layer; a layer with I = 0 gets R = 0. contents: surviving weights per layer. limits:
    the most that a layer may lose (default: all that it holds). Layers whose share exceeds that get just that; the rest
    is shared anew among the others, I summed over these alone, until no share exceeds. Whole numbers by largest
    remainder; they sum to min(round(rate * all), all that may go) exactly. EGP, steps 4 and 5.
    """
    caps = {name: min(size, (limits or {}).get(name, size)) for name, size in contents.items()}
    wanted = min(round(rate * sum(contents.values())), sum(caps.values()))
    exact: dict[str, float] = {}
    left, budget = list(caps), float(wanted)
    while left:
        shares = _softmax([_relevance(scores[n], sum(scores[m] for m in left)) / temperature for n in left])
        over = [name for name, share in zip(left, shares, strict=True) if budget * share >= caps[name]]
        if not over:
            exact |= {name: budget * share for name, share in zip(left, shares, strict=True)}
            break
        exact |= {name: float(caps[name]) for name in over}
        budget = max(budget - sum(caps[name] for name in over), 0.0)
        left = [name for name in left if name not in over]
    return _whole(exact, caps, wanted)


def _relevance(score: float, total: float) -> float:
    """R = sum(I) / I, 0 for I = 0; finite."""
    return min(total / score, sys.float_info.max) if score > 0 else 0.0


def _softmax(values: list[float]) -> list[float]:
    top = min(max(values), sys.float_info.max)
    powers = [math.exp(min(value, sys.float_info.max) - top) for value in values]
    return [power / sum(powers) for power in powers]


def _whole(exact: Mapping[str, float], caps: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Whole numbers next to `exact` that sum to `wanted` and stay within `caps`: largest remainder first."""
    counts = {name: min(math.floor(exact[name]), caps[name]) for name in caps}
    missing = wanted - sum(counts.values())
    for name in sorted(caps, key=lambda name: counts[name] - exact[name]):
        step = min(max(missing, 0), caps[name] - counts[name], 1)
        counts[name] += step
        missing -= step
    for name in sorted(caps, key=lambda name: counts[name] - caps[name]):  # what rounding in the shares left over
        step = max(min(missing, caps[name] - counts[name]), -counts[name])
        counts[name] += step
        missing -= step
    return counts


def prune_smallest(weight: Tensor, count: int) -> None:
    """Set the `count` smallest magnitudes among the weights that are not zero to exactly zero; in place.

    Of equal ones the first go. Time: linear in the number of weights.
    """
    if count == 0:
        return
    flat = weight.detach().flatten()
    magnitude = flat.abs().masked_fill(flat == 0, math.inf)
    limit = torch.kthvalue(magnitude, count).values
    gone = magnitude < limit
    equal = torch.nonzero(magnitude == limit).flatten()
    gone[equal[: count - int(gone.sum())]] = True
    with torch.no_grad():
        weight.copy_(flat.masked_fill(gone, 0.0).view_as(weight))
