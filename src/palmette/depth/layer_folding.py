"""Layer Folding: let each activation slide towards a linear map by a learnt share, then fold those that got there.

Idea: activation s becomes a z + (1 - a) s(z) with one scalar a >= 0 per site, starting at 0; the loss gains lambda
times the sum of |1 - a^p|. Shares fall to about 0 or climb to about 1, and activations with a >= 0.9 go together.
Paper: Ben Dror et al., "Layer Folding: Neural Network Depth Reduction using Activation Linearization", BMVC 2022.
Differs: activations that pay only together (the two of an inverted residual) have one share between them; shares start
a little above 0, where the slope of a^2 is not 0, are held at 1 too, and learn faster than the weights, so that a short
training decides; at least one candidate goes in a round. `reproduce=True` is the paper's form: a share for each
activation, from 0 with p = 2 and lambda = 0.25, and exactly those with a >= 0.9. In both the edit is the identity: it
is what the network has learnt to work with, and a line fitted afterwards to an activation that was not in use would
undo that.
Shapes: any activation, [batch, channels, ...] or [batch, ..., channels]. Cost: one training, with a few elementwise
operations more per activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, fx

from palmette.depth.change import changes
from palmette.depth.prepared import findings
from palmette.errors import InputError
from palmette.graph import Candidate, Edit, linearize
from palmette.graph.blend import Blend, Share, insert_blends, remove_blends
from palmette.registry import Bounds, MethodConfig, method

NAME = "layer_folding"


@dataclass(frozen=True, kw_only=True)
class LayerFoldingConfig(MethodConfig):
    """The pull on the shares (`weight` is lambda, `power` is p), where they start, and from where on they are folded.

    `rate`: how many times faster than the weights the shares learn under gradient descent, so that they arrive within a
    short training. `reproduce=True` overrides `power`, `start` and `rate` by the paper's 2, 0 and 1.
    """

    weight: Annotated[float, Bounds(low=0)] = 0.25
    power: Annotated[float, Bounds(low=1)] = 2.0
    start: Annotated[float, Bounds(low=0, high=1)] = 0.1
    rate: Annotated[float, Bounds(low=0, low_open=True)] = 10.0
    threshold: Annotated[float, Bounds(low=0, high=1)] = 0.9
    reproduce: bool = False


def prepare(
    network: fx.GraphModule,
    candidates: Sequence[Candidate],
    train: Callable[..., None],
    config: LayerFoldingConfig,
    *,
    loader: Iterable[Any],  # noqa: ARG001 - the interface of ingredients
    seed: int,  # noqa: ARG001
) -> dict[str, float]:
    """One training with blends at every activation of the candidates; returns their shares, by path of the site."""
    shares = {c.name: _share(config) for c in candidates}
    by_site = {site.path: shares[c.name] for c in candidates for site in c.sites}
    insert_blends(network, {path: Blend(share) for path, share in by_site.items()})
    try:
        train(network, loss_terms=[_pull(list(shares.values()), config)])
    finally:
        remove_blends(network, by_site)
    network.eval()
    return {path: float(share().detach()) for path, share in by_site.items()}


def _share(config: LayerFoldingConfig) -> Share:
    """A share at its start; the paper's may pass 1, from where the pull takes it back."""
    return Share(most=math.inf) if config.reproduce else Share(config.start, gain=config.rate**0.5)


def _pull(shares: Sequence[Share], config: LayerFoldingConfig) -> Callable[..., Tensor]:
    """The loss term lambda * sum |1 - a^p|."""
    power = 2.0 if config.reproduce else config.power

    def term(model: Any, inputs: Any, output: Any) -> Tensor:  # noqa: ARG001 - the interface of loss terms
        values = torch.stack([share() for share in shares])
        return config.weight * (1 - values**power).abs().sum()

    return term


def select(
    candidates: Sequence[Candidate],
    scores: Mapping[str, float],
    config: LayerFoldingConfig,
    *,
    losses: Callable[..., float],  # noqa: ARG001 - shares are looked at, not losses
    step: int,
) -> list[str]:
    """All candidates whose share reaches the threshold; if none does, the `step` best, or none in the paper's form."""
    there = [c.name for c in candidates if 1 - scores[c.name] >= config.threshold]
    return there if there or config.reproduce else [c.name for c in candidates[:step]]


def edits(candidate: Candidate, config: LayerFoldingConfig) -> list[Edit]:
    """The identity, which the candidate's activations slid towards; at any site in the paper's form."""
    return [linearize(site, fit="identity", force=config.reproduce) for site in candidate.sites]


@method(
    name=NAME,
    title="Layer Folding: activations learn to be linear, those that did go together",
    paper="Ben Dror et al. Layer Folding. BMVC 2022",
    unit="1 - share",
    sites="activation",
    edit="linearize",
    config=LayerFoldingConfig,
    prepare=prepare,
    select=select,
    edits=edits,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: LayerFoldingConfig,  # noqa: ARG001 - the interface of scores
    *,
    seed: int,  # noqa: ARG001
) -> dict[str, float]:
    """1 - a of the share that the training found, the largest over a candidate's activations; low = remove first.

    An activation that was no candidate at that time counts as one of share 0. Of a network that was not trained with
    shares, as in a dry run, it is the change |s(z) - z| / |z| that the pull works against. Raises DataError for an
    empty loader or features that are not finite.
    """
    sites = [site.path for c in candidates for site in c.sites]
    try:
        found = findings(captured, NAME)
        value = {path: 1 - found.get(path, 0.0) for path in sites}
    except InputError:
        value = changes(captured, sites, loader)
    return {c.name: max(value[site.path] for site in c.sites) for c in candidates}
