"""How far a site moves what passes through it: |y - x| / |x| over a set of data, 0 for the identity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from palmette.errors import DataError
from palmette.graph import observe


class Change:
    """Sums of |y - x|^2 and |x|^2 over all that enters a site as x and leaves it as y, in float64."""

    def __init__(self) -> None:
        self.moved, self.size, self.batches = 0.0, 0.0, 0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Add one batch of inputs and outputs of equal shape; raises DataError when they are not finite."""
        before, after = x.detach().double(), y.detach().double()
        moved, size = float((after - before).square().sum()), float(before.square().sum())
        require_finite(moved + size)
        self.moved, self.size, self.batches = self.moved + moved, self.size + size, self.batches + 1

    def totals(self) -> dict[str, Tensor]:
        """What was added up so far."""
        sums = torch.tensor([self.moved, self.size], dtype=torch.float64)
        return {"sums": sums, "batches": torch.tensor(self.batches)}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on with the sums of all processes."""
        (self.moved, self.size), self.batches = totals["sums"].tolist(), int(totals["batches"])

    def value(self) -> float:
        """|y - x| / |x|; raises DataError before the first batch."""
        if self.batches == 0:
            raise DataError("no batch reached a site", fix="Give a calibration loader that is not empty")
        return float((self.moved / max(self.size, torch.finfo(torch.float64).tiny)) ** 0.5)


def require_finite(value: float) -> None:
    """Raises DataError when a number made of features is NaN or infinite."""
    if not value < float("inf"):
        raise DataError("features are not finite", fix="Look for NaN or infinite values in the data and the weights")


def changes(network: fx.GraphModule, paths: Iterable[str], loader: Iterable[Any]) -> dict[str, float]:
    """The change made by each activation or block, by path, from one pass in eval mode.

    Several processes see a share of the batches each. Raises DataError for an empty loader or features that are not
    finite.
    """
    found = {path: Change() for path in paths}
    observe(network, found, loader, sums=list(found.values()))
    return {path: change.value() for path, change in found.items()}
