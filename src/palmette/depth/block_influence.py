"""Block influence: drop the blocks that turn their input least.

Idea: 1 - mean cosine between what enters and what leaves a block; a block near 0 passes its input on and can go.
Paper: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024 (arXiv
2403.03853); the same measure is used by Minitron. Differs: any block of equal input and output shape in the graph, not
only transformer layers, or a run of such blocks as a whole; a feature map counts as one vector per sample, whichever
way its axes lie; padded tokens are left out.
Shapes: [batch, features], [batch, tokens, features] or maps such as [batch, channels, ...]. Cost: one forward pass over
the set per round, two sums per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, fx

from palmette.errors import DataError
from palmette.graph import Candidate, observe
from palmette.graph.blocks import find_blocks
from palmette.graph.padding import MaskTap
from palmette.graph.sites import axis_of
from palmette.graph.spans import run_at
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class BlockInfluenceConfig(MethodConfig):
    """What is ranked: blocks, runs of consecutive ones (spans, of at most `longest`), or whole layers of several."""

    sites: Literal["block", "span", "layer"] = "block"
    longest: Annotated[int, Bounds(low=2)] = 3


class CosineMean:
    """Running mean of the cosine between input and output of one block, in float64.

    axis: of the channels; with three axes and the channels last there is one cosine per token, else one per sample.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.total, self.count = 0.0, 0

    def add(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch of inputs and outputs of equal shape; raises DataError when they are not finite."""
        whole = x.dim() > 3 or self.axis not in (-1, x.dim() - 1)
        a, b = (t.detach().double().flatten(1) if whole else t.detach().double() for t in (x, y))
        norms = a.norm(dim=-1) * b.norm(dim=-1)
        cosine = torch.where(norms > 0, (a * b).sum(dim=-1) / norms.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        cosine = torch.where((a == b).all(dim=-1), torch.ones_like(cosine), cosine)
        if mask is not None:
            cosine = cosine[mask.to(torch.bool)]
        if not bool(torch.isfinite(cosine).all()):
            raise DataError(
                "a block's features are not finite", fix="Look for NaN or infinite values in data and weights"
            )
        self.total += float(cosine.sum())
        self.count += cosine.numel()

    def totals(self) -> dict[str, Tensor]:
        """What was added up so far."""
        return {"cosines": torch.tensor(self.total, dtype=torch.float64), "tokens": torch.tensor(self.count)}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on with the sums of all processes."""
        self.total, self.count = float(totals["cosines"]), int(totals["tokens"])

    def influence(self) -> float:
        """1 - mean cosine, 0 (passes its input on) to 2; raises DataError before the first batch."""
        if self.count == 0:
            raise DataError("no batch reached a block", fix="Give a calibration loader that is not empty")
        return 1.0 - self.total / self.count


@method(
    name="block_influence",
    title="Block influence: drop the blocks that change their input least",
    paper="Men et al. ShortGPT. arXiv 2403.03853, 2024",
    unit="1 - cosine",
    sites="block",
    edit="drop",
    config=BlockInfluenceConfig,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: BlockInfluenceConfig,  # noqa: ARG001 - the interface of scores
    *,
    seed: int,  # noqa: ARG001
) -> dict[str, float]:
    """1 - mean cosine between the input and output of each block or span; low = remove first.

    Raises DataError for an empty loader or features that are not finite.
    """
    sites = {site.path: site for candidate in candidates for site in candidate.sites}
    tap = MaskTap(loader)
    blocks = find_blocks(captured)
    means = {path: CosineMean(axis_of(captured, run_at(captured, path, blocks)[0].source)) for path in sites}

    def adder(path: str) -> Callable[[Tensor, Tensor], None]:
        mean = means[path]
        return lambda x, y: mean.add(x, y, tap.for_tokens(y, mean.axis))

    observe(captured, {path: adder(path) for path in sites}, tap, sums=list(means.values()))
    return {c.name: sum(means[site.path].influence() for site in c.sites) for c in candidates}
