"""Parallel blocks: let neighbouring residual blocks read one input, where their branches hardly notice.

Idea: x + F1 followed by + F2 becomes x + F1(x) + F2(x), whose branches `collapse` makes one wide branch exactly; what
is lost is what F2 does with the change that F1 makes, measured as |F2(x + F1(x)) - F2(x)| / |F2(x + F1(x))|.
Paper: Make Deep Networks Shallow Again, 2023 (arXiv 2309.08414). Differs: the paper trains both forms from scratch and
compares them; here trained blocks are rewired, ranked by the size of the cross terms that this drops, and healed.
Shapes: branches of [batch, ...] of any shape. Cost: one forward pass over the set in which later branches run twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import fx

from palmette.graph import Candidate, cross_terms
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(MethodConfig):
    """How many neighbouring blocks may stand side by side."""

    longest: Annotated[int, Bounds(low=2)] = 2


@method(
    name="parallel",
    title="Parallel residual blocks: one wide block instead of several deep ones",
    paper="Make Deep Networks Shallow Again. arXiv 2309.08414, 2023",
    unit="relative cross term",
    sites="span",
    edit="parallelize",
    config=ParallelConfig,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: ParallelConfig,  # noqa: ARG001 - the interface of scores
    *,
    seed: int,  # noqa: ARG001
) -> dict[str, float]:
    """How much later branches change when they read the span's input, relatively, on average; low = remove first.

    Raises DataError for an empty loader or features that are not finite.
    """
    terms = cross_terms(captured, [site for c in candidates for site in c.sites], loader)
    return {c.name: sum(terms[site.path] for site in c.sites) for c in candidates}
