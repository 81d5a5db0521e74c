"""Intervals, held against published values, against simulation and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palmette.errors import InputError
from palmette.stats import mean_interval, paired_difference, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_the_literature(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_mirrors(pair):
    correct, n = pair
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert low < high
    mirrored = wilson_interval(n - correct, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_what_is_no_proportion(correct, n):
    with pytest.raises(InputError, match="no proportion"):
        wilson_interval(correct, n)


def test_mean_interval():
    values = np.array([0.0, 0.5, 1.0, 0.5])
    half = 1.959963984540054 * values.std(ddof=1) / 2
    assert mean_interval(values) == pytest.approx((0.5 - half, 0.5 + half))
    assert mean_interval([1.0]) == (1.0, 1.0)
    with pytest.raises(InputError):
        mean_interval([])


def test_difference_is_a_minus_b_in_points():
    a = np.array([True] * 70 + [False] * 30)
    b = np.array([True] * 60 + [False] * 40)
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(10.0)
    assert low < 10 < high
    assert paired_difference(b, a) == pytest.approx((-difference, -high, -low))


def test_pairing_counts_only_disagreements():
    same = np.random.default_rng(0).random(4000) < 0.9
    flipped = same.copy()
    flipped[:200] = ~flipped[:200]
    difference, low, high = paired_difference(same, flipped)
    assert high - low == pytest.approx(2 * 0.69, abs=0.05)  # "4,000 images alone resolve about 0.7 points"
    assert low <= difference <= high


def test_equal_networks_keep_a_width():
    difference, low, high = paired_difference(np.ones(50, bool), np.ones(50, bool))
    assert difference == 0
    assert low < 0 < high
    assert high == pytest.approx(100 * 1.959963984540054 * math.sqrt(1 / 52) / math.sqrt(52))


def test_seeds_are_pooled_per_image():
    generator = np.random.default_rng(1)
    a, b = generator.random((3, 500)) < 0.8, generator.random((3, 500)) < 0.7
    pooled = paired_difference(a, b)
    assert pooled[0] == pytest.approx(100 * (a.mean() - b.mean()))
    assert paired_difference(list(a), list(b)) == pooled
    repeated = paired_difference(np.stack([a[0]] * 3), np.stack([b[0]] * 3))
    assert repeated == pytest.approx(paired_difference(a[0], b[0]))  # seeing the same thing thrice teaches nothing


def test_seeds_with_unlike_numbers_of_images_are_laid_end_to_end():
    a, b = [np.array([1, 1, 0]), np.array([1, 0])], [np.array([1, 0, 0]), np.array([0, 0])]
    assert paired_difference(a, b) == pytest.approx(paired_difference([1, 1, 0, 1, 0], [1, 0, 0, 0, 0]))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(2000):
        cells = generator.choice(3, p=[0.88, 0.08, 0.04], size=400)  # same, only a right, only b right
        _, low, high = paired_difference(cells == 1, cells == 2)
        held += low <= 4.0 <= high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("a", "b"), [([1, 0], [1]), ([[1, 0]], [[1, 0], [0, 0]]), ([], [])])
def test_results_that_cannot_be_paired(a, b):
    with pytest.raises(InputError):
        paired_difference(a, b)
