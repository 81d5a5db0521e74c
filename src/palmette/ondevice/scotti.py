"""SCoTTi: NEq with a threshold that is learned along with the task. A reading.

Idea: how still a neuron must be before it is frozen is a trainable parameter, so that the amount of updating is
optimised together with the loss. Paper: Li et al., "SCoTTi: Save Computation at Training Time with an adaptive
framework", ICCV Workshops 2023, of which the abstract alone was at hand: what follows is a reading, not the authors'
definition. A neuron's gate is sigmoid((|v| - theta) / tau), hard in the forward direction; theta descends the loss plus
`weight` times the share of updated neurons, the loss through what an update of the neuron is worth to first order, its
squared gradient, both on the scale of their means.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from palmette.ondevice.equilibrium import Velocities, all_neurons
from palmette.ondevice.selection import Axis, Selector, View
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class ScottiConfig(MethodConfig):
    """threshold: at the start. weight: of the share of updated neurons in the loss. tau: softness of the gate.

    rate: step of the threshold, relative to tau. mu: as in NEq.
    """

    threshold: Annotated[float, Bounds(low=0.0)] = 1e-3
    weight: Annotated[float, Bounds(low=0.0)] = 0.5
    tau: Annotated[float, Bounds(low=0.0, low_open=True)] = 1e-3
    rate: Annotated[float, Bounds(low=0.0)] = 1.0
    mu: Annotated[float, Bounds(low=0.0, high=0.5)] = 0.5


class Scotti:
    """Neurons whose velocity is above a threshold that is trained."""

    axis: Axis = "outputs"
    dynamic = True

    def __init__(self, config: ScottiConfig) -> None:
        self.config = config
        self.velocities = Velocities(config.mu)
        self.theta = config.threshold
        self.worth: dict[str, Tensor] = {}

    def start(self, view: View) -> None:
        """Remember the outputs before training."""
        self.velocities.start(view)

    def choose(self, view: View, epoch: int) -> Iterable[tuple[str, int]]:
        """The neurons above the threshold, after it has taken its step."""
        if epoch == 0:
            return all_neurons(view)
        speeds = {key: v.abs().cpu() for key, v in self.velocities.update(view).items()}
        for key, norms in view.gradients.items():
            held = self.worth.setdefault(key, torch.zeros(view.channels(key), dtype=torch.float64))
            held[torch.tensor(view.chosen[key])] = norms.double().cpu().square()
        self.theta = max(0.0, self.theta - self._slope(speeds) * self.config.tau * self.config.rate)
        return [(key, neuron) for key, neuron in all_neurons(view) if float(speeds[key][neuron]) >= self.theta]

    def _slope(self, speeds: dict[str, Tensor]) -> float:
        """Derivative of loss + weight * share by theta, times tau, through the soft gate."""
        if not speeds:
            return 0.0
        speed = torch.cat(list(speeds.values()))
        worth = torch.cat([self.worth.get(key, torch.zeros(len(v), dtype=torch.float64)) for key, v in speeds.items()])
        gate = torch.sigmoid((speed - self.theta) / self.config.tau)
        gain = worth / worth.mean().clamp_min(1e-30)
        slope = -gate * (1 - gate)  # d gate / d theta * tau
        return float((slope * (self.config.weight - gain)).mean())


@method(
    name="scotti",
    title="SCoTTi: NEq with a trained threshold (a reading)",
    paper="Li et al., SCoTTi, ICCV Workshops 2023; read from the abstract",
    unit="velocity",
    sites="channel",
    edit="slice",
    config=ScottiConfig,
)
def make(config: ScottiConfig) -> Selector:
    """Neurons whose velocity is above a threshold that is trained."""
    return Scotti(config)
