"""Run folders: made once, taken up again, never mixed up."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from palmette.errors import RunError
from palmette.run import Run, environment, first_difference


def test_a_new_run_says_what_and_where(tmp_path):
    run = Run(
        tmp_path / "a" / "b", resume=False, command="palmette shrink", config={"lr": 0.1, "sizes": (1, 2)}, seed=3
    )
    stored = json.loads((run.folder / "run.json").read_text())
    assert stored == {"schema": 1, "seed": 3, "config": {"lr": 0.1, "sizes": [1, 2]}}
    recorded = json.loads((run.folder / "environment.json").read_text())
    assert recorded == run.environment
    assert recorded["command"] == "palmette shrink"
    assert recorded["versions"]["torch"] == torch.__version__
    assert recorded["hardware"]["cores"] == os.cpu_count()
    assert recorded["threads"] == torch.get_num_threads()


def test_a_stage_is_computed_once_and_exactly(tmp_path):
    values = {"x": [0.1, 1 / 3, 1e-320], "y": np.float32(0.1), "z": np.arange(2), "p": Path("q"), "t": (1, 2)}
    calls = []

    def stage():
        calls.append(1)
        return values

    first = Run(tmp_path).once("round/score", stage)
    again = Run(tmp_path, resume=True).once("round/score", stage)
    assert calls == [1]
    assert first == again == {"x": values["x"], "y": float(np.float32(0.1)), "z": [0, 1], "p": "q", "t": [1, 2]}


def test_a_stage_draws_the_same_whatever_came_before_and_leaves_no_trace(tmp_path):
    def stage():
        return [random.random(), float(np.random.rand()), torch.rand(1).item()]  # noqa: NPY002

    first = Run(tmp_path / "a", seed=1).once("s", stage)
    torch.rand(5)
    state = torch.get_rng_state()
    second = Run(tmp_path / "b", seed=1)
    assert second.once("s", stage) == first
    assert second.once("t", stage) != first
    assert Run(tmp_path / "c", seed=2).once("s", stage) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failing_stage_is_not_stored(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run.once("s", lambda: 1 / 0)
    assert not run.done("s")
    assert run.once("s", lambda: 2) == 2
    assert run.done("s")
    with pytest.raises(RunError, match="result of stage 'bad'"):
        run.once("bad", lambda: {1j})


@pytest.mark.parametrize("content", ['{"stage": "s", "va', "[]", ""])
def test_a_damaged_stage_is_named(tmp_path, content):
    run = Run(tmp_path)
    run.once("s", lambda: 1)
    (tmp_path / "stages" / "s.json").write_text(content)
    with pytest.raises(RunError, match=r"damaged.*s\.json"):
        run.once("s", lambda: 1)


def test_an_existing_run_needs_resume(tmp_path):
    Run(tmp_path, config={"a": 1})
    with pytest.raises(RunError, match=r"holds a run already.*--resume"):
        Run(tmp_path, config={"a": 1})
    Run(tmp_path, resume=True, config={"a": 1})


@pytest.mark.parametrize(
    ("config", "seed", "name"), [({"a": {"b": 2}}, 0, "config.a.b"), ({"a": {"b": 1}}, 1, "seed"), ({}, 0, "config.a")]
)
def test_a_run_of_other_options_is_not_resumed(tmp_path, config, seed, name):
    Run(tmp_path, config={"a": {"b": 1}})
    with pytest.raises(RunError, match=f"another {name} "):
        Run(tmp_path, resume=True, config=config, seed=seed)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_things_is_left_alone(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        Run(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_killed_before_it_began_can_be_resumed(tmp_path):
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".tmp-0a0b-run.json").write_text('{"sche')
    Run(tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "environment.json", "run.json"]


def test_a_place_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(RunError, match="run folder cannot be"):
            Run(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="cannot be written"):
        Run(tmp_path / "x")


def test_a_damaged_run_file_is_named(tmp_path):
    Run(tmp_path)
    (tmp_path / "run.json").write_text('{"schema"')
    with pytest.raises(RunError, match=r"damaged.*run\.json"):
        Run(tmp_path, resume=True)


def test_paths_stay_inside(tmp_path):
    run = Run(tmp_path / "r")
    assert run.path("a/b.json").parent.is_dir()
    for name in ("../x", "/etc/x", "", "."):
        with pytest.raises(RunError, match="not the name of a file"):
            run.path(name)


def test_two_processes_do_not_share_a_folder(tmp_path):
    run = Run(tmp_path)
    code = f"from palmette.run import Run; Run({str(tmp_path)!r}, resume=True)"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "in use by another process" in refused.stderr
    run.close()
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_environment_on_resume_is_recorded(tmp_path, monkeypatch):
    Run(tmp_path, command="first")
    assert "resumed" not in Run(tmp_path, resume=True, command="second").environment
    monkeypatch.setattr("palmette.run.torch.get_num_threads", lambda: 77)
    resumed = Run(tmp_path, resume=True, command="third").environment
    assert resumed["command"] == "first"
    assert [entry["threads"] for entry in resumed["resumed"]] == [77]
    assert Run(tmp_path, resume=True).environment == resumed


def test_environment_names_the_processor():
    assert environment()["hardware"]["processor"]


def test_first_difference():
    assert first_difference({"a": [1], "b": {"c": 1}}, {"a": [1], "b": {"c": 1}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", 1, 2)
    assert first_difference({"a": 1, "b": 1}, {"a": 1}) == ("b", 1, None)
    assert first_difference(1, 2) == ("value", 1, 2)
