"""Affine residual: linearise the activations that a line per channel fits best.

Idea: where y = slope * z + offset, fitted per channel by least squares, explains what an activation does, little is
lost by putting the line in its place. Unlike the entropy of signs this holds for every activation, and finds all
special cases: always ON (slope 1), always OFF (0), a saturated ReLU6 (0 and 6), a smooth activation in its linear part.
No paper. Shapes: [batch, channels, ...] or [batch, tokens, channels]. Cost: one forward pass over the set, five sums
per channel and activation; the fit itself is what the edit then uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from palmette.errors import DataError
from palmette.graph import Candidate, Moments, observe
from palmette.graph.padding import MaskTap
from palmette.registry import MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class AffineResidualConfig(MethodConfig):
    """How an activation is linearised: by the line that was fitted, or more coarsely."""

    fit: Literal["affine", "mask", "identity"] = "affine"


@method(
    name="affine_residual",
    title="Affine residual: linearise what a line per channel fits best",
    paper="none: a least-squares line per channel",
    unit="squared error / mean square",
    sites="activation",
    edit="linearize",
    config=AffineResidualConfig,
)
def score(
    captured: fx.GraphModule,  # the interface of scores
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: AffineResidualConfig,  # noqa: ARG001
    *,
    seed: int,  # noqa: ARG001
) -> dict[str, float]:
    """Squared error of the best line per channel relative to the mean square, summed per candidate; low = remove first.

    Padding tokens are left out. Raises DataError for an empty loader or activations that are not finite.
    """
    sites = {site.path: site for candidate in candidates for site in candidate.sites}
    tap = MaskTap(loader)
    moments = {path: Moments(-1 if s.channel_axis is None else s.channel_axis, tap) for path, s in sites.items()}
    observe(captured, moments, tap, sums=list(moments.values()))
    residuals = {path: found.residual() for path, found in moments.items()}
    if not all(value == value for value in residuals.values()):
        raise DataError("an activation is not finite", fix="Look for NaN or infinite values in the data and weights")
    return {c.name: sum(residuals[site.path] for site in c.sites) for c in candidates}
