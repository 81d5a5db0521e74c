"""Least squares for times that add up, with fewer measurements than choices, and its error on networks left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from palmette.errors import InputError
from palmette.supernet.codes import Floats, Ints
from palmette.supernet.memory import MemoryModel

_DRAWN = 20
"""Random configurations per column of a code, from which the average effect of a choice is learnt."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Error:
    """Relative errors in percent on `n` networks that were not fitted.

    mean: of the absolute errors, with the 95 % interval [low, high] of a bootstrap over networks. bias: predicted above
    measured is positive. worst: the largest absolute one. rank: Kendall's tau between predicted and measured.
    """

    n: int
    mean: float
    low: float
    high: float
    bias: float
    worst: float
    rank: float

    def __str__(self) -> str:
        return (
            f"{self.mean:.1f} % [{self.low:.1f}, {self.high:.1f}] on {self.n} networks that were not fitted (bias "
            f"{self.bias:+.1f} %, worst {self.worst:.1f} %, Kendall's tau {self.rank:.2f})"
        )


def work_of(memory: MemoryModel, codes: Ints) -> Floats:
    """Multiply-adds and bytes of weights of codes [n, choices], [n, 2]; what was timed computes in floating point."""
    return np.stack([memory.weights.macs(codes), memory.weights.float_bytes(codes)], axis=1).astype(np.float64)


def features(memory: MemoryModel, seed: int = 0) -> Floats:
    """What each column of a code adds on average to the bytes alive over all steps, and to the steps, [width, 2].

    Each column of the result is scaled to 1 for the average configuration.
    """
    codes, rng = memory.codes, np.random.default_rng(seed)
    count = _DRAWN * codes.width
    rows = np.stack([rng.integers(len(c.values), size=count) for c in codes.choices], axis=1)
    live = memory.live(rows)
    amounts = np.stack([np.maximum(live, 0.0).sum(1), (live >= 0).sum(1)], axis=1)
    found: Floats = np.linalg.lstsq(codes.mattering(rows), amounts / amounts.mean(0), rcond=None)[0]
    return found


def fit_times(onehot: Floats, work: Floats, times: Floats, features: Floats) -> tuple[Floats, Floats]:
    """A vector [width] and rates [k], so that codes [n, width] and work [n, k] times these are times [n].

    Least squares of relative errors. Rates, a constant and the directions `features` [width, f] cost nothing; all
    others are held back by a ridge whose strength is that of the smallest leave-one-out error. A rate below 0 is left
    out.
    """
    start = np.zeros((onehot.shape[1], 1))
    start[0] = 1.0
    directions = np.concatenate([features, start], axis=1)
    scale = work.mean(0)
    kept = list(range(work.shape[1]))
    while True:
        free = np.concatenate([onehot @ directions, work[:, kept] / scale[kept]], axis=1) / times[:, None]
        ridge, amounts = _ridge(onehot / times[:, None], free)
        rates = amounts[directions.shape[1] :]
        if not len(rates) or rates.min() >= 0:
            break
        del kept[int(rates.argmin())]
    found = np.zeros(work.shape[1])
    found[kept] = rates / scale[kept]
    return ridge + directions @ amounts[: directions.shape[1]], found


def _ridge(x: Floats, free: Floats) -> tuple[Floats, Floats]:
    """Coefficients of x [n, width], held back, and of free [n, f], so that both products add up to 1."""
    inverse = np.linalg.pinv(free)
    target = np.ones(len(x))
    rest = np.eye(len(x)) - free @ inverse
    kernel = rest @ x @ x.T @ rest
    values, vectors = np.linalg.eigh(kernel)
    best, dual = np.inf, np.zeros(len(x))
    for strength in np.append(np.geomspace(1e-6, 1e2, 33) * max(float(values[-1]), 1e-30), np.inf):
        shrunk = vectors / (values + strength)
        smoother = free @ inverse + rest @ kernel @ shrunk @ vectors.T @ rest
        leverage = np.clip(np.diag(smoother), None, 1 - 1e-6)
        error = float(np.mean(((target - smoother @ target) / (1 - leverage)) ** 2))
        if error < best:
            best, dual = error, rest @ (shrunk @ (vectors.T @ (rest @ target)))
    ridge = x.T @ dual
    return ridge, inverse @ (target - x @ ridge)


def held_out_error(times: Floats, predicted: Floats, seed: int = 0) -> Error:
    """How predicted times [n] compare with measured ones. Raises InputError for none."""
    if not len(times):
        raise InputError("No network was left out, so that no error can be told")
    relative = 100 * (predicted / times - 1)
    absolute = np.abs(relative)
    again = np.random.default_rng(seed).integers(len(times), size=(_RESAMPLES, len(times)))
    low, high = np.quantile(absolute[again].mean(1), [0.025, 0.975])
    upper = np.triu_indices(len(times), 1)
    signs = [np.sign(v[upper[0]] - v[upper[1]]) for v in (times, predicted)]
    rank = float((signs[0] * signs[1]).mean()) if len(upper[0]) else 1.0
    return Error(
        len(times), float(absolute.mean()), float(low), float(high), float(relative.mean()), float(absolute.max()), rank
    )
