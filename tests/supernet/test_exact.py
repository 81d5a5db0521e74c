"""Exact search: against enumeration on small spaces, and on the papers' spaces and data."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palmette.device import DeviceProfile
from palmette.errors import BudgetError, InputError
from palmette.supernet import COMPOFA, MOOFA, OFA
from palmette.supernet.coding import to_text
from palmette.supernet.exact import ExactSearch
from palmette.supernet.predictor import Ridge
from palmette.supernet.staged import Table

FLASH = DeviceProfile(weights_in="flash", dtype="int8", inplace_elementwise=True, reserve=100)
METRICS = ["moofa", "activations", "activations+inplace", FLASH, replace(FLASH, inplace_depthwise=True)]
RAM = replace(FLASH, weights_in="ram")


def peaks_of(space, configs, metric):
    of = space.peak_elements if isinstance(metric, str) else space.peak_bytes
    return of(*configs, metric)


def random_score(space, seed, *, whole=False):
    """A random additive score per resolution, place, kernel and expand."""
    rng = np.random.default_rng(seed)
    shape = (space.stages, space.blocks, len(space.resolutions), len(space.kernels), len(space.expands))
    draw = (lambda size: rng.integers(-1, 2, size).astype(float)) if whole else (lambda size: rng.normal(size=size))
    return Table(draw(len(space.resolutions)), draw(shape))


def scores_of(space, configs, score):
    return score.total(space.places(configs, listed=True))


# ---- against enumeration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_counts_and_smallest_budget_equal_those_of_all_networks(samples, metric, seed):
    space = samples.random_space(seed)
    peaks = peaks_of(space, samples.every(space), metric)
    search = ExactSearch(space, metric)
    for budget in (*np.unique(peaks)[:10].tolist(), int(np.median(peaks)), int(peaks.max()), int(peaks.min()) - 1):
        assert search.count(budget) == (peaks <= budget).sum()
    assert search.count() == len(peaks)
    assert search.smallest_budget()[0] == peaks.min()


@settings(max_examples=60)
@given(data=st.data())
def test_the_optimum_is_that_of_all_networks(samples, data):
    space = samples.random_space(data.draw(st.integers(0, 50)))
    metric = data.draw(st.sampled_from([*METRICS, RAM]))
    score = random_score(space, data.draw(st.integers(0, 10**6)), whole=data.draw(st.booleans()))
    networks = samples.every(space)
    peaks, values = peaks_of(space, networks, metric), scores_of(space, networks, score)
    macs, params = space.macs(*networks), space.params(*networks)
    at = data.draw(st.sampled_from([0.0, 0.05, 0.4, 1.0]))
    budget = int(np.quantile(peaks, at, method="lower"))
    bounds = {
        name: int(np.quantile(cost, data.draw(st.floats(0, 1)))) if data.draw(st.booleans()) else None
        for name, cost in (("macs", macs), ("params", params))
    }
    fits = peaks <= budget
    for cost, bound in zip((macs, params), bounds.values(), strict=True):
        fits &= bound is None or cost <= bound
    search = ExactSearch(space, metric)
    if not fits.any():
        with pytest.raises(BudgetError):
            search.best(score, budget, **bounds)
        return
    found = search.best(score, budget, **bounds)
    assert found.score == pytest.approx(values[fits].max())
    assert scores_of(space, found.configs, score)[0] == pytest.approx(found.score)
    assert found.peak == peaks_of(space, found.configs, metric)[0] <= budget
    for cost, bound in zip((space.macs, space.params), bounds.values(), strict=True):
        assert bound is None or cost(*found.configs)[0] <= bound


def test_a_looser_budget_is_never_worse(samples):
    for seed, metric in product(range(5), [*METRICS, RAM]):
        space = samples.random_space(seed)
        search, score = ExactSearch(space, metric), random_score(space, seed)
        budgets = np.unique(peaks_of(space, samples.every(space), metric))[::5].tolist()
        values = [search.best(score, budget).score for budget in budgets]
        assert values == sorted(values)


def test_draws_are_uniform_over_what_fits(samples):
    space = samples.small()
    networks = samples.every(space)
    peaks = space.peak_elements(*networks)
    budget = int(np.quantile(peaks, 0.3))
    fits = [text for text, peak in zip(to_text(space, networks), peaks, strict=True) if peak <= budget]
    n = 60 * len(fits)
    drawn = to_text(space, ExactSearch(space).sample(n, np.random.default_rng(1), budget))
    names, often = np.unique(drawn, return_counts=True)
    assert set(names) == set(fits)
    chi2, freedom = float(((often - 60) ** 2 / 60).sum()), len(fits) - 1
    assert abs(chi2 - freedom) < NormalDist().inv_cdf(0.9999) * (2 * freedom) ** 0.5


def test_the_chance_of_a_random_genotype_is_counted_exactly(samples):
    space = samples.small()
    search = ExactSearch(space)
    genotypes = [
        (*zip(*blocks, strict=True), depth, side)
        for blocks in product(product(space.kernels, space.expands), repeat=4)
        for depth in product(space.depths, repeat=2)
        for side in space.resolutions
    ]
    kernel, expand, depth, side = (np.array(column) for column in zip(*genotypes, strict=True))
    peaks = space.peak_elements(kernel, expand, depth, side)
    for budget in np.unique(peaks)[::4].tolist():
        assert search.chance(budget) == Fraction(int((peaks <= budget).sum()), len(peaks))


def test_a_draw_has_zeros_where_blocks_are_not_there():
    configs = ExactSearch(MOOFA).sample(50, np.random.default_rng(0), 400_000)
    there = np.tile(np.arange(4), 5) < np.repeat(configs.depth, 4, axis=1)
    assert np.array_equal(configs.kernel > 0, there)
    assert np.array_equal(configs.expand > 0, there)


# ---- the papers' spaces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "budget", "one_in"),
    [(MOOFA, 306_000, 7071), (MOOFA, 325_000, 2755), (MOOFA, 400_000, 734), (MOOFA, 450_000, 24.1),
     (OFA, 265_000, 25.6), (OFA, 350_000, 6)],
)  # fmt: skip
def test_published_shares_of_random_genotypes_that_fit(space, budget, one_in):
    assert float(1 / ExactSearch(space).chance(budget)) == pytest.approx(one_in, rel=2e-3)


def test_the_whole_space_is_counted():
    assert ExactSearch(MOOFA).count() == 4 * (9**2 + 9**3 + 9**4) ** 5
    assert ExactSearch(COMPOFA).count() == 4 * (3**2 + 3**3 + 3**4) ** 5
    assert ExactSearch(MOOFA).chance(299_519) == 0
    assert ExactSearch(MOOFA).chance() == 1


@pytest.mark.parametrize(
    ("space", "smallest", "layer"),
    [(MOOFA, "299,520", r"stage 4 block \d \w+ at resolution 128"),
     (OFA, "262,912", "stage 0 block 0 expansion at resolution 128")],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_what_does_not_fit_says_the_smallest_budget_and_the_layer_that_binds(space, smallest, layer):
    budget = int(smallest.replace(",", ""))
    search, score = ExactSearch(space), random_score(space, 0)
    assert search.best(score, budget).peak == budget
    for refused in (
        lambda: search.best(score, budget - 1),
        lambda: search.sample(1, np.random.default_rng(0), budget - 1),
    ):
        with pytest.raises(BudgetError, match=f"{layer} needs {smallest} elements. Allow at least {smallest}"):
            refused()
    assert search.count(budget - 1) == 0


def test_bounds_on_sums_say_the_smallest_one():
    search, score = ExactSearch(MOOFA), random_score(MOOFA, 0)
    with pytest.raises(BudgetError, match=r"at most 1,000 macs: the smallest has 78,683,840"):
        search.best(score, 800_000, macs=1000)
    with pytest.raises(BudgetError, match=r"at most 1,000 params: the smallest has 3,988,256"):
        search.best(score, 800_000, params=1000)
    board = replace(FLASH, ram="1MiB", flash="1MiB")
    with pytest.raises(BudgetError, match=r"at most 1,048,576 params: the smallest has 3,988,256"):
        ExactSearch(MOOFA, board).best(score)


def test_bounds_that_can_be_met_alone_but_not_together_are_told(samples):
    # The shallower the wider: fewest multiply-adds and fewest parameters are those of two networks.
    space = samples.small(tied=((1, 3), (2, 1)), expands=(1, 3), kernels=(3,), resolutions=(8,))
    networks, score, search = samples.every(space), random_score(space, 0), ExactSearch(space)
    macs, params = int(space.macs(*networks).min()), int(space.params(*networks).min())
    for bounds in ({"macs": macs}, {"params": params}):
        search.best(score, **bounds)
    with pytest.raises(BudgetError, match=f"meets all bounds together: .*macs <= {macs:,}, params <= {params:,}"):
        search.best(score, macs=macs, params=params)


def test_the_budget_of_a_profile_is_its_ram():
    score = random_score(MOOFA, 3)
    board = replace(FLASH, ram=200_000)
    assert ExactSearch(MOOFA, board).best(score).peak <= 200_000
    assert ExactSearch(MOOFA, board).count() == ExactSearch(MOOFA, FLASH).count(200_000)
    free = ExactSearch(MOOFA, FLASH).best(score)
    assert free.score == ExactSearch(MOOFA, FLASH).best(score, 2**40).score


def test_weights_in_ram_say_their_smallest_budget_and_cannot_be_counted():
    search = ExactSearch(MOOFA, RAM)
    need, layer = search.smallest_budget()
    assert layer.startswith("stage 0 block")
    assert search.best(random_score(MOOFA, 0), need).peak == need
    with pytest.raises(BudgetError, match=f"with all weights. Allow at least {need:,}"):
        search.best(random_score(MOOFA, 0), need - 1)
    for refused in (search.count, search.chance, lambda: search.sample(1, np.random.default_rng(0))):
        with pytest.raises(InputError, match="weights in RAM cannot be counted"):
            refused()


def test_too_many_options_are_refused():
    with pytest.raises(InputError, match="has 4,783,050 options"):
        ExactSearch(replace(MOOFA, depths=(2, 7)))


@pytest.mark.parametrize(
    ("budget", "peak"),
    [(350_000, 313_344), (400_000, 381_120), (450_000, 440_640), (600_000, 583_200), (800_000, 686_976)],
)
def test_optima_land_on_the_peaks_that_the_authors_search_found(stored, budget, peak):
    configs, top1, _ = stored("moofa")
    ridge = Ridge.fit(MOOFA, configs, top1, scale="linear")
    assert ExactSearch(MOOFA).best(ridge.table, budget).peak == peak
