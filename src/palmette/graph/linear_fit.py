"""The best linear map from what enters a block, or a run of blocks, to what leaves it, in closed form.

Least squares with a small ridge, fitted to the residual branch, so that what the data never shows passes unchanged.
Source: TOAST (arXiv 2410.04941), which replaces spans of transformer blocks so; here also maps of convolutions, read
pixel by pixel.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import palmette.ranks as ranks
from palmette.errors import DataError
from palmette.graph.affine import Affine
from palmette.graph.blocks import find_blocks
from palmette.graph.observe import observe
from palmette.graph.padding import MaskTap
from palmette.graph.segments import conv_module
from palmette.graph.sites import Site, axis_of
from palmette.graph.spans import Run, closed_reason, run_at
from palmette.ranks import Summable

RIDGE = 1e-4
"""Added to the covariance of the inputs, relative to their mean variance."""

ROWS = 8
"""Tokens or pixels of one batch that are looked at, per channel: beyond that, more batches tell more."""

HELD = 4
"""Every fourth sample is held out where the error of the fit is wanted."""


class Gram:
    """Second moments of what enters a site: shared by all the maps that are fitted from the same tensor."""

    def __init__(self, axis: int, tap: MaskTap | None = None, *, held: bool = False) -> None:
        self.axis, self.tap, self.held = axis, tap, held
        self.sums: Tensor | None = None  # [parts, D + 1, D + 1] of the rows with a one appended
        self.rows = torch.zeros(0)
        self._seen: Tensor | None = None
        self._index = torch.zeros(0, dtype=torch.long)
        self._parts: list[Tensor] = []
        self._batches = 0

    def add(self, x: Tensor) -> None:
        """Take in one batch [batch, ...] with channels along `axis`; again the same tensor: nothing."""
        if x is self._seen:
            return
        self._seen = x
        rows = _rows(x, self.axis)
        self._index = self._chosen(x, rows)
        samples = self._index // max(len(rows) // len(x), 1) + self._number() * len(x)
        self._batches += 1
        last = samples % HELD == HELD - 1
        self._parts = [torch.nonzero(p).flatten() for p in ([~last, last] if self.held else [samples >= 0])]
        self.rows = torch.nn.functional.pad(rows[self._index].double(), (0, 1), value=1.0)
        sums = torch.stack([self.rows[p].T @ self.rows[p] for p in self._parts])
        self.sums = sums if self.sums is None else self.sums + sums

    def _chosen(self, x: Tensor, rows: Tensor) -> Tensor:
        """Which rows count: no padding, and of more than are needed a random choice, the same one every time."""
        mask = None if self.tap is None else self.tap.for_tokens(x, -1 if self.axis == x.dim() - 1 else self.axis)
        index = torch.arange(len(rows)) if mask is None else torch.nonzero(mask.flatten().bool().cpu()).flatten()
        limit = ROWS * (rows.shape[1] + 1)
        if len(index) > limit:
            generator = torch.Generator().manual_seed(self._number())
            index = index[torch.randperm(len(index), generator=generator)[:limit].sort().values]
        return index.to(x.device)

    def _number(self) -> int:
        """The number of the present batch among those of all processes, which are dealt out in turn."""
        return self._batches * ranks.count() + ranks.rank()

    def totals(self) -> dict[str, Tensor]:
        """What was added up so far."""
        return {} if self.sums is None else {"sums": self.sums}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on with the sums of all processes."""
        self.sums = totals.get("sums")
        self._seen = None

    def parts(self, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The chosen rows of the last batch and those of `y`, by part."""
        rows = _rows(y, self.axis)[self._index].double()
        return [(self.rows[p], rows[p]) for p in self._parts]


def _rows(x: Tensor, axis: int) -> Tensor:
    return x.detach().movedim(axis, -1).reshape(-1, x.shape[axis])


class LinearFit:
    """Watches one site and fits output = matrix @ input + bias over all its tokens or pixels, in float64."""

    def __init__(self, gram: Gram) -> None:
        self.gram = gram
        # By part: cross [D + 1, D], inputs (with a one) times branch; squares [2] of branch and output; outputs [D].
        self.sums: dict[str, Tensor] = {}

    def __call__(self, before: Tensor, after: Tensor) -> None:
        """Take in one batch: input and output of the site, both [batch, ...] of one shape."""
        self.gram.add(before)
        found: dict[str, list[Tensor]] = {"cross": [], "squares": [], "outputs": []}
        for x, y in self.gram.parts(after):
            branch = y - x[:, :-1]
            found["cross"].append(x.T @ branch)
            found["squares"].append(torch.stack([(branch * branch).sum(), (y * y).sum()]))
            found["outputs"].append(y.sum(0))
        new = {name: torch.stack(values) for name, values in found.items()}
        self.sums = {name: self.sums[name] + value for name, value in new.items()} if self.sums else new

    def totals(self) -> dict[str, Tensor]:
        """What was added up so far."""
        return self.sums

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on with the sums of all processes."""
        self.sums = dict(totals)

    def matrix(self) -> Tensor:
        """The map as [D, D + 1], the bias in the last column, from everything seen. Raises DataError for nothing."""
        sums = {name: value.sum(0) for name, value in self._known().items()}
        return _identity_plus(_solved(sums["gram"], sums["cross"]))

    def residual(self) -> float:
        """Squared error of the map relative to the variance of the output, on samples held out of the fit.

        0 for a linear site, about 1 when nothing can be told from the input. Too few samples are not held out.
        Raises DataError when nothing was seen, or what was seen is not finite.
        """
        known = self._known()
        if bool((known["gram"][:, -1, -1] == 0).any()):  # a part without a row
            known = {name: value.sum(0, keepdim=True) for name, value in known.items()}
        fitted = _solved(known["gram"][0], known["cross"][0])
        gram, cross, squares, outputs = (known[name][-1] for name in ("gram", "cross", "squares", "outputs"))
        error = squares[0] - 2 * (fitted * cross).sum() + (fitted * (gram @ fitted)).sum()
        variance = squares[1] - (outputs * outputs).sum() / gram[-1, -1]
        if not bool(torch.isfinite(error)):
            raise DataError("a block's features are not finite", fix="Look for NaN or infinite values in the data")
        return float(error.clamp_min(0) / variance) if float(variance) > 1e-12 * float(squares[1]) else 0.0

    def _known(self) -> dict[str, Tensor]:
        if self.gram.sums is None or not self.sums or not bool((self.gram.sums[:, -1, -1] > 0).any()):
            raise DataError("No calibration data has been seen", fix="Give a calibration loader that is not empty.")
        return {"gram": self.gram.sums, **self.sums}


def _solved(sums: Tensor, cross: Tensor) -> Tensor:
    """Coefficients [D + 1, D] of the branch on the input and a one; the constant is not shrunk."""
    n = sums[-1, -1]
    mean, level = sums[:-1, -1] / n, cross[-1] / n
    covariance = sums[:-1, :-1] / n - torch.outer(mean, mean)
    covariance = (covariance + covariance.T) / 2
    ridge = RIDGE * covariance.diagonal().mean()
    if not float(ridge) > 0:
        return torch.cat([torch.zeros_like(cross[:-1]), level[None]])
    covariance.diagonal().add_(ridge)
    slope = torch.linalg.solve(covariance, cross[:-1] / n - torch.outer(mean, level))
    return torch.cat([slope, (level - mean @ slope)[None]])


def _identity_plus(branch: Tensor) -> Tensor:
    matrix = branch.T.clone()
    matrix.diagonal().add_(1.0)
    return matrix


# -- sites -------------------------------------------------------------------------------------------------------------


def fit_reason(gm: fx.GraphModule, run: Run) -> str:
    """Why a run of blocks cannot become a linear map, "" if it can."""
    reason = closed_reason(run)
    if reason:
        return reason
    source = run[0].source
    dims = len(source.meta["shape"])
    if dims < 2 or dims > 5 or axis_of(gm, source) not in (1, dims - 1):
        return "its channels lie along neither the second nor the last axis"
    return ""


def linear_residuals(gm: fx.GraphModule, sites: Sequence[Site | str], loader: Iterable[Any]) -> dict[str, float]:
    """For each block or span, by path, the held-out error of the best linear map: one pass over `loader` for all.

    See `LinearFit.residual`. Padding tokens are left out. Raises PlanError for an unknown site, DataError for no data.
    """
    tap = MaskTap(loader)
    fits = watch_fits(gm, [s if isinstance(s, str) else s.path for s in sites], tap, held=True)
    if fits:
        observe(gm, fits, tap, sums=summable(fits.values()), at_sum=True)
    return {path: fit.residual() for path, fit in fits.items()}


def watch_fits(gm: fx.GraphModule, paths: Iterable[str], tap: MaskTap, *, held: bool = False) -> dict[str, LinearFit]:
    """A watcher per block or span; those with the same input share its second moments."""
    grams: dict[fx.Node, Gram] = {}
    blocks = find_blocks(gm)
    fits = {}
    for path in dict.fromkeys(paths):
        source = run_at(gm, path, blocks)[0].source
        if source not in grams:
            grams[source] = Gram(axis_of(gm, source), tap, held=held)
        fits[path] = LinearFit(grams[source])
    return fits


def summable(fits: Iterable[LinearFit]) -> list[Summable]:
    """All that fits gather: shared second moments once, then what is each fit's own."""
    fits = list(fits)
    return [*dict.fromkeys(fit.gram for fit in fits), *fits]


def linear_module(matrix: Tensor, dims: int, axis: int, like: Tensor | None = None) -> nn.Module:
    """The map [D, D + 1] of tensors with `dims` axes: nn.Linear where channels are last, else a 1x1 convolution."""
    weight, bias = matrix[:, :-1], matrix[:, -1]
    rank = 0 if axis == dims - 1 else dims - 2
    ones, zeros = (1,) * rank, (0,) * rank
    return conv_module(Affine(weight.reshape(*weight.shape, *ones), bias, ones, zeros, zeros, ones), like=like)


def linear_macs(gm: fx.GraphModule, source: fx.Node) -> int:
    """MACs per sample of a linear map from what `source` puts out to the same shape."""
    shape = source.meta["shape"]
    return int(math.prod(shape[1:]) * shape[axis_of(gm, source)])


# -- in a plan ---------------------------------------------------------------------------------------------------------


def encode(matrix: Tensor) -> str:
    """A matrix as base64 of its float32 values, row by row."""
    return base64.b64encode(matrix.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()).decode()


def decode(text: str, shape: tuple[int, int]) -> Tensor:
    """The float32 matrix that `encode` wrote. Raises ValueError for anything else, or values that are not finite."""
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"no base64: {error}") from error
    if len(raw) != 4 * shape[0] * shape[1]:
        raise ValueError(f"{len(raw)} bytes for {shape[0]} x {shape[1]} values")
    matrix = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("a value is not finite")
    return matrix
