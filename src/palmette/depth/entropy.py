"""Entropy of the states of activations, once, with the four switches by which the published variants differ.

A neuron is ON where its pre-activation z > 0 and OFF where z < 0; H = -p log2 p - (1-p) log2(1-p) bits with p =
P(ON). EGP = (zeros off, lively, batch, weight), NEPENTHE = (exclude, lively, global, weight), EASIER = (on, all,
batch, none); see specs of the papers (ICCV-W 2023; arXiv 2404.16890; arXiv 2404.16884). Differs from them: 0 log 0 is
exactly 0 (theirs clamp at 1e-5 to 1e-10), and global counts are int64 over the whole set instead of averages of
batches. Time: one pass over the data. Memory: three int64 counts per (channel, position) and activation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from palmette.errors import DataError
from palmette.graph.inputs import split_batch

ON, OFF, ZERO = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class EntropyRule:
    """The switches: what a zero counts as, which neurons are averaged, over what p is formed, how layers are weighted.

    `position_first` forms one p per channel over all positions (the papers); otherwise every (channel, position) is a
    neuron. With p = 0 and 1 alternating over pixels the first gives H = 1 and the second H = 0.
    """

    zeros: Literal["on", "off", "exclude"] = "on"
    neurons: Literal["all", "lively"] = "all"
    aggregation: Literal["global", "batch"] = "global"
    weighting: Literal["none", "weight"] = "none"
    position_first: bool = True


def binary_entropy(p: Tensor) -> Tensor:
    """Entropy in bits of a coin with probability p, elementwise; 0 at p = 0 and p = 1."""
    q = 1 - p
    nats: Tensor = -(torch.special.xlogy(p, p) + torch.special.xlogy(q, q))
    return nats / math.log(2)


def count_states(z: Tensor, channel_axis: int, mask: Tensor | None = None) -> Tensor:
    """Counts of ON, OFF and zero over the samples of one batch: int64 [3, channels, positions].

    Axis 0 holds the samples; all axes but it and `channel_axis` are positions. `mask` [samples, positions] leaves
    tokens out.
    """
    rows = z.detach().movedim(channel_axis, 1).flatten(2) if z.dim() > 2 else z.detach().unsqueeze(-1)  # N, C, P
    states = torch.stack((rows > 0, rows < 0, rows == 0))
    if mask is not None:
        states = states & mask.to(torch.bool)[None, :, None, :]
    return states.sum(dim=1).cpu()


def layer_entropy(counts: Iterable[Tensor], rule: EntropyRule) -> float:
    """Entropy of one layer in bits from counts [3, channels, positions], one tensor per set of positions.

    Neurons that were never counted (only zeros under `exclude`, or masked) have entropy 0. 0.0 when no neuron remains.
    """
    tables = [c.sum(dim=2, keepdim=True) for c in counts] if rule.position_first else list(counts)
    if rule.position_first and len(tables) > 1:
        tables = [torch.stack(tables).sum(dim=0)]
    per_neuron = torch.cat([_neuron_entropy(table, rule).flatten() for table in tables]) if tables else torch.zeros(0)
    if rule.neurons == "lively":
        per_neuron = per_neuron[per_neuron > 0]
    return float(per_neuron.mean()) if per_neuron.numel() else 0.0


def _neuron_entropy(counts: Tensor, rule: EntropyRule) -> Tensor:
    on, off, zero = counts.to(torch.float64)
    if rule.zeros == "on":
        on = on + zero
    elif rule.zeros == "off":
        off = off + zero
    seen = on + off
    return binary_entropy(torch.where(seen > 0, on / seen.clamp(min=1), torch.zeros_like(on)))


@dataclass
class StateCounter:
    """Watches one activation: feed pre-activations with `add`, read the layer's entropy with `entropy`.

    Batches of several resolutions are kept apart by their positions, so that counts, never means, are added up.
    """

    rule: EntropyRule
    channel_axis: int
    _tables: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _sum: float = 0.0
    _batches: int = 0

    def add(self, z: Tensor, mask: Tensor | None = None) -> None:
        """Count the states of one batch of pre-activations; raises DataError when they are not finite."""
        if not bool(torch.isfinite(z).all()):
            raise DataError(
                "a pre-activation is not finite", fix="Look for NaN or infinite values in the data and the weights"
            )
        counts = count_states(z, self.channel_axis, mask)
        if self.rule.aggregation == "batch":
            self._sum += layer_entropy([counts], self.rule)
            self._batches += 1
            return
        shape = tuple(counts.shape)
        self._tables[shape] = self._tables[shape] + counts if shape in self._tables else counts

    def entropy(self) -> float:
        """Entropy of the layer in bits over everything added so far; raises DataError when nothing was."""
        if self.rule.aggregation == "batch":
            if self._batches == 0:
                raise DataError("no batch reached an activation", fix="Give a calibration loader that is not empty")
            return self._sum / self._batches
        if not self._tables:
            raise DataError("no batch reached an activation", fix="Give a calibration loader that is not empty")
        return layer_entropy(self._tables.values(), self.rule)


def mean_abs_weight(module: nn.Module) -> float:
    """Mean magnitude of the weights of a layer that are not exactly zero (0.0 when all are)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return 1.0
    surviving = weight.detach().double().abs()
    surviving = surviving[surviving > 0]
    return float(surviving.mean()) if surviving.numel() else 0.0


class MaskTap:
    """A loader that hands batches through and remembers the last attention mask, so that padding is not counted."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.mask: Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            inputs, _ = split_batch(batch)
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            yield batch

    def for_tokens(self, z: Tensor, channel_axis: int) -> Tensor | None:
        """The mask when `z` is [batch, tokens, channels] and matches it, else None."""
        tokens = z.dim() == 3 and channel_axis in (2, -1)
        return self.mask if self.mask is not None and tokens and self.mask.shape == z.shape[:2] else None
