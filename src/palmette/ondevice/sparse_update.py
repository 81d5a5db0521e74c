"""Sparse update: train the same few channels throughout, those with the largest weights.

Idea: at a few hundred kilobytes only some layers can be trained, and of these some input channels; which, is decided
once. Paper: Lin et al., "On-Device Training Under 256KB Memory", NeurIPS 2022. What differs: the scheme (layers and
shares) may be given as published, and is otherwise filled from the last layer backwards until the budget is full, for
the authors' evolutionary search is not public; activations of other channels are really not stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from palmette.errors import InputError
from palmette.ondevice.selection import Axis, Selector, View
from palmette.registry import MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class SparseUpdateConfig(MethodConfig):
    """layers: numbers of convolutions and linear layers, in forward order, "21-24-27"; None: from the end.

    ratios: share of input channels of each, "1-1-.125". order: which channels of a layer come first.
    """

    layers: str | None = None
    ratios: str | None = None
    order: Literal["magnitude", "smallest", "random"] = "magnitude"
    seed: int = 0


class SparseUpdate:
    """A fixed scheme."""

    axis: Axis = "inputs"
    dynamic = False

    def __init__(self, config: SparseUpdateConfig) -> None:
        self.config = config
        self.order: list[tuple[str, int]] = []

    def start(self, view: View) -> None:
        """Rank the channels of every layer of the scheme."""
        for key, ratio in self._scheme(view):
            ranked = self._ranked(view, key)
            self.order += [(key, channel) for channel in ranked[: max(1, round(ratio * len(ranked)))]]

    def choose(self, view: View, epoch: int) -> Iterable[tuple[str, int]]:  # noqa: ARG002  # the interface
        """The scheme, layer by layer."""
        return self.order

    def _scheme(self, view: View) -> list[tuple[str, float]]:
        if self.config.layers is None:
            return [(key, 1.0) for key in reversed(view.layers)]
        every = [entry.key for entry in view.found.layers() if entry.layer is not None]
        numbers = _numbers(self.config.layers, "layers")
        ratios = [1.0] * len(numbers) if self.config.ratios is None else _numbers(self.config.ratios, "ratios")
        if len(ratios) != len(numbers):
            raise InputError(f"{len(numbers)} layers and {len(ratios)} ratios", where="sparse_update")
        scheme = []
        for number, ratio in zip(numbers, ratios, strict=True):
            key = every[int(number)] if 0 <= number < len(every) else ""
            if key not in view.layers:
                raise InputError(
                    f"layer {number:g} cannot be trained in this budget",
                    where="sparse_update",
                    why=f"the model has {len(every)} layers, of which {len(view.layers)} are within reach",
                    fix="Raise the budget, or leave layers out.",
                )
            scheme.append((key, ratio))
        return scheme

    def _ranked(self, view: View, key: str) -> list[int]:
        count = view.channels(key)
        if self.config.order == "random":
            return [int(c) for c in torch.randperm(count, generator=view.generator)]
        weight, groups = view.weight(key), view.layer(key).groups
        rows = weight.square().flatten(2).sum(2) if weight.dim() > 2 else weight.square()
        norms = rows.view(groups, -1, rows.shape[1]).sum(1).flatten()
        return [int(c) for c in norms.argsort(descending=self.config.order == "magnitude")]


def _numbers(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split("-")]
    except ValueError as error:
        raise InputError(f"{name}={text!r} is no list of numbers", fix='Write "21-24-27" or "1-.5-.125".') from error


@method(
    name="sparse_update",
    title="Sparse update: the same channels throughout, the largest first",
    paper="Lin et al., On-Device Training Under 256KB Memory, NeurIPS 2022",
    unit="squared weight norm",
    sites="channel",
    edit="slice",
    config=SparseUpdateConfig,
)
def make(config: SparseUpdateConfig) -> Selector:
    """A fixed scheme."""
    return SparseUpdate(config)
