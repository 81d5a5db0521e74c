"""The verb: what it removes, what it refuses, what it writes, and when it stops."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from palmette.depth import outcome
from palmette.depth.rounds import target_ms
from palmette.depth.shrink import shrink
from palmette.errors import DataError, InputError, RunError, TrainingError, UnknownMethod, VerifyError
from palmette.graph import load
from palmette.registry import get_method
from palmette.train.loop import HealConfig


def _run(trained, blobs, quick, **options):
    settings = {"cost": "macs", "heal": quick, "max_drop": 100.0, "controls": False, "rounds": 2, "method": "easier"}
    settings |= options
    return shrink(trained, blobs.train, blobs.val, blobs.test, **settings)


def _scripted(monkeypatch, *values: float) -> None:
    """Let the dense network have 90 % on validation data and the rounds these accuracies."""
    seen = iter(values)
    monkeypatch.setattr("palmette.depth.shrink.summary", lambda _: {"accuracy": 0.9, "n": 120, "interval": [0.0, 1.0]})
    monkeypatch.setattr(
        "palmette.depth.rounds.summary", lambda _: {"accuracy": next(seen), "n": 120, "interval": [0.0, 1.0]}
    )


@pytest.fixture(scope="module")
def whole(trained, blobs, quick, tmp_path_factory):
    """One run with everything in it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    before = copy.deepcopy(trained.state_dict())
    result = _run(
        trained, blobs, quick, controls=True, run_dir=folder, names={"command": "test", "model": "net", "data": "blobs"}
    )
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    return result, folder


def test_the_network_is_physically_smaller(whole, trained) -> None:
    result, _ = whole
    assert type(result.model).__module__ != type(trained).__module__
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in trained.parameters())
    assert result.cost["macs"] < result.dense_cost["macs"]
    assert result.cost["depth"] < result.dense_cost["depth"]
    assert len(result.plan) == 2
    assert result.verification.max_relative_error < 1e-4


def test_every_file_of_the_run_is_there(whole) -> None:
    _, folder = whole
    for name in ("plan.json", "model.safetensors", "model.pt2", "figures.json", "report.html", "environment.json"):
        assert (folder / name).stat().st_size > 0, name


