"""Accuracy from a configuration, learnt from measured networks, and how far that can be trusted.

Ridge regression on the papers' 0/1 code is additive, so that palmette.supernet.exact finds its optimum. On accuracy
itself it promises too much at the corner of a space, where gains stop adding up; on the logarithm of the error they
go on doing so, and the optimum is still found exactly. The papers' own predictor, a perceptron with three layers of
400, is here to compare.

Source: MOOFA, arXiv 2409.05900 (code and perceptron); tau-b: Kendall 1945.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from palmette.errors import InputError
from palmette.supernet.coding import one_hot
from palmette.supernet.staged import Array, Configs, StagedSpace, Table

if TYPE_CHECKING:
    from torch import nn

PENALTIES = tuple(float(p) for p in np.logspace(-2, 3, 21))
_FOLDS = 5


@dataclass(frozen=True)
class Ridge:
    """A linear predictor on the 0/1 code: `table` over the space's resolutions, ready for ExactSearch.best.

    scale: what the table adds up to, "log_error" for -log(1 - value) or "linear" for the value itself. A choice that no
    row had weighs nothing.
    """

    space: StagedSpace
    table: Table
    penalty: float
    scale: Literal["log_error", "linear"] = "log_error"

    @classmethod
    def fit(
        cls,
        space: StagedSpace,
        configs: Configs,
        values: Any,
        *,
        scale: Literal["log_error", "linear"] = "log_error",
        penalties: tuple[float, ...] = PENALTIES,
        seed: int = 0,
    ) -> Ridge:
        """Fit measured values [N] in closed form; the penalty is that of the least squared error in cross-validation.

        values: accuracies below 1 for the scale "log_error", any for "linear". The mean is not penalised; the folds are
        drawn by `seed`. Raises InputError for fewer than five rows, values of another length or beyond the scale, and
        for a configuration that the space does not have.
        """
        code, measured = one_hot(space, configs), _checked(configs, values, least=_FOLDS)
        if scale == "log_error":
            if measured.max() >= 1:
                raise InputError(
                    f"A value of {measured.max():g} has no logarithm of its error",
                    why="accuracies below 1 are needed",
                    fix='Divide percentages by 100, or write scale="linear".',
                )
            measured = -np.log1p(-measured)
        weights, constant, penalty = ridge(code, measured, penalties, seed)
        return cls(space, _table(space, weights, constant), penalty, scale)

    def predict(self, configs: Configs) -> Array:
        """Predicted values, float64 [N]. Raises InputError for a choice or resolution that the space does not list."""
        return np.asarray(self.value(self.table.total(self.space.places(configs, listed=True))))

    def value(self, score: Any) -> Any:
        """The value that a sum over `table` stands for, as `Optimum.score`; a float or an array."""
        return score if self.scale == "linear" else -np.expm1(-score)


def ridge(
    code: Array, values: Array, penalties: tuple[float, ...] = PENALTIES, seed: int = 0
) -> tuple[Array, float, float]:
    """Weights [columns] and constant of a ridge regression of values [N] on code [N, columns], and its penalty.

    The penalty is that of the least squared error in five-fold cross-validation, the folds drawn by `seed`; the mean is
    not penalised. Raises InputError for fewer than five rows.
    """
    if len(values) < _FOLDS:
        raise InputError(f"{len(values)} values are too few to learn from", fix=f"Give at least {_FOLDS}.")
    fold = np.random.default_rng(seed).permutation(len(values)) % _FOLDS
    errors = np.zeros(len(penalties))
    for number in range(_FOLDS):
        out = fold == number
        weights, constants = _solve(code[~out], values[~out], penalties)
        errors += ((code[out] @ weights + constants - values[out, None]) ** 2).sum(0)
    penalty = penalties[int(errors.argmin())]
    weights, constants = _solve(code, values, (penalty,))
    return weights[:, 0], float(constants[0]), penalty


def _solve(code: Array, values: Array, penalties: tuple[float, ...]) -> tuple[Array, Array]:
    """Weights [columns, P] and constants [P] for every penalty, from one eigendecomposition."""
    centre, mean = code.mean(0), values.mean()
    moved = code - centre
    scales, axes = np.linalg.eigh(moved.T @ moved)
    along = axes.T @ (moved.T @ (values - mean))
    weights = axes @ (along[:, None] / (np.maximum(scales, 0)[:, None] + np.array(penalties)))
    return weights, mean - centre @ weights


def _table(space: StagedSpace, weights: Array, constant: float) -> Table:
    sides, kernels = len(space.resolutions), len(space.kernels)
    parts = weights[sides:].reshape(space.stages, space.blocks, 1, -1)
    block = parts[..., :kernels, None] + parts[..., None, kernels:]
    full = (space.stages, space.blocks, sides, kernels, len(space.expands))
    return Table(weights[:sides] + constant, np.broadcast_to(block, full))


@dataclass(frozen=True)
class Perceptron:
    """The papers' predictor: three hidden layers of 400 with ReLU on the 0/1 code, plus the mean of the values."""

    space: StagedSpace
    network: nn.Module
    mean: float

    @classmethod
    def fit(cls, space: StagedSpace, configs: Configs, values: Any, *, epochs: int = 50, seed: int = 0) -> Perceptron:
        """Fit measured values [N]: squared error, batches of 32, Adam at 1e-3 falling to zero by a cosine.

        Global random states are left as they are. Raises InputError for too few rows, values of another length, and for
        a configuration that the space does not have.
        """
        import torch
        from torch import nn

        measured = _checked(configs, values, least=2)
        code = torch.tensor(one_hot(space, configs), dtype=torch.float32)
        mean = float(measured.mean())
        target = torch.tensor(measured - mean, dtype=torch.float32)
        sizes = (code.shape[1], 400, 400, 400)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
            network = nn.Sequential(*layers, nn.Linear(400, 1), nn.Flatten(0))
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
            for _ in range(epochs):
                for rows in torch.randperm(len(code)).split(32):
                    optimizer.zero_grad()
                    nn.functional.mse_loss(network(code[rows]), target[rows]).backward()
                    optimizer.step()
                schedule.step()
        return cls(space, network.eval(), mean)

    def predict(self, configs: Configs) -> Array:
        """Predicted values, float64 [N]. Raises InputError for a choice or resolution that the space does not list."""
        import torch

        with torch.no_grad():
            found = self.network(torch.tensor(one_hot(self.space, configs), dtype=torch.float32))
        return np.asarray(found.double().numpy() + self.mean)


