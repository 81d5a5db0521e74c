"""Entropy of the states of activations, once, with the four switches by which the published variants differ.

A neuron is ON where its pre-activation z > 0 and OFF where z < 0; H = -p log2 p - (1-p) log2(1-p) bits with p =
P(ON). EGP = (zeros off, lively, batch, weight), NEPENTHE = (exclude, lively, global, weight), EASIER = (on, all,
batch, none); see the papers (ICCV-W 2023; arXiv 2404.16890; ECML-PKDD 2024). Differs from them: 0 log 0 is
exactly 0 (theirs clamp at 1e-5 to 1e-10), and global counts are int64 over the whole set instead of averages of
batches. Time: one pass over the data. Memory: three int64 counts per (channel, position) and activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from palmette.errors import DataError
from palmette.graph import observe
from palmette.graph.padding import MaskTap

_IN_CACHE = 2**18
"""Values whose signs stay in a processor's cache while they are counted: larger batches are counted in parts."""


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


class Scratch:
    """Memory for the signs of one activation after another: taking fresh memory costs more than counting does."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def signs(self, z: Tensor) -> Tensor:
        """Signs of `z`, valid until the next call."""
        if not z.is_contiguous():
            return torch.sign(z)
        old = self._memory
        if old is None or old.numel() < z.numel() or old.dtype != z.dtype or old.device != z.device:
            self._memory = old = torch.empty_like(z).flatten()
        return torch.sign(z, out=old[: z.numel()].view(z.shape))


def count_states(
    z: Tensor,
    channel_axis: int,
    mask: Tensor | None = None,
    *,
    per_position: bool = True,
    scratch: Scratch | None = None,
) -> Tensor:
    """Counts of ON, OFF and zero over the samples of one batch of finite values: int64 [3, channels, positions].

    Axis 0 holds the samples; all axes but it and `channel_axis` are positions, which are summed up to one unless
    `per_position`. `mask` [samples, positions] leaves tokens out. The counts stay on the device of `z`.
    """
    return _counted(z.detach(), channel_axis, mask, per_position, scratch or Scratch())[0]


def _counted(
    z: Tensor, channel_axis: int, mask: Tensor | None, per_position: bool, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """The counts of `count_states`, and the sum of all values: where it is finite, all of them are."""
    kept = None if mask is None else mask.to(z.device, torch.bool)
    whole = z.device.type != "cpu" or z.numel() <= _IN_CACHE
    size = max(z.shape[0] if whole else _IN_CACHE * z.shape[0] // z.numel(), 1)
    parts = (
        [(part, None) for part in z.split(size)]
        if kept is None
        else list(zip(z.split(size), kept.split(size), strict=True))
    )
    sums = []
    for part, tokens in parts:
        total = part.sum(dtype=_wide(part))
        signs = scratch.signs(part)
        signs = signs.movedim(channel_axis, 1).flatten(2) if z.dim() > 2 else signs.unsqueeze(-1)  # N, C, P
        if tokens is not None:
            signs = signs.masked_fill(~tokens[:, None, :], 0)
        difference = _sum(signs, per_position)  # ON - OFF
        sums.append((total, difference, _sum(signs.abs_(), per_position)))
    total, difference, nonzero = (torch.stack(column) for column in zip(*sums, strict=True))
    difference, nonzero = difference.sum(dim=0, dtype=torch.int64), nonzero.sum(dim=0, dtype=torch.int64)
    seen = torch.full((signs.shape[2],), z.shape[0], device=z.device) if kept is None else kept.sum(dim=0)
    seen = (seen if per_position else seen.sum(dim=0, keepdim=True)).expand_as(nonzero)
    counts = torch.stack(((nonzero + difference) // 2, (nonzero - difference) // 2, seen - nonzero))
    return counts, total.sum()


def _sum(x: Tensor, per_position: bool) -> Tensor:
    """Sum of values -1, 0 and 1 over samples, and over positions too unless kept: whole numbers [channels, positions].

    Sums of floats, exact up to 2^24 in float32, are several times faster than counts of truth values.
    """
    counted = x.shape[0] if per_position else x.shape[0] * x.shape[2]
    exact = _wide(x) if counted <= 2**24 else torch.float64
    return x.sum(dim=0, dtype=exact) if per_position else x.sum(dim=(0, 2), dtype=exact).unsqueeze(-1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def layer_entropy(counts: Iterable[Tensor], rule: EntropyRule) -> float:
    """Entropy of one layer in bits from counts [3, channels, positions], one tensor per set of positions.

    Neurons that were never counted (only zeros under `exclude`, or masked) have entropy 0. 0.0 when no neuron remains.
    """
    tables = [c.cpu().sum(dim=2, keepdim=True) if rule.position_first else c.cpu() for c in counts]
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
    scratch: Scratch = field(default_factory=Scratch)
    _tables: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _sum: float = 0.0
    _batches: int = 0

    def add(self, z: Tensor, mask: Tensor | None = None) -> None:
        """Count the states of one batch of pre-activations; raises DataError when they are not finite."""
        z = z.detach()
        counts, total = _counted(z, self.channel_axis, mask, not self.rule.position_first, self.scratch)
        if not bool(torch.isfinite(total)) and not bool(torch.isfinite(z).all()):  # a sum may also overflow
            raise DataError(
                "a pre-activation is not finite", fix="Look for NaN or infinite values in the data and the weights"
            )
        if self.rule.aggregation == "batch":
            self._sum += layer_entropy([counts], self.rule)
            self._batches += 1
            return
        shape = tuple(counts.shape)
        self._tables[shape] = self._tables[shape] + counts if shape in self._tables else counts

    def totals(self) -> dict[str, Tensor]:
        """What was added up so far, to be summed over processes."""
        if self.rule.aggregation == "global":
            return {"x".join(map(str, shape)): table for shape, table in self._tables.items()}
        return {
            "bits": torch.tensor(self._sum, dtype=torch.float64),
            "batches": torch.tensor(self._batches, dtype=torch.int64),
        }

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on with the sums of all processes."""
        if self.rule.aggregation == "global":
            self._tables = {tuple(table.shape): table for table in totals.values()}
        else:
            self._sum, self._batches = float(totals["bits"]), int(totals["batches"])

    def entropy(self) -> float:
        """Entropy of the layer in bits over everything added so far; raises DataError when nothing was."""
        if not self._batches and not self._tables:
            raise DataError("no batch reached an activation", fix="Give a calibration loader that is not empty")
        if self.rule.aggregation == "batch":
            return self._sum / self._batches
        return layer_entropy(self._tables.values(), self.rule)


