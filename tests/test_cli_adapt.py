"""`palmette adapt` and what else of the command line concerns it: runs, resumed or refused, `measure --training`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from palmette.cli import main
from palmette.models import build
from palmette.ondevice import session
from palmette.resolve import load_weights

MLP = ("-m", "palmette:mlp", "-d", "digits")


def run(*arguments: object) -> int:
    """Exit code of one command in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def adapt(folder: Path, *arguments: object) -> int:
    """Exit code of `palmette adapt` on a small network, two epochs unless it is told otherwise."""
    given = ("--epochs", "2") if "--epochs" not in arguments else ()
    return run("adapt", *MLP, "--run", folder, *given, *arguments)


def figures_of(folder: Path) -> dict:
    return json.loads((folder / "figures.json").read_text())


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights for palmette:mlp."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "mlp.safetensors"
    save_file(build("mlp", shape=(1, 8, 8)).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory) -> Path:
    """A run folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ("--budget", "24KiB", "--method", "asi", "--lr", "0.1", "--optimizer", "momentum")
    assert adapt(folder, "-w", weights, *options) == 0
    return folder


def test_a_run_leaves_a_folder_that_says_all_of_it(finished, weights) -> None:
    found = figures_of(finished)
    assert found["kind"] == "adapt"
    assert found["bytes"]["measured"] == found["bytes"]["predicted"] <= 24 * 1024 < found["bytes"]["vanilla"]
    assert found["bytes"]["measured_at_end"] <= 24 * 1024
    assert found["bytes"]["vanilla_measured"] == found["bytes"]["vanilla"]
    assert found["peak"]["adapted"] < found["peak"]["vanilla"]
    assert sum(row["after"] for row in found["layers"]) == sum(row["bytes"] for row in found["holders"]["after"])
    assert {row["codec"] for row in found["layers"]} == {"", "asi"}
    accuracy = found["accuracy"]
    assert (accuracy["split"], accuracy["after"]["n"]) == ("test", 360)
    assert accuracy["after"]["accuracy"] > accuracy["before"]["accuracy"] + 0.1
    low, high = accuracy["after"]["interval"]
    assert low < accuracy["after"]["accuracy"] < high
    assert [entry["epoch"] for entry in found["history"]] == [0, 1]
    assert json.loads((finished / "plan.json").read_text())["method"] == "asi"
    assert json.loads((finished / "environment.json").read_text())["command"].startswith("palmette")
    network = build("mlp", shape=(1, 8, 8))
    load_weights(network, finished / "model.safetensors")
    assert not torch.equal(next(network.parameters()), load_file(weights)[next(iter(network.state_dict()))])


def test_its_weights_are_read_by_the_next_command(finished, tmp_path, capsys) -> None:
    options = ("--budget", "8KiB", "--epochs", "0", "-w", finished / "model.safetensors")
    assert adapt(tmp_path / "next", *options) == 0
    reached = figures_of(finished)["accuracy"]["after"]["accuracy"]
    found = figures_of(tmp_path / "next")["accuracy"]
    assert found["before"]["accuracy"] == found["after"]["accuracy"] == reached
    printed = capsys.readouterr().out
    assert re.search(r"kept for backward, measured +[\d.]+ KiB", printed)
    assert f"{100 * reached:.2f} %" in printed
    assert "report.html" in printed


def test_the_report_is_drawn_again(finished, capsys) -> None:
    report = finished / "report.html"
    first = report.read_bytes()
    report.unlink()
    assert run("report", finished) == 0
    assert report.read_bytes() == first


@pytest.mark.parametrize("method", ["auto", "medyate"])
def test_an_interrupted_run_ends_in_the_same_weights(method, weights, tmp_path, monkeypatch) -> None:
    options = ("-w", weights, "--budget", "80KiB", "--method", method, "--optimizer", "momentum", "--epochs", "3")
    assert adapt(tmp_path / "whole", *options) == 0
    save, saved = session.save_checkpoint, []

    def interrupted(*arguments: object) -> None:
        save(*arguments)
        saved.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "save_checkpoint", interrupted)
    assert adapt(tmp_path / "cut", *options) == 130
    monkeypatch.setattr(session, "save_checkpoint", save)
    assert len(saved) == 1
    assert adapt(tmp_path / "cut", *options) == 2
    assert adapt(tmp_path / "cut", *options, "--lr", "0.2", "--resume") == 2
    assert adapt(tmp_path / "cut", *options, "--resume") == 0
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    figures = [figures_of(tmp_path / name) for name in ("whole", "cut")]
    for key in ("history", "accuracy", "bytes", "layers"):
        assert figures[0][key] == figures[1][key]
    assert adapt(tmp_path / "cut", *options, "--resume") == 0


def test_a_dry_run_writes_nothing(weights, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    assert adapt(folder, "-w", weights, "--budget", "16KiB", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "Who holds what" in printed
    assert "nothing was trained or written" in printed
    assert list(tmp_path.iterdir()) == []


def test_other_scopes_and_optimizers(weights, tmp_path) -> None:
    options = ("--scope", "saved+gradients+optimizer", "--optimizer", "adam", "--epochs", "1")
    assert adapt(tmp_path / "run", "-w", weights, *options, "--budget", "256KiB") == 0
    found = figures_of(tmp_path / "run")
    assert found["bytes"]["measured"] + 3 * found["gradients"]["adapted"] <= 256 * 1024
    assert "Within the budget" in (tmp_path / "run" / "report.html").read_text()


def test_a_network_with_batch_norms_and_factors(tmp_path, capsys) -> None:
    model = ("adapt", "-m", "palmette:digits-mobile", "-d", "digits", "--epochs", "1", "--batch-size", "16")
    assert run(*model, "--run", tmp_path / "norms", "--no-freeze-bn", "--method", "lossless") == 0
    assert figures_of(tmp_path / "norms")["freeze_bn"] is False
    assert adapt(tmp_path / "wasi", "--method", "wasi", "--budget", "24KiB", "-o", "weight_energy=0.8") == 0
    found = figures_of(tmp_path / "wasi")
    assert found["options"]["weight_energy"] == 0.8
    assert any(row["trained"] == "in factors" for row in found["layers"])
    load_weights(build("mlp", shape=(1, 8, 8)), tmp_path / "wasi" / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--budget", "soon"), "'soon' is not an amount of memory"),
        (("--budget", "100B"), "the smallest for this model"),
        (("--method", "asy"), "Did you mean 'asi'?"),
        (("--method", "egp"), "'egp' is a method of palmette shrink"),
        (("--option", "energy=0.5"), "has no options"),
        (("--method", "asi", "--option", "enrgy=0.5"), "Did you mean 'energy'?"),
        (("--method", "asi", "--option", "energy=2"), "energy=2"),
        (("--lr", "-1"), "lr = -1.0"),
        (("--lr", "1e30", "--clip", "1e30"), "epoch 0"),
        (("--method", "wasi", "--budget", "24KiB", "--optimizer", "adam"), "plain SGD"),
        (("--device", "abacus"), "no device 'abacus'"),
        (("-d", "nowhere"), "nowhere"),
        (("-w", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, says, tmp_path, capsys) -> None:
    folder = tmp_path / "deep" / "run"
    assert adapt(folder, *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("palmette: ")
    assert says in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_shrink_refuses_methods_of_adapt(tmp_path, capsys) -> None:
    assert run("shrink", *MLP, "--method", "asi", "--run", tmp_path / "run") == 2
    assert "'asi' is a method of palmette adapt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_method_is_answered_with_those_of_adapt(tmp_path, capsys) -> None:
    assert adapt(tmp_path / "run", "--method", "trad") == 2
    printed = capsys.readouterr().err
    assert "Did you mean 'trady'?" in printed
    assert "easier" not in printed


def test_a_folder_that_holds_a_run_is_left_alone(finished, capsys) -> None:
    before = (finished / "figures.json").read_bytes()
    assert adapt(finished, "--budget", "24KiB") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (finished / "figures.json").read_bytes() == before


def test_measure_says_what_training_keeps(capsys) -> None:
    assert run("measure", *MLP, "--training", "--batch", "8") == 0
    assert "Held for backward              26 KiB" in capsys.readouterr().out
