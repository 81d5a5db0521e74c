"""MeDyate: draw the channels of every epoch with probabilities that follow their importance. A reading.

Idea: the importance of a channel is stable over time, so that what was learned of it in one epoch steers the draw of
the next; layers are pre-selected by LaRa, an improved layer score. Paper: "Memory-Constrained Dynamic Training",
arXiv 2510.20979, of which the abstract alone was at hand: the formulas here are a reading, not the authors' definition.
Importance is a running mean of the channel's gradient norm where it was trained, begun from one probing pass; channels
are drawn without replacement by Gumbel keys, each with a floor of probability so that all can be reached.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from palmette.ondevice.selection import Axis, Selector, View
from palmette.ondevice.trady import covering
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class MeDyateConfig(MethodConfig):
    """coverage: of the layer score by the pool. layer_score: "rgn" divides gradient norms by elements, "raw" does not.

    memory: weight of the past in the running mean. floor: least probability, relative to a uniform draw.
    """

    coverage: Annotated[float, Bounds(low=0.0, high=1.0, low_open=True)] = 0.97
    layer_score: Literal["rgn", "raw"] = "rgn"
    memory: Annotated[float, Bounds(low=0.0, high=1.0)] = 0.7
    floor: Annotated[float, Bounds(low=0.0, high=1.0)] = 0.1
    seed: int = 0


class MeDyate:
    """Importance-weighted draws without replacement."""

    axis: Axis = "inputs"
    dynamic = True

    def __init__(self, config: MeDyateConfig) -> None:
        self.config = config
        self.importance: dict[str, Tensor] = {}

    def start(self, view: View) -> None:
        """Probe every layer once; keep the layers that matter."""
        norms = {key: found.double().cpu() for key, found in view.gradient_norms().items()}
        costs = {key: view.elements_per_channel(key) if self.config.layer_score == "rgn" else 1 for key in norms}
        scores = {key: float(found.sum()) / costs[key] for key, found in norms.items()}
        self.importance = {key: norms[key] for key in covering(scores, self.config.coverage)}

    def choose(self, view: View, epoch: int) -> Iterable[tuple[str, int]]:
        """Channels by Gumbel keys: as if drawn one by one with these probabilities."""
        if epoch > 0:
            self._learn(view)
        pool = [(key, c) for key, found in self.importance.items() for c in range(len(found))]
        if not pool:
            return []
        weights = torch.cat(list(self.importance.values()))
        chance = weights / weights.sum().clamp_min(1e-30)
        chance = chance.clamp_min(self.config.floor / len(pool))
        noise = torch.rand(len(pool), generator=view.generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        keys = chance.log() - (-noise.log()).log()
        return [pool[place] for place in keys.argsort(descending=True).tolist()]

    def _learn(self, view: View) -> None:
        """Move the importance of what was trained towards the norms that were seen."""
        for key, norms in view.gradients.items():
            index = torch.tensor(view.chosen[key])
            seen = norms.double().cpu()
            if key not in self.importance or len(seen) != len(index):
                continue
            held = self.importance[key]
            scale = held[index].sum() / seen.sum().clamp_min(1e-30)  # sums over an epoch against one batch
            held[index] = self.config.memory * held[index] + (1 - self.config.memory) * seen * scale


@method(
    name="medyate",
    title="MeDyate: channels drawn by importance (a reading)",
    paper="Memory-Constrained Dynamic Training (MeDyate, LaRa), arXiv 2510.20979; read from the abstract",
    unit="gradient norm",
    sites="channel",
    edit="slice",
    config=MeDyateConfig,
)
def make(config: MeDyateConfig) -> Selector:
    """Importance-weighted draws without replacement."""
    return MeDyate(config)
