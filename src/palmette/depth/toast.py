"""TOAST: put a linear map, fitted in closed form, in place of the spans whose output is most nearly linear.

Idea: where the features that leave a run of blocks are almost a linear map of those that enter it, that map, found by
least squares on calibration data, does the work of the blocks without any training.
Paper: TOAST: Transformer Optimization using Adaptive and Simple Transformations, 2024 (arXiv 2410.04941). Differs: any
run of residual blocks of a graph, or single blocks, convolutional ones pixel by pixel; spans are ranked by the error of
the fit on samples held out of it instead of by similarities; a span ends before an outer activation or norm; padded
tokens are left out; the map is trained on when the network is healed.
Shapes: [batch, tokens, D] or [batch, D, height, width] -> a map D -> D. Cost: one forward pass over the set, one
D x D product per token for each input and one for each span; one D x D system to solve per span.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import fx

from palmette.graph import Candidate, linear_residuals
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class ToastConfig(MethodConfig):
    """Whether runs of blocks or single blocks are replaced, and how many blocks a run may have."""

    sites: Literal["span", "block"] = "span"
    longest: Annotated[int, Bounds(low=2)] = 3


@method(
    name="toast",
    title="TOAST: linear maps in closed form in place of spans of blocks",
    paper="TOAST: Transformer Optimization using Adaptive and Simple Transformations. arXiv 2410.04941, 2024",
    unit="held-out squared error / variance",
    sites="span",
    edit="fit_linear",
    config=ToastConfig,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: ToastConfig,  # noqa: ARG001 - the interface of scores
    *,
    seed: int,  # noqa: ARG001
) -> dict[str, float]:
    """Error of the best linear map of each span relative to the variance of its output, held out; low = remove first.

    Raises DataError for an empty loader or features that are not finite.
    """
    residuals = linear_residuals(captured, [site for c in candidates for site in c.sites], loader)
    return {c.name: sum(residuals[site.path] for site in c.sites) for c in candidates}
