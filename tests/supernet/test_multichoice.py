"""One option per group, the largest score within bounds: against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palmette.supernet.multichoice import choose


def by_trying(scores, costs, bounds, floor):
    best = None
    for options in product(*(range(len(score)) for score in scores)):
        total = sum(score[i] for score, i in zip(scores, options, strict=True))
        spent = np.sum([cost[i] for cost, i in zip(costs, options, strict=True)], axis=0)
        if (spent <= bounds).all() and total > floor and (best is None or total > best):
            best = total
    return best


@settings(max_examples=300)
@given(st.integers(0, 10**9), st.integers(0, 2), st.booleans())
def test_the_best_of_all_solutions_is_found(seed, kinds, whole):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, size=rng.integers(1, 5))
    scores = [rng.integers(-3, 4, n).astype(float) if whole else rng.normal(size=n) for n in sizes]
    costs = [rng.integers(0, 20, (n, kinds)).astype(float) for n in sizes]
    bounds = rng.integers(0, 20 * len(sizes), kinds).astype(float)
    floor = float(rng.choice([-np.inf, 0.0]))
    found, expected = choose(scores, costs, bounds, floor), by_trying(scores, costs, bounds, floor)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.score == pytest.approx(expected)
    taken = [(score[i], cost[i]) for score, cost, i in zip(scores, costs, found.options, strict=True)]
    assert sum(score for score, _ in taken) == pytest.approx(found.score)
    assert (np.sum([cost for _, cost in taken], axis=0) <= bounds).all()


def test_many_equal_options_do_not_multiply():
    scores, costs = [np.ones(500)] * 6, [np.ones((500, 2))] * 6
    found = choose(scores, costs, np.array([6.0, 6.0]))
    assert found is not None
    assert found.score == 6
    assert choose(scores, costs, np.array([6.0, 5.0])) is None


def test_rounding_drops_no_option():
    scores = [np.array([0.5058876391526496, 1.4757763408462061]), np.array([0.25097477418601744, 0.004607296735731958])]
    costs = [np.array([[2.0, 6.0], [28.0, 18.0]]), np.array([[2.0, 6.0], [18.0, 2.0]])]
    found = choose(scores, costs, np.array([35.408407051758005, 22.661380513125124]))
    assert found is not None
    assert found.options == [0, 0]
