"""Rival plans of one latency: the front that goes on is that of the plan that heals best."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from palmette.depth import auto as auto_module
from palmette.depth import race
from palmette.depth.auto import AutoConfig
from palmette.depth.shrink import shrink


def _run(trained, blobs, quick, **options):
    settings = {
        "cost": "macs",
        "heal": replace(quick, epochs=30),
        "max_drop": 100.0,
        "controls": False,
        "method": "auto",
    } | options
    return shrink(trained, blobs.train, blobs.val, blobs.test, **settings)


def _favoured(monkeypatch, kind: str) -> list[tuple[str, ...]]:
    """Let the rivals of `kind` win every race; returns what ran against one another."""
    seen: list[tuple[str, ...]] = []

    def divergences(session, plans, reference, *, steps, journal):
        assert journal == "race"
        assert steps >= race.LEAST_STEPS
        seen.append(tuple(plans))
        return {name: 0.1 if name == kind else 0.2 for name in plans}

    monkeypatch.setattr(race, "divergences", divergences)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "linearize"])
def test_the_front_of_the_best_rival_goes_on(trained, blobs, quick, monkeypatch, kind) -> None:
    seen = _favoured(monkeypatch, kind)
    result = _run(trained, blobs, quick, rounds=1)
    assert len(seen) == 1
    assert kind in seen[0]
    assert {edit.kind for edit in result.plan} == {kind}


@pytest.mark.slow
def test_where_the_common_plan_is_best_nothing_changes(trained, blobs, quick, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(auto_module, "raced", lambda session, options, items, points, goal, **_: (points, 0))
        without = _run(trained, blobs, quick, rounds=1)
    _favoured(monkeypatch, "all")
    assert _run(trained, blobs, quick, rounds=1).plan.to_json() == without.plan.to_json()


def test_no_race_without_healing(trained, blobs, quick, monkeypatch) -> None:
    seen = _favoured(monkeypatch, "drop")
    _run(trained, blobs, quick, rounds=1, config=AutoConfig(importance="answers"))
    assert seen == []


def test_no_race_of_one_kind_alone(trained, blobs, quick, monkeypatch) -> None:
    seen = _favoured(monkeypatch, "drop")
    one = AutoConfig(linearize=False, fit_linear=False, parallelize=False, identity=False)
    _run(trained, blobs, quick, rounds=1, config=one)
    assert seen == []


def test_a_race_is_journaled_and_counted(trained, blobs, quick, tmp_path) -> None:
    first = _run(trained, blobs, quick, run_dir=tmp_path / "run", rounds=1)
    ran = sorted((tmp_path / "run" / "race").glob("*.json"))
    losses = [json.loads(file.read_text())["value"] for file in ran]
    assert len(losses) >= 2
    assert all(loss >= 0 for loss in losses)
    stamps = [file.stat().st_mtime_ns for file in ran]
    again = _run(trained, blobs, quick, run_dir=tmp_path / "run", rounds=1, resume=True)
    assert again.plan.to_json() == first.plan.to_json()
    assert [file.stat().st_mtime_ns for file in ran] == stamps