def test_the_rows_hold_dense_shrunk_and_both_controls(whole) -> None:
    result, folder = whole
    figures = json.loads((folder / "figures.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["dense", "shrunk", "dense + same training", "random removal"]
    assert figures["rows"] == json.loads(json.dumps(result.rows))
    assert [row["linearized"] for row in result.rows] == [0, 2, 0, 2]
    for row in figures["rows"]:
        assert row["n"] == 120
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["latency"]
    assert figures["rows"][0]["difference"] is None
    assert figures["split"] == "test"
    assert figures["schema"] == 1
    assert [entry["round"] for entry in figures["rounds"]] == [0, 1]
    assert {"name", "score", "unit", "macs_saved", "ms_saved", "entropy", "round"} <= set(figures["scores"][0])
    assert figures["verification"]["max_relative_error"] < 1e-4
    assert all(merge["done"] for merge in figures["merges"])


def test_the_saved_network_is_the_one_returned(whole, trained) -> None:
    result, folder = whole
    x = torch.randn(5, 8)
    assert torch.equal(load(trained, folder / "model.safetensors").eval()(x), result.model(x))


def test_the_exported_program_agrees(whole) -> None:
    result, folder = whole
    x = torch.randn(5, 8)
    program = torch.export.load(folder / "model.pt2").module()
    torch.testing.assert_close(program(x), result.model(x))


def test_the_same_seed_gives_the_same_network(whole, trained, blobs, quick) -> None:
    result, _ = whole
    again = _run(trained, blobs, quick)
    pairs = zip(again.model.state_dict().values(), result.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again.run_dir is None
    assert again.report is None


def test_resuming_a_finished_run_trains_nothing(whole, trained, blobs, quick, monkeypatch) -> None:
    result, folder = whole
    monkeypatch.setattr("palmette.depth.branch.heal", lambda *_, **__: pytest.fail("trained again"))
    again = _run(
        trained,
        blobs,
        quick,
        controls=True,
        run_dir=folder,
        resume=True,
        names={"command": "test", "model": "net", "data": "blobs"},
    )
    pairs = zip(again.model.state_dict().values(), result.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_folder_in_use_is_not_overwritten(whole, trained, blobs, quick) -> None:
    _, folder = whole
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(RunError):
        _run(trained, blobs, quick, run_dir=folder)
    with pytest.raises(RunError):
        _run(trained, blobs, quick, run_dir=folder, resume=True, seed=3)
    with pytest.raises(RunError, match=r"another config\.network"):
        _run(nn.Sequential(trained, nn.Linear(4, 4)), blobs, quick, controls=True, run_dir=folder, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_when_every_round_costs_too_much_the_dense_network_comes_back(
    trained, blobs, quick, tmp_path, monkeypatch
) -> None:
    _scripted(monkeypatch, 0.5)
    folder = tmp_path / "run"
    result = _run(trained, blobs, quick, max_drop=0.5, patience=1, run_dir=folder, controls=True)
    x = torch.randn(4, 8)
    assert torch.equal(result.model(x), trained(x))
    assert "dense network is returned" in result.message
    assert len(result.plan) == 0
    assert [row["name"] for row in result.rows] == ["dense", "shrunk"]
    assert torch.equal(load(trained, folder / "model.safetensors").eval()(x), trained(x))
    assert result.report is not None


def test_where_nothing_pays_the_dense_network_comes_back(blobs, quick) -> None:
    widths = ((8, 8), (8, 2), (2, 8), (8, 4))  # one Linear 8-8 would cost more than 8-2-8
    layers = [nn.Linear(*pair) for pair in widths]
    bottleneck = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), layers[1], nn.ReLU(), layers[2], nn.Tanh(), layers[3])
    result = shrink(bottleneck, blobs.train, blobs.val, cost="macs", heal=quick, method="easier")
    assert "at a gain" in result.message
    assert len(result.plan) == 0


def test_patience_goes_on_after_a_miss_and_the_deepest_accepted_round_wins(trained, blobs, quick, monkeypatch) -> None:
    _scripted(monkeypatch, 0.9, 0.2, 0.9)
    assert len(_run(trained, blobs, quick, max_drop=1.0, patience=2, rounds=None).plan) == 3


@pytest.mark.parametrize(("values", "edits"), [((0.9, 0.2, 0.2), 1), ((0.2, 0.2, 0.9), 0)])
def test_patience_ends_the_rounds(trained, blobs, quick, monkeypatch, values, edits) -> None:
    _scripted(monkeypatch, *values)
    assert len(_run(trained, blobs, quick, max_drop=1.0, patience=2, rounds=None).plan) == edits


def test_steps_remove_several_candidates_at_once(trained, blobs, quick) -> None:
    result = _run(trained, blobs, quick, rounds=1, step=2)
    assert len(result.plan) == 2


def test_protected_sites_stay(trained, blobs, quick) -> None:
    ranking = _run(trained, blobs, quick, dry_run=True).ranking
    protect = [ranking[0]["name"], ranking[1]["name"]]
    result = _run(trained, blobs, quick, protect=protect, rounds=None)
    assert {edit.site for edit in result.plan}.isdisjoint(protect)
    assert len(result.plan) == 1


def test_all_sites_below_a_protected_path_stay(trained, blobs, quick) -> None:
    result = _run(trained, blobs, quick, protect=["1", "2"], rounds=None)
    assert [edit.site for edit in result.plan] == ["3.mlp.1"]


def test_a_result_prints_dense_beside_shrunk(whole) -> None:
    result, _ = whole
    lines = str(result).splitlines()
    assert lines[0].split()[:2] == ["dense", "shrunk"]
    macs = next(line.split() for line in lines if line.startswith("MACs"))
    assert macs[1:3] == [f"{result.dense_cost['macs']:,}", f"{result.cost['macs']:,}"]
    assert lines[-1] == result.message


def test_rounds_are_said_as_they_are_reported(trained, blobs, quick, tmp_path, monkeypatch) -> None:
    said: list[str] = []
    _scripted(monkeypatch, 0.95, 0.2)
    result = _run(trained, blobs, quick, max_drop=1.0, say=said.append, run_dir=tmp_path / "run")
    assert said[0] == "dense network: 90.00 % on 120 validation samples"
    assert said[1].startswith("round 1: without ")
    assert said[1].endswith("accepted, 5.00 points gained, 1 allowed")
    assert said[2].endswith("missed, 70.00 points lost, 1 allowed")
    assert "limit of 2 rounds was reached" in result.message
    command = json.loads((tmp_path / "run" / "figures.json").read_text())["command"]
    assert command.startswith(
        "palmette.shrink(model, train_loader, val_loader, method='easier', max_drop=1.0, rounds=2"
    )
    assert "heal=HealConfig(epochs=1)" in command


def test_a_limit_of_rounds_is_not_the_reason_for_removing_nothing(trained, blobs, quick, monkeypatch) -> None:
    _scripted(monkeypatch, 0.2)
    result = _run(trained, blobs, quick, max_drop=0.5, rounds=1)
    assert result.message.startswith("Nothing was removed: no round stayed within 0.5 points, and the limit of 1 round")


def test_blocks_are_dropped(trained, blobs, quick) -> None:
    result = _run(trained, blobs, quick, method="block_influence", rounds=1)
    assert [edit.kind for edit in result.plan] == ["drop"]
    assert result.cost["dropped"] == 1


def test_the_papers_form_runs_to_the_end(trained, blobs, quick) -> None:
    result = _run(trained, blobs, quick, reproduce=True, rounds=None)
    assert len(result.plan) == 3
    assert {edit.fit for edit in result.plan} == {"identity"}
    assert result.verification.max_relative_error < 1e-4


def test_the_papers_form_stops_at_the_first_miss(trained, blobs, quick, monkeypatch) -> None:
    _scripted(monkeypatch, 0.9, 0.2, 0.9)
    result = _run(trained, blobs, quick, max_drop=1.0, reproduce=True, rounds=None)
    assert len(result.plan) == 1
    assert "1 round in a row" in result.message


def test_distillation_from_the_dense_network(trained, blobs) -> None:
    result = _run(trained, blobs, HealConfig(epochs=1, lr=1e-2, distill=0.5), rounds=1)
    assert len(result.plan) == 1


def test_a_dry_run_ranks_and_writes_nothing(trained, blobs, quick, tmp_path) -> None:
    result = _run(trained, blobs, quick, dry_run=True, run_dir=tmp_path / "run", rounds=None)
    assert not (tmp_path / "run").exists()
    assert len(result.ranking) == 3
    assert [row["score"] for row in result.ranking] == sorted(row["score"] for row in result.ranking)
    assert result.expected_seconds > 0
    assert "3 candidates pay" in result.message


def test_targets() -> None:
    assert target_ms(None, None) is None
    assert target_ms("0.5x", 4.0) == 2.0
    assert target_ms("3.2ms", 4.0) == 3.2
    for text in ("fast", "2x", "-1ms", "0x", "x"):
        with pytest.raises(InputError):
            target_ms(text, 4.0)
    with pytest.raises(InputError, match="clock"):
        target_ms("0.5x", None)
    with pytest.raises(InputError, match=r"no unit.*0\.5x.*0\.5ms"):
        target_ms("0.5", 4.0)


@pytest.mark.parametrize("method", ["easier", "auto"])
def test_a_target_that_the_dense_network_meets_changes_nothing(trained, blobs, quick, monkeypatch, method) -> None:
    monkeypatch.setattr("palmette.depth.session.Session.clock", lambda session, network: 4.0)
    result = _run(trained, blobs, quick, method=method, target_latency="5ms", rounds=None)
    assert len(result.plan) == 0
    assert "Nothing was removed: the dense network takes 4 ms already, and 5 ms are allowed" in result.message


def test_the_rounds_end_when_the_target_is_reached(trained, blobs, quick, monkeypatch) -> None:
    clocks = iter([4.0, 1.9])
    monkeypatch.setattr("palmette.depth.session.Session.clock", lambda session, network: next(clocks))
    result = _run(trained, blobs, quick, target_latency="0.5x", rounds=None)
    assert len(result.plan) == 1
    assert "target of 2 ms is reached" in result.message


def test_a_wrong_collapse_fails_loudly(trained, blobs, quick, monkeypatch, tmp_path) -> None:
    real = outcome.collapse

    def broken(edited, **options):
        network, record = real(edited, **options)
        next(network.parameters()).data.mul_(1.01)
        return network, record

    monkeypatch.setattr(outcome, "collapse", broken)
    with pytest.raises(VerifyError, match="differs from the edited one"):
        _run(trained, blobs, quick, rounds=1, run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


class Odd(nn.Module):
    """Control flow that depends on values: does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x) if bool((x.sum() > 0).item()) else -self.layer(x)


def _shifted(blobs, shift: int) -> DataLoader:
    x, y = blobs.parts[0][:]
    return DataLoader(TensorDataset(x, y + shift), batch_size=48, shuffle=True, generator=torch.Generator())


def test_bad_input_writes_nothing(trained, blobs, quick, tmp_path) -> None:
    folder = tmp_path / "deep" / "run"
    empty = DataLoader(TensorDataset(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)), batch_size=4)
    nan = DataLoader(TensorDataset(torch.full((96, 8), float("nan")), torch.zeros(96, dtype=torch.long)), batch_size=48)
    linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    cases = [
        (UnknownMethod, "Did you mean 'easier'", dict(method="easer")),
        (InputError, "max_drop=-1", dict(max_drop=-1.0)),
        (InputError, "no site 'nowhere'", dict(protect=["nowhere"])),
        (InputError, "not a target", dict(target_latency="0.5 x x")),
        (InputError, "no paper form", dict(method="random", reproduce=True)),
        (InputError, "no activation to remove", dict(model=linear)),
        (InputError, "no site to remove", dict(model=linear, method="auto")),
        (InputError, "wants a EasierConfig", dict(config=get_method("random").make_config())),
        (InputError, "model is the class Linear", dict(model=nn.Linear)),
        (DataError, r"NoneType is no loader \(at val_loader\)", dict(val=None)),
        (DataError, r"its own iterator \(at train_loader\)", dict(train=iter(blobs.train))),
        (DataError, "empty", dict(train=empty)),
        (DataError, "empty", dict(val=empty)),
        (DataError, "Label", dict(train=_shifted(blobs, 3))),
        (DataError, "Label", dict(val=_shifted(blobs, 3))),
        (TrainingError, "epoch", dict(heal=HealConfig(epochs=1, lr=1e30, clip=None))),
        ((DataError, TrainingError), "finite", dict(calibration_loader=nan)),
    ]
    for kind, text, changes in cases:
        options = {"model": trained, "train": blobs.train, "val": blobs.val, "heal": quick, "cost": "macs"}
        options |= {"method": "easier"} | changes
        model, train, val = (options.pop(name) for name in ("model", "train", "val"))
        with pytest.raises(kind, match=text):
            shrink(model, train, val, run_dir=folder, **options)
        assert not (tmp_path / "deep").exists(), text


def test_a_model_that_does_not_trace_names_the_line(blobs, quick, tmp_path) -> None:
    with pytest.raises(Exception, match=r"test_shrink\.py") as caught:
        shrink(Odd(), blobs.train, blobs.val, heal=quick, run_dir=tmp_path / "run")
    assert type(caught.value).__name__ == "CaptureError"
    assert not (tmp_path / "run").exists()