def mean_abs_weight(module: nn.Module) -> float:
    """Mean magnitude of the weights of a layer that are not exactly zero (0.0 when all are)."""
    weight = getattr(module, "weight", None)
    return mean_magnitude(weight) if isinstance(weight, Tensor) else 1.0


def mean_magnitude(weight: Tensor) -> float:
    """Mean magnitude of the weights that are not exactly zero (0.0 when all are)."""
    surviving = int(torch.count_nonzero(weight))
    return float(weight.detach().double().abs().sum()) / surviving if surviving else 0.0


def site_entropies(
    captured: fx.GraphModule, axes: Mapping[str, int], loader: Iterable[Any], rule: EntropyRule
) -> dict[str, float]:
    """Entropy in bits of each activation, by path, from one pass over `loader` in eval mode; padding is left out.

    `axes`: path of the activation -> its channel axis. Weights are not looked at (`rule.weighting` is the caller's).
    Raises DataError for an empty loader or pre-activations that are not finite.
    """
    tap, scratch = MaskTap(loader), Scratch()
    counters = {path: StateCounter(rule, axis, scratch) for path, axis in axes.items()}

    def adder(counter: StateCounter) -> Callable[[Tensor, Tensor], None]:
        return lambda z, _: counter.add(z, tap.for_tokens(z, counter.channel_axis))

    watchers = {path: adder(counter) for path, counter in counters.items()}
    observe(captured, watchers, tap, sums=list(counters.values()))
    return {path: counter.entropy() for path, counter in counters.items()}
