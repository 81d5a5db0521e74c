"""DepthShrinker: learn by gates which activations are worth keeping, under a budget of how many may stay.

Idea: every candidate has a learnt gate; in each step the activations of the highest gates are on and the others are the
identity, and gradients reach all gates straight through that choice. Those off at the end go together. Paper: Fu et
al., "DepthShrinker: A New Compression Paradigm Towards Boosting Real-Hardware Efficiency of Compact Neural Networks",
ICML 2022. Written from the description, not from the authors' code. Differs: any activations that pay together are a
group (theirs are inverted residuals), in any graph, and the merge is made; gates start at how much the activations
change what passes through them, so that the first choice is a sensible one, and learn faster than the weights; further
candidates go one by one. `reproduce=True` is the paper's form: all gates start alike, and those off at the end go.
In both the edit is the identity: it is what the network has learnt to work with.
Shapes: any activation, [batch, channels, ...] or [batch, ..., channels]. Cost: one pass, and one training with a few
elementwise operations more per activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, fx, nn

from palmette.depth.change import changes
from palmette.depth.prepared import findings
from palmette.errors import InputError
from palmette.graph import Candidate, Edit, linearize
from palmette.graph.blend import insert_blends, remove_blends
from palmette.registry import Bounds, MethodConfig, method
from palmette.seeding import derive_seed

NAME = "depthshrinker"


@dataclass(frozen=True, kw_only=True)
class DepthShrinkerConfig(MethodConfig):
    """The share of candidates that stay on (`keep_ratio`, rounded down; at least one is off).

    `rate`: how many times faster than the weights the gates learn under gradient descent; 1 in the paper's form.
    """

    keep_ratio: Annotated[float, Bounds(low=0, high=1)] = 0.7
    rate: Annotated[float, Bounds(low=0, low_open=True)] = 10.0
    reproduce: bool = False


class Gates(nn.Module):
    """A gate per group, the `keep` highest of them on, fewer than all: forward gives 1 or 0 for each, [groups].

    The gradient of an entry goes to its gate unchanged. Gates are `gain` times a parameter; see `blend.Share`.
    """

    def __init__(self, start: Tensor, keep: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.keep, self.gain = keep, gain
        self.parameter = nn.Parameter(start.float() / gain)

    def values(self) -> Tensor:
        """The gates, [groups]."""
        return self.gain * self.parameter

    def forward(self) -> Tensor:
        """1 for the groups that are on, 0 for the others; of equal gates the first are on."""
        gates = self.values()
        on = torch.zeros_like(gates)
        on[gates.detach().argsort(descending=True, stable=True)[: self.keep]] = 1.0
        return on + (gates - gates.detach())

    def margins(self) -> list[float]:
        """Each gate minus the middle between the lowest that is on and the highest that is off: below 0 means off."""
        gates, on = self.values().detach().double(), self().detach() > 0.5
        highest_off = gates[~on].max()
        lowest_on = gates[on].min() if bool(on.any()) else highest_off + 1
        margin = gates - (lowest_on + highest_off) / 2
        nudge = torch.finfo(torch.float64).tiny  # equal gates on both sides are told apart all the same
        return list(torch.where(on, margin.clamp(min=nudge), margin.clamp(max=-nudge)).tolist())


class Gated(nn.Module):
    """An activation of group `index`: its output where the group is on, its input where it is off."""

    def __init__(self, gates: Gates, index: int) -> None:
        super().__init__()
        self.gates, self.index = gates, index

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """The output or the input of the activation."""
        on: Tensor = self.gates()[self.index].to(after.dtype)
        return on * after + (1 - on) * before


def prepare(
    network: fx.GraphModule,
    candidates: Sequence[Candidate],
    train: Callable[..., None],
    config: DepthShrinkerConfig,
    *,
    loader: Iterable[Any],
    seed: int,
) -> dict[str, float]:
    """One training with gates; returns each gate's margin to the boundary of on and off, by path of the site.

    Raises DataError for an empty loader or features that are not finite.
    """
    gain = 1.0 if config.reproduce else config.rate**0.5
    keep = min(int(config.keep_ratio * len(candidates)), len(candidates) - 1)
    gates = Gates(torch.tensor(_start(network, candidates, config, loader, seed)), keep, gain=gain)
    groups = {site.path: index for index, c in enumerate(candidates) for site in c.sites}
    insert_blends(network, {path: Gated(gates, index) for path, index in groups.items()})
    try:
        train(network)
    finally:
        remove_blends(network, groups)
    network.eval()
    margins = gates.margins()
    return {path: margins[index] for path, index in groups.items()}


def _start(
    network: fx.GraphModule,
    candidates: Sequence[Candidate],
    config: DepthShrinkerConfig,
    loader: Iterable[Any],
    seed: int,
) -> list[float]:
    """The gates at first: the mean change that a candidate's activations make. In the paper's form nearly alike."""
    if config.reproduce:
        draws = [torch.Generator().manual_seed(derive_seed(seed, NAME, c.name)) for c in candidates]
        return [1.0 + 1e-3 * float(torch.rand((), generator=draw)) for draw in draws]
    found = changes(network, [site.path for c in candidates for site in c.sites], loader)
    return [sum(found[site.path] for site in c.sites) / len(c.sites) for c in candidates]


def select(
    candidates: Sequence[Candidate],
    scores: Mapping[str, float],
    config: DepthShrinkerConfig,
    *,
    losses: Callable[..., float],  # noqa: ARG001 - gates are looked at, not losses
    step: int,
) -> list[str]:
    """All candidates that were off at the end; once they are gone, the `step` lowest, or none in the paper's form."""
    off = [c.name for c in candidates if scores[c.name] < 0]
    return off if off or config.reproduce else [c.name for c in candidates[:step]]


def edits(candidate: Candidate, config: DepthShrinkerConfig) -> list[Edit]:
    """The identity, which the candidate's activations were where they were off; at any site in the paper's form."""
    return [linearize(site, fit="identity", force=config.reproduce) for site in candidate.sites]


@method(
    name=NAME,
    title="DepthShrinker: learn which activations to keep under a budget",
    paper="Fu et al. DepthShrinker. ICML 2022",
    unit="gate",
    sites="activation",
    edit="linearize",
    config=DepthShrinkerConfig,
    prepare=prepare,
    select=select,
    edits=edits,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: DepthShrinkerConfig,
    *,
    seed: int,
) -> dict[str, float]:
    """The gate of a candidate above the boundary of on and off, below 0 for those off; low = remove first.

    An activation that was no candidate in the training counts as the one of the highest gate. Of a network that was not
    trained with gates, as in a dry run, it is where the gates would start. Raises DataError for an empty loader or
    features that are not finite.
    """
    try:
        found = findings(captured, NAME)
    except InputError:
        start = _start(captured, candidates, config, loader, seed)
        return {c.name: gate for c, gate in zip(candidates, start, strict=True)}
    highest = max(found.values(), default=0.0)
    return {c.name: max(found.get(site.path, highest) for site in c.sites) for c in candidates}
