"""LaCoOT: train with the blocks' outputs drawn towards their inputs, then drop those that have become no-ops.

Idea: the loss gains lambda times the mean over blocks of the max-sliced Wasserstein distance between what enters a
block and what leaves it; after that one training the blocks of least change are dropped, one by one. Paper: Quétu,
Liao, Hezbri, Pizzati, Tartaglione, "LaCoOT: Layer Collapse through Optimal Transport", ICCV 2025 (arXiv 2406.08933).
Differs: the block itself is watched (the authors' Swin code watches the branch before the addition), samples are
flattened whatever the batch size, the distance is relative to the size of the block's input, so that lambda transfers
between networks; and blocks are ranked by how far each sample moves, because equal distributions do not make a block
the identity (it may permute the samples). Dropped blocks are healed. `reproduce=True` is the paper's form: absolute
distance, lambda 5, ranked by that distance, no healing.
Shapes: features [batch, ...] of any layout; blocks that change the shape are left out. Cost: one training, about a
quarter slower, then one forward pass over the set per round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, fx

from palmette.depth.change import changes, require_finite
from palmette.errors import DataError
from palmette.graph import Candidate, observe
from palmette.registry import Bounds, MethodConfig, method
from palmette.seeding import derive_seed
from palmette.train.wasserstein import lacoot_term, max_sliced_wasserstein

PAPER_WEIGHT = 5.0
"""lambda for ResNet-18 on CIFAR-10 (9 for MobileNetV2, 0.1 and 1 for Swin-T)."""


@dataclass(frozen=True, kw_only=True)
class LacootConfig(MethodConfig):
    """The loss term (`weight` is lambda, `projections` random directions, `p` of W_p) and what ranks the blocks.

    `optimise` steps of ascent bring the best direction nearer to the true maximum. `rank`: "coupled" is the relative
    change of each sample, "msw" the distance of the distributions. `reproduce=True` overrides all but the numbers
    `projections` and `weight`; without a weight of yours it is the paper's 5 instead of 1.
    """

    weight: Annotated[float | None, Bounds(low=0)] = None
    projections: Annotated[int, Bounds(low=1)] = 50
    p: Annotated[float, Bounds(low=1)] = 2.0
    relative: bool = True
    optimise: Annotated[int, Bounds(low=0)] = 0
    rank: Literal["coupled", "msw"] = "coupled"
    reproduce: bool = False

    @property
    def strength(self) -> float:
        """The weight in force."""
        if self.weight is not None:
            return self.weight
        return PAPER_WEIGHT if self.reproduce else 1.0

    @property
    def distance(self) -> dict[str, Any]:
        """The arguments of the distance in force."""
        if self.reproduce:
            return {"projections": self.projections, "p": 2.0, "relative": False, "optimise": 0}
        return {"projections": self.projections, "p": self.p, "relative": self.relative, "optimise": self.optimise}


def prepare(
    network: fx.GraphModule,
    candidates: Sequence[Candidate],
    train: Callable[..., None],
    config: LacootConfig,
    *,
    loader: Iterable[Any],
    seed: int,
) -> dict[str, float]:
    """One training with the term on every block; returns the distance of each block afterwards, by path."""
    paths = _paths(candidates)
    with lacoot_term(network, paths, weight=config.strength, **config.distance) as term:
        train(network, loss_terms=[term])
    network.eval()
    return distances(network, paths, loader, config, seed)


def _paths(candidates: Iterable[Candidate]) -> list[str]:
    return sorted({site.path for candidate in candidates for site in candidate.sites})


class Distance:
    """Mean over batches of the max-sliced Wasserstein distance of one block, by directions of its own."""

    def __init__(self, measure: Callable[..., Tensor], path: str, seed: int) -> None:
        self.measure = measure
        self.generator = torch.Generator().manual_seed(derive_seed(seed, "lacoot", path))
        self.total, self.batches = 0.0, 0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Add one batch; raises DataError when its features are not finite."""
        value = float(self.measure(x.detach(), y.detach(), generator=self.generator))
        require_finite(value)
        self.total, self.batches = self.total + value, self.batches + 1

    def value(self) -> float:
        """The mean; raises DataError before the first batch."""
        if self.batches == 0:
            raise DataError("no batch reached a block", fix="Give a calibration loader that is not empty")
        return self.total / self.batches


def distances(
    network: fx.GraphModule, paths: Sequence[str], loader: Iterable[Any], config: LacootConfig, seed: int
) -> dict[str, float]:
    """The distance between input and output of each block, by path, from one pass in eval mode.

    Raises DataError for an empty loader or features that are not finite.
    """

    def measure(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return max_sliced_wasserstein(x, y, generator=generator, **config.distance)

    watchers = {path: Distance(measure, path, seed) for path in paths}
    observe(network, watchers, loader)
    return {path: watcher.value() for path, watcher in watchers.items()}


@method(
    name="lacoot",
    title="LaCoOT: train blocks towards the identity, drop those of least change",
    paper="Quétu et al. LaCoOT: Layer Collapse through Optimal Transport. ICCV 2025",
    unit="relative change",
    sites="block",
    edit="drop",
    config=LacootConfig,
    prepare=prepare,
    heals=lambda config: not config.reproduce,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: LacootConfig,
    *,
    seed: int,
) -> dict[str, float]:
    """|output - input| / |input| of each block over the set, summed per candidate; low = remove first.

    With rank "msw", and in the paper's form, the max-sliced Wasserstein distance instead. Raises DataError for an empty
    loader or features that are not finite.
    """
    paths = _paths(candidates)
    if config.reproduce or config.rank == "msw":
        found = distances(captured, paths, loader, config, seed)
    else:
        found = changes(captured, paths, loader)
    return {c.name: sum(found[site.path] for site in c.sites) for c in candidates}
