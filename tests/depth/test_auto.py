"""`auto`: a front whose costs fall, a search that trains as often as it may, and a control that saves as much."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from palmette.depth import auto
from palmette.depth.auto import AutoConfig, _trainings_left, local_steps
from palmette.depth.front import Point, thinned
from palmette.depth.importance import Reference, trial
from palmette.depth.knapsack import Pick
from palmette.depth.shrink import shrink
from palmette.errors import DataError, InputError
from palmette.graph import Plan, capture, drop, find_sites, load
from palmette.registry import get_method
from palmette.train.loop import HealConfig


def _run(trained, blobs, quick, **options):
    settings = {"cost": "macs", "heal": quick, "max_drop": 100.0, "controls": False, "method": "auto"} | options
    return shrink(trained, blobs.train, blobs.val, blobs.test, **settings)


@pytest.fixture(scope="module")
def whole(trained, blobs, quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto") / "run"
    return _run(trained, blobs, quick, controls=True, run_dir=folder), folder


def test_the_fastest_within_bounds_is_found(whole, trained) -> None:
    result, folder = whole
    assert result.cost["macs"] < result.dense_cost["macs"] / 2
    assert result.verification.max_relative_error < 1e-4
    x = torch.randn(5, 8)
    assert torch.equal(load(trained, folder / "model.safetensors").eval()(x), result.model(x))
    assert "removed at once" in result.message


def test_every_kind_of_edit_is_in_the_ranking(whole) -> None:
    result, _ = whole
    kinds = {row["name"].split()[0] for row in result.ranking}
    assert {"linearize", "drop", "fit_linear"} <= kinds
    assert all(row["score"] >= 0 for row in result.ranking)


def test_it_trains_at_most_as_often_as_it_may(whole) -> None:
    _, folder = whole
    healed = list((folder / "stages").glob("auto-*-heal.json"))
    assert 1 <= len(healed) <= AutoConfig().trainings


def test_the_random_control_saves_as_much_by_the_table(whole) -> None:
    result, folder = whole
    by_name = {row["name"]: row["macs_saved"] for row in result.ranking}
    drawn = json.loads((folder / "stages" / "random-picks.json").read_text())["value"]
    number = next(i for i in itertools.count() if not (folder / "stages" / f"probe-{i + 1:03d}.json").exists())
    chosen = {row["name"] for row in result.rows}
    assert "random removal" in chosen
    assert sum(by_name[name] for name in drawn) > 0
    assert number < AutoConfig().trainings


def test_a_resumed_search_decides_the_same(trained, blobs, quick, tmp_path) -> None:
    first = _run(trained, blobs, quick, run_dir=tmp_path / "run", rounds=1)
    again = _run(trained, blobs, quick, run_dir=tmp_path / "run", rounds=1, resume=True)
    assert first.plan.to_json() == again.plan.to_json()
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_edits_can_be_left_out(trained, blobs, quick) -> None:
    config = AutoConfig(linearize=False, fit_linear=False, parallelize=False, identity=False)
    result = _run(trained, blobs, quick, config=config, rounds=1)
    assert {row["name"].split()[0] for row in result.ranking} == {"drop"}
    assert {edit.kind for edit in result.plan} == {"drop"}


def test_healed_importance_trains_each_entry_a_little(trained, blobs, quick) -> None:
    config = AutoConfig(linearize=False, fit_linear=False, parallelize=False, importance="healed", steps=2)
    healed = _run(trained, blobs, replace(quick, epochs=100), config=config, rounds=0)
    plain = _run(trained, blobs, quick, config=AutoConfig(importance="answers"), rounds=0)
    before = {row["name"]: row["score"] for row in plain.ranking}
    after = {row["name"]: row["score"] for row in healed.ranking}
    assert any(after[name] < before[name] for name in after)


@pytest.mark.parametrize(
    ("epochs", "options", "steps"), [(20, 10, 16), (100, 10, 16), (1, 10, 0), (4, 10, 4), (0, 10, 0), (3, 0, 16)]
)
def test_local_healing_is_never_longer_than_half_a_healing(epochs, options, steps) -> None:
    session = SimpleNamespace(
        train=range(20), heal=HealConfig(epochs=epochs), settings=SimpleNamespace(rounds=None), config=None
    )
    assert local_steps(session, options, AutoConfig()) == steps
    assert 2 * steps * options <= max(epochs, 1) * 20
    assert local_steps(session, options, AutoConfig(importance="answers")) == 0
    assert _trainings_left(session, steps * options) == (2 if steps * options else 3)


def test_nothing_may_be_done() -> None:
    config = AutoConfig(linearize=False, drop=False, fit_linear=False, parallelize=False, identity=False)
    with pytest.raises(InputError, match="auto may do nothing"):
        _ = config.edits


def _points(*costs):
    return [Point(keys=(str(c),), plan=Plan([]), loss=1 / c, macs=c, latency_ms=float(c)) for c in costs]


def test_a_tighter_target_is_never_slower() -> None:
    points = _points(9, 7, 4, 2)
    costs = [points[auto.reaching(points, goal, "eager")].cost for goal in (9.5, 9, 8, 7, 5, 4, 3, 2)]
    assert costs == sorted(costs, reverse=True)
    assert all(cost <= goal for cost, goal in zip(costs, (9.5, 9, 8, 7, 5, 4, 3, 2), strict=True))


def test_a_target_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(InputError, match="the lowest that the removals allow is 2 ms"):
        auto.reaching(_points(9, 2), 1.0, "eager")


def test_thinning_keeps_the_last_and_spreads() -> None:
    picks = [Pick(keys=(str(g),), gain=g, loss=float(g)) for g in range(1, 101)]
    kept = [pick.gain for pick in thinned(picks, 5)]
    assert kept == [20, 40, 60, 80, 100]
    assert thinned(picks[:3], 5) == picks[:3]


class Two(nn.Module):
    """A block that does nothing and one that does much."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.idle, self.busy, self.head = (nn.Linear(4, 4) for _ in range(4))
        nn.init.zeros_(self.idle.weight)
        nn.init.zeros_(self.idle.bias)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.idle(x).relu()
        return self.head(x + 4 * self.busy(x).relu())


