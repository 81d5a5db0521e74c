"""TraDy: train other channels in every epoch, drawn uniformly from the layers that matter.

Idea: gradients are heavy-tailed, a few layers hold nearly all of them, and layers rank alike whatever the task; within
these layers random input channels, drawn anew for each epoch, follow the full gradient on average. Paper: Tran et al.,
"Study of Training Dynamics for Memory-Constrained Fine-Tuning", ICLR 2026. What differs: frozen channels are really not
stored and their gradients never formed; bytes are those of the real batch; the ranking of layers comes from the sample,
not from some epochs on another task. Cost: one pass over the layers at the start, then a shuffle per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch

from palmette.ondevice.selection import Axis, Selector, View
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class TraDyConfig(MethodConfig):
    """coverage: share of the relative gradient norm that the pool of layers covers; 1 takes all of them.

    elements: the paper's budget, numbers of weights and of one sample's inputs; beside the one in bytes.
    dynamic: draw anew in every epoch (False is the paper's static control). seed: of the draws.
    """

    coverage: Annotated[float, Bounds(low=0.0, high=1.0, low_open=True)] = 0.97
    elements: Annotated[int | None, Bounds(low=1)] = None
    dynamic: bool = True
    seed: int = 0


class TraDy:
    """Uniform draws from the layers that cover most of the relative gradient norm."""

    axis: Axis = "inputs"

    def __init__(self, config: TraDyConfig) -> None:
        self.config, self.dynamic = config, config.dynamic
        self.pool: list[tuple[str, int]] = []

    def start(self, view: View) -> None:
        """Rank the layers by the sum of their channels' relative gradient norms, and keep the first."""
        norms = view.gradient_norms()
        scores = {key: float(found.sum()) / view.elements_per_channel(key) for key, found in norms.items()}
        self.pool = [(key, c) for key in covering(scores, self.config.coverage) for c in range(view.channels(key))]

    def choose(self, view: View, epoch: int) -> Iterable[tuple[str, int]]:  # noqa: ARG002  # the interface
        """The channels of the pool, shuffled, up to the budget of elements."""
        order = torch.randperm(len(self.pool), generator=view.generator).tolist()
        left = math.inf if self.config.elements is None else self.config.elements
        for place in order:
            key, channel = self.pool[place]
            left -= view.elements_per_channel(key)
            if left < 0:
                return
            yield key, channel


def covering(scores: dict[str, float], share: float) -> list[str]:
    """The layers with the highest scores that together reach this share of the total."""
    total, reached = sum(scores.values()), 0.0
    taken: list[str] = []
    for key in sorted(scores, key=lambda name: -scores[name]):
        if taken and reached >= share * total:
            break
        taken.append(key)
        reached += scores[key]
    return taken


@method(
    name="trady",
    title="TraDy: random channels of the layers that matter, anew in every epoch",
    paper="Tran et al., Study of Training Dynamics for Memory-Constrained Fine-Tuning, ICLR 2026",
    unit="gradient norm / elements",
    sites="channel",
    edit="slice",
    config=TraDyConfig,
)
def make(config: TraDyConfig) -> Selector:
    """Uniform draws from the layers that cover most of the relative gradient norm."""
    return TraDy(config)
