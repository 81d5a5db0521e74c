"""NEq: freeze a neuron for an epoch when its output has come to rest.

Idea: between epochs compare what each neuron says on a few fixed samples; one whose similarity no longer changes is at
equilibrium, and its update can be left out until it moves again. Paper: Bragagnolo et al., "To update or not to
update? Neurons at equilibrium in deep models", NeurIPS 2022. What differs: gradients of frozen neurons are never formed
(the released code zeroes them after a full backward pass); a layer with no live neuron keeps nothing, any other needs
its whole input, so the method saves work and gradients, and bytes only where layers fall silent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from palmette.ondevice.equilibrium import Velocities, all_neurons
from palmette.ondevice.selection import Axis, Selector, View
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class NEqConfig(MethodConfig):
    """epsilon: a neuron with a smaller velocity is frozen. mu: weight of the velocity before.

    code_form: the recursion of the released code instead of the paper's, for replication.
    """

    epsilon: Annotated[float, Bounds(low=0.0)] = 1e-3
    mu: Annotated[float, Bounds(low=0.0, high=0.5)] = 0.5
    code_form: bool = False


class NEq:
    """Neurons whose velocity is at least epsilon; in the first epoch all."""

    axis: Axis = "outputs"
    dynamic = True

    def __init__(self, config: NEqConfig) -> None:
        self.config = config
        self.velocities = Velocities(config.mu, code_form=config.code_form)

    def start(self, view: View) -> None:
        """Remember the outputs before training."""
        self.velocities.start(view)

    def choose(self, view: View, epoch: int) -> Iterable[tuple[str, int]]:
        """The neurons that still move, the last layers first."""
        if epoch == 0:
            return all_neurons(view)
        speeds = {key: v.abs().tolist() for key, v in self.velocities.update(view).items()}
        return [(key, neuron) for key, neuron in all_neurons(view) if speeds[key][neuron] >= self.config.epsilon]


@method(
    name="neq",
    title="NEq: train the neurons that still move",
    paper="Bragagnolo et al., To update or not to update? Neurons at equilibrium in deep models, NeurIPS 2022",
    unit="velocity",
    sites="channel",
    edit="slice",
    config=NEqConfig,
)
def make(config: NEqConfig) -> Selector:
    """Neurons whose velocity is at least epsilon; in the first epoch all."""
    return NEq(config)