@pytest.mark.parametrize("classes", [True, False])
def test_divergence_is_zero_for_a_block_that_does_nothing(classes) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 4)
    dense = capture(Two().eval(), x[:2])
    blocks = [site for site in find_sites(dense, x[:2]) if site.kind == "block"]
    reference = Reference.of(dense, [(x, None)], None, classes=classes)
    found = [
        trial(Plan([drop(b)]).to_json(), dense=dense, example=x[:2], pad="exact", reference=reference, local=None)
        for b in blocks
    ]
    assert found[0] == 0
    assert found[1] > 1e-4


def test_divergence_is_kl_in_nats_per_sample() -> None:
    torch.manual_seed(0)
    dense, other, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(10, 4)
    reference = Reference.of(dense, [(x[:6], None), (x[6:], None)], None, classes=True)
    p, q = dense(x).double().log_softmax(1), other(x).double().log_softmax(1)
    expected = float((p.exp() * (p - q)).sum(1).mean().detach())
    assert reference.divergence(other) == pytest.approx(expected, rel=1e-6)


def test_ignorance_is_what_equal_scores_diverge_by() -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(4, 3), torch.randn(10, 4)
    reference = Reference.of(dense, [(x, None)], None, classes=True)
    nothing = nn.Linear(4, 3)
    nn.init.zeros_(nothing.weight)
    nn.init.zeros_(nothing.bias)
    assert reference.ignorance == pytest.approx(reference.divergence(nothing), rel=1e-6)


def test_an_empty_loader_is_named() -> None:
    with pytest.raises(DataError, match="no batch is left"):
        Reference.of(nn.Linear(2, 2), [], None, classes=True)


def test_it_is_listed_with_its_search() -> None:
    assert get_method("auto").search is auto.search
