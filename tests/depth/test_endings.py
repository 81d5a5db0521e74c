"""What a run says when it ends otherwise than hoped, and what is left of it on disk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from palmette.depth import auto
from palmette.depth.auto import AutoConfig
from palmette.depth.shrink import shrink
from palmette.errors import InputError, RunError, TrainingError
from palmette.registry import get_method
from palmette.train.loop import HealConfig


def _run(trained, blobs, heal, **options):
    settings = {"cost": "macs", "heal": heal, "max_drop": 100.0, "controls": False, "method": "easier"} | options
    return shrink(trained, blobs.train, blobs.val, **settings)


class Endless:
    """A loader that does not know its length."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def test_a_target_that_was_missed_is_said(trained, blobs, quick, monkeypatch) -> None:
    monkeypatch.setattr(
        "palmette.depth.session.Session.clock", lambda session, network: 4.0 if network is session.dense else 3.0
    )
    result = _run(trained, blobs, quick, target_latency="0.5x", rounds=1)
    assert "; the target of 2 ms was not reached: 3 ms." in result.message


def test_networks_that_lost_too_much_are_counted(trained, blobs, monkeypatch) -> None:
    monkeypatch.setattr("palmette.depth.probe.summary", lambda seen: {"accuracy": 0.1, "n": 120, "interval": [0, 1]})
    config = AutoConfig(importance="answers", trainings=2)
    result = _run(trained, blobs, HealConfig(epochs=1), method="auto", config=config, max_drop=1.0)
    assert "none of the 2 networks that were healed stayed within 1 point, and " in result.message


def test_a_method_that_selects_nothing_says_so_with_its_scores(trained, blobs, quick) -> None:
    method = get_method("layer_folding")
    result = _run(trained, blobs, quick, method=method, reproduce=True)
    assert "selects none of 3 candidates; nearest is" in result.message
    assert len(result.ranking) == 3


def test_what_was_trained_outlives_a_failure(trained, blobs, quick, monkeypatch, tmp_path) -> None:
    def fails(*_, **__):
        raise TrainingError("The loss is nan")

    monkeypatch.setattr("palmette.depth.rounds.round_of", fails)
    with pytest.raises(TrainingError):
        _run(trained, blobs, quick, run_dir=tmp_path / "one", rounds=1)
    assert list((tmp_path / "one").glob("shrink-000.safetensors"))


def test_finished_trials_outlive_a_failed_one_but_not_wrong_input(trained, blobs, quick, monkeypatch, tmp_path) -> None:
    config = AutoConfig(importance="answers", points=2)
    real = auto.measured_front

    def fails(*_):
        raise RunError("A trial failed")

    monkeypatch.setattr(auto, "measured_front", fails)
    with pytest.raises(RunError):
        _run(trained, blobs, quick, method="auto", config=config, run_dir=tmp_path / "trials")
    assert list((tmp_path / "trials" / "importance").glob("*.json"))
    monkeypatch.setattr(auto, "measured_front", real)
    monkeypatch.setattr("palmette.depth.session.Session.clock", lambda session, network: 4.0)
    with pytest.raises(InputError, match="cannot be reached"):
        _run(trained, blobs, quick, method="auto", config=config, target_latency="0.01x", run_dir=tmp_path / "far")
    assert not (tmp_path / "far").exists()


def test_a_score_that_is_cross_entropy_refuses_another_loss(trained, blobs, quick) -> None:
    def brier(logits, target):
        return (logits.softmax(1) - F.one_hot(target, 4)).square().mean()

    with pytest.raises(InputError, match="'tlc' scores by cross entropy"):
        _run(trained, blobs, quick, method="tlc", loss_fn=brier)


def test_a_dry_run_needs_no_length(trained, blobs, quick) -> None:
    result = shrink(
        trained,
        Endless(blobs.train),
        blobs.val,
        cost="macs",
        heal=quick,
        method="easier",
        dry_run=True,
        example_inputs=torch.zeros(2, 8),
    )
    assert result.expected_seconds is None
    assert "a time unknown for a loader without length" in result.message
