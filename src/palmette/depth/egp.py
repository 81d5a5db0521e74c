"""EGP, entropy-guided pruning: empty the layers of lowest entropy by magnitude pruning, then take out what collapsed.

Idea: rounds of unstructured magnitude pruning, in which layers whose neurons hardly change state lose the most
weights, drive whole layers to entropy 0; a layer whose weights are all zero is gone, and where a skip runs past it the
network goes on without. Paper: Liao, Quétu, Nguyen, Tartaglione, "Can Unstructured Pruning Reduce the Depth in Deep
Neural Networks?", ICCV Workshops 2023. The paper's form, `reproduce=True`: z = 0 counts as OFF, entropies of
mini-batches over the neurons that were not constant in them, averaged; rate 0.5, 9 rounds of a whole training each; all
sites of entropy exactly 0 go together, by the mask. It fails where the budget empties a layer that every path crosses,
as on MobileNetV2 in the paper: a first such round is an error here, a later one ends the rounds. Sound form, the
default: entropies from counts over the whole calibration set and the mean over all neurons (with the constant ones left
out, a layer with 63 dead neurons and a lively one looks lively); the network is never cut, its first and last layers
are spared; one round, because each is a whole healing schedule. Differs in both: 0 log 0 is exact, weights are found by
the graph instead of by names.

`sites="block"` drops the residual blocks whose branch is dead instead of linearising inside them: where a convolution
cannot be merged at a gain, only that becomes physical. Shapes: pre-activations [batch, channels, ...] or [batch, ...,
channels]. Cost: per round one forward pass over the set and one healing schedule; afterwards one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from palmette.depth.entropy import EntropyRule
from palmette.depth.pruning import PruningConfig, Train, edits, found_scores, prune_in_rounds, select
from palmette.graph import Candidate
from palmette.registry import method

PAPER_ROUNDS = 9


@dataclass(frozen=True, kw_only=True)
class EgpConfig(PruningConfig):
    """How EGP prunes; see PruningConfig."""

    @property
    def rule(self) -> EntropyRule:
        """The entropy switches in force; the weights enter through the budget."""
        if self.reproduce:
            return EntropyRule(zeros="off", neurons="lively", aggregation="batch", weighting="weight")
        return EntropyRule(zeros="off", neurons="all", aggregation="global", weighting="weight")


def prepare(
    network: fx.GraphModule,
    candidates: Sequence[Candidate],
    train: Train,
    config: EgpConfig,
    *,
    loader: Iterable[Any],
    seed: int,  # noqa: ARG001 - the interface of ingredients
) -> dict[str, float]:
    """Prune and train for `rounds`; the entropy in bits of every activation, by path (blocks: see `look`)."""
    rounds = config.rounds or (PAPER_ROUNDS if config.reproduce else 1)
    return prune_in_rounds(network, candidates, train, loader, config, rule=config.rule, rounds=rounds, drops_zero=True)


@method(
    name="egp",
    title="EGP: magnitude pruning that empties the layers of lowest entropy",
    paper="Liao, Quétu, Nguyen, Tartaglione. Can Unstructured Pruning Reduce the Depth in Deep Neural Networks? "
    "ICCV Workshops 2023",
    unit="bits (blocks: share of weights left)",
    sites="activation",
    edit="linearize, or drop for blocks",
    config=EgpConfig,
    prepare=prepare,
    select=select,
    edits=edits,
    keeps_zeros=True,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: EgpConfig,
    *,
    seed: int,  # noqa: ARG001 - the interface of scores
) -> dict[str, float]:
    """Mean entropy in bits after the last round of pruning, 0 = collapsed; low = remove first.

    For blocks the share of weights left in the emptiest layer of the branch. Without pruning, that of the network as it
    is, by one pass; then raises DataError for an empty loader.
    """
    return found_scores(captured, candidates, loader, "egp", config.rule)
