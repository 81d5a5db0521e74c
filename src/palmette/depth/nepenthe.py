"""NEPENTHE: entropy-budgeted magnitude pruning until layers have entropy exactly 0, which then are taken out.

Idea: as EGP, with three changes: a pre-activation of exactly 0 is neither ON nor OFF and is not counted, a layer's
entropy is the mean over its neurons of entropy above 0, and layers of entropy 0 get the least relevance instead of
being left alone. Paper: Liao, Quétu, Nguyen, Tartaglione, "NEPENTHE: Entropy-Based Pruning as a Neural Network Depth's
Reducer", arXiv 2404.16890, 2024; in TMLR, 2026, as "Layer Collapse Can be Induced by Unstructured Pruning". The paper's
form, `reproduce=True`: all sites of entropy exactly 0 go together, by the mask; it prunes until validation accuracy
falls by a threshold that it does not state. Validation data is not at hand while pruning: `rounds` says when to stop
(4 under `reproduce`), and shrink's `max_drop` decides about every removal. Sound form, the default: the network is
never cut, its first and last layers are spared, one round; what is not piecewise linear (GELU, SiLU) or saturates
(ReLU6) is not taken for linear because its entropy is 0: the affine fit is.

Rate 0.5 is the paper's for ResNet-18; it used 0.25 for Swin-T and 0.1 for MobileNetV2. `sites="block"` drops the
residual blocks whose branch is dead. Shapes: pre-activations [batch, channels, ...] or [batch, ..., channels]. Cost:
per round one forward pass over the set and one healing schedule; afterwards one pass.
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

PAPER_ROUNDS = 4
RULE = EntropyRule(zeros="exclude", neurons="lively", aggregation="global", weighting="weight")
"""The entropy switches; the weights enter through the budget."""


@dataclass(frozen=True, kw_only=True)
class NepentheConfig(PruningConfig):
    """How NEPENTHE prunes; see PruningConfig."""


def prepare(
    network: fx.GraphModule,
    candidates: Sequence[Candidate],
    train: Train,
    config: NepentheConfig,
    *,
    loader: Iterable[Any],
    seed: int,  # noqa: ARG001 - the interface of ingredients
) -> dict[str, float]:
    """Prune and train for `rounds`; the entropy in bits of every activation, by path (blocks: see `look`)."""
    rounds = config.rounds or (PAPER_ROUNDS if config.reproduce else 1)
    return prune_in_rounds(network, candidates, train, loader, config, rule=RULE, rounds=rounds, drops_zero=False)


@method(
    name="nepenthe",
    title="NEPENTHE: magnitude pruning until layers have entropy 0",
    paper="Liao, Quétu, Nguyen, Tartaglione. NEPENTHE: Entropy-Based Pruning as a Neural Network Depth's Reducer. "
    "arXiv 2404.16890, 2024",
    unit="bits (blocks: share of weights left)",
    sites="activation",
    edit="linearize, or drop for blocks",
    config=NepentheConfig,
    prepare=prepare,
    select=select,
    edits=edits,
    keeps_zeros=True,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: NepentheConfig,  # noqa: ARG001 - the interface of scores
    *,
    seed: int,  # noqa: ARG001
) -> dict[str, float]:
    """Mean entropy in bits after the last round of pruning, 0 = collapsed; low = remove first.

    For blocks the share of weights left in the emptiest layer of the branch. Without pruning, that of the network as it
    is, by one pass; then raises DataError for an empty loader.
    """
    return found_scores(captured, candidates, loader, "nepenthe", RULE)
