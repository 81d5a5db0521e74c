"""Healing with data parallelism over two processes: they agree, and an interrupted run ends like a whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palmette.train import load_checkpoint

JOB = Path(__file__).with_name("two_processes.py")


def launch(case: str, folder: Path, *arguments: str) -> int:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(JOB), case, str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, timeout=200, check=False).returncode


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_two_processes_agree_and_resume(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert launch("plain", whole) == 0
    found = [json.loads((whole / f"outcome-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["steps"] == 9  # 60 samples, two processes, batches of 10, three epochs
    assert launch("plain", broken, "5") != 0
    assert load_checkpoint(broken / "state.safetensors")[1]["place"] == {
        "epoch": 1, "step": 0, "loss_sum": 0.0, "samples": 0,
    }  # fmt: skip
    assert launch("plain", broken) == 0
    assert (broken / "state.safetensors").read_bytes() == (whole / "state.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_two_processes_fade_a_plan_in_and_resume(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert launch("fading", whole) == 0
    found = [json.loads((whole / f"outcome-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["steps"] == 9
    assert launch("fading", broken, "7") != 0  # four steps fade; the epoch of step 7 begins after the sixth
    assert load_checkpoint(broken / "state.safetensors")[1]["place"]["epoch"] == 2
    assert launch("fading", broken) == 0
    for name in ("state.safetensors", "state-fade.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize(("case", "steps", "faded"), [("sampler", 9, 4), ("left-over", 6, 2)])
def test_a_fade_has_the_steps_of_one_process(tmp_path, case, steps, faded):
    assert launch(case, tmp_path) == 0
    found = json.loads((tmp_path / "outcome-0.json").read_text())
    assert found["steps"] == steps
    assert found["faded"] == [[faded], [faded]]  # planned, and done when the edits were made
