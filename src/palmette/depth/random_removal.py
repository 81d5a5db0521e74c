"""Random removal: the control that every ranking has to beat.

Draws a number per candidate from a generator seeded by the seed and the candidate's name, so that the order does not
depend on what else is ranked. No paper. Cost: nothing; the data is not looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from palmette.graph import Candidate
from palmette.registry import MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class RandomConfig(MethodConfig):
    """Which kind of site is drawn from, and how an activation is linearised."""

    sites: Literal["activation", "block", "layer"] = "activation"
    fit: Literal["affine", "mask", "identity"] = "affine"


@method(
    name="random",
    title="Random removal (control)",
    paper="none: a control",
    unit="uniform in [0, 1)",
    sites="activation",
    edit="linearize, or drop for blocks",
    config=RandomConfig,
)
def score(
    captured: fx.GraphModule,  # noqa: ARG001 - the interface of scores
    candidates: Sequence[Candidate],
    loader: Iterable[Any],  # noqa: ARG001
    config: RandomConfig,  # noqa: ARG001
    *,
    seed: int,
) -> dict[str, float]:
    """A uniform random number per candidate, the same for the same seed and name; low = remove first."""
    return {candidate.name: _uniform(seed, candidate.name) for candidate in candidates}


def _uniform(seed: int, name: str) -> float:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