def _checked(configs: Configs, values: Any, least: int) -> Array:
    measured = np.asarray(values, dtype=np.float64)
    if measured.shape != np.shape(configs.resolution) or not np.isfinite(measured).all():
        raise InputError(
            f"{measured.size} values do not go with {len(configs.resolution)} configurations",
            why="one finite value is needed for each",
        )
    if len(measured) < least:
        raise InputError(f"{len(measured)} measured networks are too few to learn from", fix=f"Give at least {least}.")
    return measured


# ---- how far predictions can be trusted ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Predictions against measurements of n networks that were not learnt from; each with its 95 % interval.

    rmse: root of the mean squared error; bias: mean of predicted minus measured; tau: Kendall's tau-b, nan where one
    side is constant.
    """

    n: int
    rmse: float
    rmse_interval: tuple[float, float]
    bias: float
    bias_interval: tuple[float, float]
    tau: float
    tau_interval: tuple[float, float]


def agreement(predicted: Any, measured: Any, *, draws: int = 1000, seed: int = 0) -> Agreement:
    """How well predictions [N] agree with measurements [N]; intervals from a bootstrap over networks, drawn by `seed`.

    Raises InputError when the lengths differ or fewer than two networks are given.
    """
    p, m = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if p.shape != m.shape or p.ndim != 1 or len(p) < 2:
        raise InputError(f"Arrays of shapes {p.shape} and {m.shape} cannot be compared", fix="Give two of [N], N >= 2.")
    n, error = len(p), p - m
    often = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    often = np.concatenate([np.ones((1, n)), often])  # the sample itself first
    rmse, bias = np.sqrt(often @ error**2 / n), often @ error / n
    tau = _tau(p, m, often)
    return Agreement(n, *_with_interval(rmse), *_with_interval(bias), *_with_interval(tau))


def _with_interval(values: Array) -> tuple[float, tuple[float, float]]:
    """The first value, and the interval in which 95 % of the others lie, undefined ones left out."""
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(values[0]), (float(low), float(high))


def _tau(p: Array, m: Array, often: Array) -> Array:
    """Kendall's tau-b of samples in which the rows occur `often` [D, N] times; a row against itself is a tie."""
    above_p, above_m = np.sign(p[:, None] - p), np.sign(m[:, None] - m)

    def weighed(pairs: Array) -> Array:
        return np.asarray(((often @ pairs) * often).sum(1))

    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(weighed(above_p * above_m) / np.sqrt(weighed(above_p**2) * weighed(above_m**2)))


def near_optimum(predicted: Any, *, share: float = 0.05, peaks: Any = None, edges: Any = ()) -> Array:
    """Rows of the `share` of networks that are predicted best, at least one; int64, ascending.

    With `peaks` [N] and ascending `edges`, the best of each bin of peak memory: the networks that a search at each
    budget would propose. Raises InputError unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise InputError(f"A share of {share} is not in (0, 1]")
    values = np.asarray(predicted)
    bins = np.zeros(len(values), dtype=np.int64) if peaks is None else np.searchsorted(edges, peaks)
    rows = []
    for number in np.unique(bins):
        inside = np.flatnonzero(bins == number)
        best = inside[np.argsort(-values[inside], kind="stable")]
        rows.append(best[: max(1, round(share * len(inside)))])
    return np.sort(np.concatenate(rows))
