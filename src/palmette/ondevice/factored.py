"""Layer inputs kept as Tucker factors, and the ladder of ranks that a planner may choose from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palmette.ondevice.codec import Codec, Payload, compact
from palmette.ondevice.factor_gradients import conv_weight_gradient, linear_weight_gradient
from palmette.ondevice.layer import Layer
from palmette.ondevice.spectra import ranks_for_energy, spectra
from palmette.ondevice.tucker import Tucker, clamp_ranks, dense, elements

_RUNGS = 10  # candidates offered for one input
_SMALLEST = 2**-9  # of the input, where the ladder begins
_LARGEST = 0.6  # of the input, where it ends: nearer to 1, keeping all is as good


@dataclass(frozen=True, kw_only=True)
class TuckerCodec(Codec):
    """An input kept as a core of shape `ranks` and a factor for each mode that it shortens. Subclasses encode."""

    ranks: tuple[int, ...] = ()

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Core and factors."""
        return elements(shape, clamp_ranks(shape, self.ranks)) * itemsize

    def can_encode(self, shape: Sequence[int]) -> bool:
        """One rank for each mode, and less than the input itself."""
        return len(shape) == len(self.ranks) and elements(shape, clamp_ranks(shape, self.ranks)) < math.prod(shape)

    def decode(self, payload: Payload, layer: Layer) -> Tensor:
        """The input, nearly."""
        return dense(self.form(payload, layer))

    def weight_gradient(self, payload: Payload, layer: Layer, grad: Tensor) -> Tensor:
        """The weight gradient straight from the factors."""
        form = self.form(payload, layer)
        if layer.kind == "linear":
            return linear_weight_gradient(form, grad)
        return conv_weight_gradient(form, grad, layer.weight_shape, **layer.geometry)

    def form(self, payload: Payload, layer: Layer) -> Tucker:
        """The payload as a Tucker form: a mode that no rank shortens has no factor."""
        core, *factors = payload
        waiting = iter(factors)
        kept = clamp_ranks(layer.x_shape, self.ranks)
        return Tucker(core, tuple(next(waiting) if r < d else None for r, d in zip(kept, layer.x_shape, strict=True)))


def payload_of(form: Tucker, source: Tensor) -> Payload:
    """Core and factors, each in a storage of its own."""
    core = form.core.clone() if form.core.untyped_storage()._cdata == source.untyped_storage()._cdata else form.core
    return (compact(core), *(compact(factor) for factor in form.factors if factor is not None))


def ranks_offered(x: Tensor, energy: float | None) -> list[tuple[int, ...]]:
    """Ranks to choose from: those of the published rule where an energy is given, else the ladder."""
    return ladder(x) if energy is None else [ranks_for_energy(x, energy)]


def ladder(x: Tensor) -> list[tuple[int, ...]]:
    """Ranks from coarse to fine, each mode by itself: every step goes where a number kept saves the most energy.

    The error of a choice is bounded by the sum of what its modes leave out.
    """
    energies = [spectrum.double().cpu() for spectrum in spectra(x)]
    tails = [torch.cat([e.flip(0).cumsum(0).flip(0), e.new_zeros(1)]).tolist() for e in energies]
    ranks = [1] * x.dim()
    limit, total = _LARGEST * x.numel(), x.numel()
    marks = [_SMALLEST * total * (_LARGEST / _SMALLEST) ** (rung / (_RUNGS - 1)) for rung in range(_RUNGS)]
    found: list[tuple[int, ...]] = []
    while True:
        size = elements(x.shape, ranks)
        if size > limit:
            break
        if size >= marks[min(len(found), _RUNGS - 1)]:
            found.append(tuple(ranks))
            while len(found) < _RUNGS and marks[len(found)] <= size:
                marks[len(found)] = size + 1
        step = _best_step(x.shape, ranks, tails)
        if step is None:
            break
        ranks = step
    return found or [tuple(ranks)]


def _best_step(shape: Sequence[int], ranks: list[int], tails: list[list[float]]) -> list[int] | None:
    """The ranks with one mode raised by an eighth, the one that saves most energy for each number."""
    size = elements(shape, ranks)
    best: tuple[float, list[int]] | None = None
    for mode, rank in enumerate(ranks):
        if rank >= shape[mode]:
            continue
        raised = list(ranks)
        raised[mode] = min(shape[mode], rank + max(1, rank // 8))
        if shape[mode] - raised[mode] <= shape[mode] // 16:
            raised[mode] = shape[mode]  # a factor for the last few directions costs more than it saves
        spectrum = tails[mode]
        gain = spectrum[min(rank, len(spectrum) - 1)] - spectrum[min(raised[mode], len(spectrum) - 1)]
        worth = gain / max(elements(shape, raised) - size, 1)
        if best is None or worth > best[0]:
            best = worth, raised
    return None if best is None else best[1]
