"""Neurons at equilibrium: how much a neuron's output still changes from epoch to epoch, shared by three methods."""

from __future__ import annotations

import torch
from torch import Tensor

from palmette.ondevice.selection import View


class Velocities:
    """Velocity of every neuron (NEq, section 3): change of the similarity of its outputs between epochs.

    phi = mean over samples of cos(output now, output an epoch ago); v = dphi - mu * v before. `code_form`: what the
    authors' code computes instead, v = dphi - dphi before + mu * v before. Outputs are compared in eval mode on the
    sample; a pair of zeros counts as equal, a zero against anything else as unlike.
    """

    def __init__(self, mu: float, *, code_form: bool = False) -> None:
        self.mu, self.code_form = mu, code_form
        self.outputs: dict[str, Tensor] = {}
        self.phi: dict[str, Tensor] = {}
        self.delta: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}

    def start(self, view: View) -> None:
        """Remember the outputs before training."""
        self.outputs = view.outputs()

    def update(self, view: View) -> dict[str, Tensor]:
        """The velocities after another epoch."""
        outputs = view.outputs()
        for key, now in outputs.items():
            phi = similarity(now, self.outputs[key])
            before = self.phi.get(key, torch.ones_like(phi))
            delta = phi - before
            earlier, former = self.delta.get(key, torch.zeros_like(phi)), self.v.get(key, torch.zeros_like(phi))
            self.v[key] = delta - earlier + self.mu * former if self.code_form else delta - self.mu * former
            self.phi[key], self.delta[key] = phi, delta
        self.outputs = outputs
        return self.v


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean over samples of the cosine of each neuron's outputs; a, b [samples, neurons, positions] -> [neurons]."""
    a, b = a.double(), b.double()
    sizes = a.norm(dim=2), b.norm(dim=2)
    cosine = (a * b).sum(2) / (sizes[0] * sizes[1]).clamp_min(1e-300)
    both, one = (sizes[0] == 0) & (sizes[1] == 0), (sizes[0] == 0) ^ (sizes[1] == 0)
    return torch.where(both, 1.0, torch.where(one, 0.0, cosine)).mean(0)


def all_neurons(view: View) -> list[tuple[str, int]]:
    """Every neuron of every layer that may be trained, the last layers first."""
    return [(key, neuron) for key in reversed(view.layers) for neuron in range(view.channels(key))]
