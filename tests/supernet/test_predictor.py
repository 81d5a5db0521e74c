"""Predictors of accuracy, and what is said of how well they predict."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from palmette.errors import InputError
from palmette.supernet import MOOFA
from palmette.supernet.coding import one_hot
from palmette.supernet.predictor import Perceptron, Ridge, agreement, near_optimum, ridge


def additive_values(space, configs, seed=0):
    code = one_hot(space, configs)
    return 0.6 + code @ np.random.default_rng(seed).normal(0, 0.01, code.shape[1])


@pytest.mark.parametrize("scale", ["linear", "log_error"])
def test_ridge_recovers_what_is_additive(samples, scale):
    configs = samples.random_configs(MOOFA, 600)
    values = additive_values(MOOFA, configs)
    if scale == "log_error":
        values = 1 - np.exp(-values)
    ridge = Ridge.fit(MOOFA, configs.take(slice(400)), values[:400], scale=scale)
    assert ridge.predict(configs.take(slice(400, None))) == pytest.approx(values[400:], abs=1e-3)


def test_a_ridge_of_any_code_finds_what_is_linear():
    rng = np.random.default_rng(0)
    code, true = rng.integers(0, 2, (200, 9)).astype(float), rng.normal(size=9)
    weights, constant, penalty = ridge(code, code @ true + 0.5)
    assert weights == pytest.approx(true, abs=1e-2)
    assert constant == pytest.approx(0.5, abs=1e-2)
    assert penalty == 0.01
    with pytest.raises(InputError, match="too few"):
        ridge(code[:4], code[:4, 0])


def test_the_table_of_ridge_adds_up_to_its_prediction(samples):
    configs = samples.random_configs(MOOFA, 100)
    ridge = Ridge.fit(MOOFA, configs, 0.5 + 0.001 * np.arange(100))
    scores = ridge.table.total(MOOFA.places(configs, listed=True))
    assert np.allclose(ridge.predict(configs), 1 - np.exp(-scores))
    assert ridge.table.block.shape == (5, 4, 4, 3, 3)


def test_ridge_is_the_textbooks_with_an_unpenalised_mean(samples):
    configs = samples.random_configs(MOOFA, 60)
    values = np.random.default_rng(0).uniform(0.5, 0.7, 60)
    ridge = Ridge.fit(MOOFA, configs, values, scale="linear", penalties=(2.0,))
    code = np.hstack([one_hot(MOOFA, configs), np.ones((60, 1))])
    penalty = 2.0 * np.eye(125)
    penalty[-1, -1] = 0
    weights = np.linalg.solve(code.T @ code + penalty, code.T @ values)
    assert np.allclose(ridge.predict(configs), code @ weights)


def test_noise_asks_for_a_larger_penalty(samples):
    configs = samples.random_configs(MOOFA, 300)
    values = additive_values(MOOFA, configs)
    noisy = values + np.random.default_rng(1).normal(0, 0.1, 300)
    fits = [Ridge.fit(MOOFA, configs, v, scale="linear") for v in (values, noisy)]
    assert fits[0].penalty < fits[1].penalty


def test_two_hundred_measured_networks_predict_the_rest(stored):
    configs, top1, _ = stored("moofa")
    order = np.random.default_rng(0).permutation(len(top1))
    learn, rest = order[:200], order[200:]
    found = {}
    for scale in ("linear", "log_error"):
        predicted = Ridge.fit(MOOFA, configs.take(learn), top1[learn], scale=scale).predict(configs.take(rest))
        best = near_optimum(predicted)
        found[scale] = agreement(predicted, top1[rest]), agreement(predicted[best], top1[rest][best])
    overall, near = found["linear"]
    assert overall.rmse == pytest.approx(0.0061, abs=0.0005)
    assert overall.tau == pytest.approx(0.919, abs=0.01)
    assert near.bias_interval[0] > 0.005, "a sum of gains promises too much near the optimum"
    assert found["log_error"][0].rmse < overall.rmse
    assert found["log_error"][1].rmse < near.rmse / 1.5


def test_the_perceptron_learns_and_leaves_random_states_alone(samples):
    configs = samples.random_configs(MOOFA, 300)
    values = additive_values(MOOFA, configs)
    state = torch.get_rng_state()
    network = Perceptron.fit(MOOFA, configs, values, epochs=12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    again = Perceptron.fit(MOOFA, configs, values, epochs=12, seed=3)
    predicted = network.predict(configs)
    assert np.array_equal(predicted, again.predict(configs))
    assert agreement(predicted, values).tau > 0.7
    assert [m.out_features for m in network.network if isinstance(m, torch.nn.Linear)] == [400, 400, 400, 1]


@pytest.mark.parametrize("fit", [Ridge.fit, Perceptron.fit], ids=["ridge", "perceptron"])
def test_what_cannot_be_learnt_from_is_refused(samples, fit):
    configs = samples.random_configs(MOOFA, 10)
    for rows, values, said in [
        (configs, np.zeros(9), "do not go with 10 configurations"),
        (configs, np.full(10, np.nan), "do not go with"),
        (configs.take(slice(1)), np.zeros(1), "too few"),
        (configs._replace(resolution=configs.resolution + 1), np.zeros(10), "resolution"),
    ]:
        with pytest.raises(InputError, match=said):
            fit(MOOFA, rows, values)


def test_percentages_have_no_logarithm_of_the_error(samples):
    with pytest.raises(InputError, match="Divide percentages by 100"):
        Ridge.fit(MOOFA, samples.random_configs(MOOFA, 10), np.full(10, 70.0))


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_tau_is_that_of_scipy_with_ties_and_in_resamples():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 80), rng.integers(0, 9, 80)
    found = agreement(a, b, draws=50, seed=5)
    assert found.tau == pytest.approx(kendalltau(a, b).statistic)
    often = np.random.default_rng(5).multinomial(80, np.full(80, 1 / 80), size=50)
    taus = [kendalltau(np.repeat(a, times), np.repeat(b, times)).statistic for times in often]
    assert found.tau_interval == pytest.approx(np.percentile(taus, [2.5, 97.5]))


def test_agreement_of_what_agrees_and_of_a_constant_shift():
    values = np.linspace(0, 1, 30)
    same, shifted = agreement(values, values), agreement(values + 0.1, values)
    assert (same.n, same.rmse, same.bias, same.tau, same.tau_interval) == (30, 0, 0, 1, (1, 1))
    assert shifted.rmse == pytest.approx(0.1)
    assert shifted.bias_interval == pytest.approx((0.1, 0.1))
    assert shifted.tau == 1


def test_a_constant_prediction_has_no_tau():
    found = agreement(np.ones(5), np.arange(5.0))
    assert np.isnan(found.tau)
    assert np.isnan(found.tau_interval).all()


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for seed in range(100):
        error = rng.normal(0, 1, 100)
        low, high = agreement(error, np.zeros(100), draws=200, seed=seed).bias_interval
        covered += low <= 0 <= high
    assert 88 <= covered <= 100


def test_lengths_must_agree():
    with pytest.raises(InputError, match="cannot be compared"):
        agreement([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="cannot be compared"):
        agreement([1], [1])


def test_near_the_optimum_are_the_best_by_prediction_overall_or_in_each_bin():
    predicted = np.arange(40.0)
    assert near_optimum(predicted).tolist() == [38, 39]
    assert near_optimum(predicted[:3]).tolist() == [2]
    peaks = np.r_[np.full(20, 100), np.full(20, 200)]
    assert near_optimum(predicted, peaks=peaks, edges=(150,)).tolist() == [19, 39]
    assert near_optimum(predicted, share=1).tolist() == list(range(40))
    with pytest.raises(InputError, match="share of 0"):
        near_optimum(predicted, share=0)
