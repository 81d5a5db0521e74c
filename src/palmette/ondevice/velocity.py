"""Velocity: train the neurons that move most for their number of parameters, within a budget of parameters.

Idea: NEq's velocity as a ranking: the fastest neurons per parameter are trained in the next epoch, as many as the
budget of parameters allows. Paper: Quélennec et al., "Towards On-device Learning on the Edge: Ways to Select Neurons to
Update under a Budget Constraint", WACV Workshops 2024. What differs: a grouped neuron is charged for the weights that
it has; gradients of other neurons are never formed; a budget in bytes holds beside the one in parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from palmette.ondevice.equilibrium import Velocities, all_neurons
from palmette.ondevice.selection import Axis, Selector, View
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class VelocityConfig(MethodConfig):
    """parameters: weights trained at most; None: by the bytes alone. mu: weight of the velocity before.

    first: which neurons train in the first epoch, before there is a velocity.
    """

    parameters: Annotated[int | None, Bounds(low=1)] = None
    mu: Annotated[float, Bounds(low=0.0, high=0.5)] = 0.5
    first: Literal["last", "random"] = "random"
    seed: int = 0


class Velocity:
    """The fastest neurons per parameter."""

    axis: Axis = "outputs"
    dynamic = True

    def __init__(self, config: VelocityConfig) -> None:
        self.config = config
        self.velocities = Velocities(config.mu)

    def start(self, view: View) -> None:
        """Remember the outputs before training."""
        self.velocities.start(view)

    def choose(self, view: View, epoch: int) -> Iterable[tuple[str, int]]:
        """Neurons by velocity per parameter, the fastest first, up to the budget of parameters."""
        order = all_neurons(view)
        if epoch > 0:
            found = self.velocities.update(view)
            speeds = {key: (v.abs() / view.weights_per_channel(key)).tolist() for key, v in found.items()}
            order.sort(key=lambda pair: -speeds[pair[0]][pair[1]])
        elif self.config.first == "random":
            order = [order[i] for i in torch.randperm(len(order), generator=view.generator).tolist()]
        return self._within(view, order)

    def _within(self, view: View, order: list[tuple[str, int]]) -> Iterable[tuple[str, int]]:
        left = self.config.parameters
        for key, neuron in order:
            if left is not None:
                left -= view.weights_per_channel(key)
                if left < 0:
                    return
            yield key, neuron


@method(
    name="velocity",
    title="Velocity: the fastest neurons within a budget of parameters",
    paper="Quélennec et al., Ways to Select Neurons to Update under a Budget Constraint, WACV Workshops 2024",
    unit="velocity / parameters",
    sites="channel",
    edit="slice",
    config=VelocityConfig,
)
def make(config: VelocityConfig) -> Selector:
    """The fastest neurons per parameter."""
    return Velocity(config)
