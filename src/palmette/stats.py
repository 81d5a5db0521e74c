"""Intervals for what the reports claim: one accuracy, and the difference between two networks on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from palmette.errors import InputError

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(correct: int | float, n: int) -> tuple[float, float]:
    """95 % interval (low, high), as fractions, of a proportion of `correct` out of `n` (Wilson 1927).

    Raises InputError unless 0 <= correct <= n and n > 0.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise InputError(f"{correct} of {n} is no proportion", why="0 <= correct <= n and n > 0 are needed")
    p, z2 = correct / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return low, high


def mean_interval(values: Any) -> tuple[float, float]:
    """95 % interval (low, high) of the mean of values in [0, 1], by the normal approximation, cut to [0, 1].

    For 0/1 values use `wilson_interval`. Raises InputError for an empty array.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise InputError("No values to take a mean of")
    half = Z95 * float(array.std(ddof=1 if array.size > 1 else 0)) / math.sqrt(array.size)
    mean = float(array.mean())
    return max(0.0, mean - half), min(1.0, mean + half)


def paired_difference(correct_a: Any, correct_b: Any) -> tuple[float, float, float]:
    """Accuracy of a minus that of b, in percentage points, with its 95 % interval: (difference, low, high).

    Each argument says per image whether the answer was right (bool, or a score in [0, 1]), in the same order: shape
    [images], or one such array per seed. Seeds are pooled per image first, so that an image seen by three seeds counts
    as one image (seeds with unlike numbers of images are laid end to end instead). The interval adds one agreeing image
    and half a disagreeing one each way (Agresti and Min 2005), so that it keeps a width when the networks never differ.
    Raises InputError when the shapes differ or nothing is given.
    """
    a, b = _per_seed(correct_a), _per_seed(correct_b)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        raise InputError(
            f"Results of shapes {[x.shape for x in a]} and {[y.shape for y in b]} cannot be paired",
            fix="Evaluate both networks on the same images, in the same order.",
        )
    differences = [x - y for x, y in zip(a, b, strict=True)]
    same_images = len({d.size for d in differences}) == 1
    d = np.mean(differences, axis=0) if same_images else np.concatenate(differences)
    if d.size == 0:
        raise InputError("No images to compare two networks on")
    n = d.size + 2
    centre = float(d.sum()) / n
    variance = ((float((d * d).sum()) + 1) / n - centre * centre) / n
    half = Z95 * math.sqrt(variance)
    return 100 * float(d.mean()), 100 * max(-1.0, centre - half), 100 * min(1.0, centre + half)


def _per_seed(correct: Any) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """One float array [images] per seed."""
    nested = isinstance(correct, Sequence) and len(correct) > 0 and np.ndim(correct[0]) == 1
    rows = list(correct) if nested or np.ndim(correct) == 2 else [correct]
    return [np.asarray(row, dtype=np.float64).reshape(-1) for row in rows]
