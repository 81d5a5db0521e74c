"""Two processes of one run get the scores, fits, evaluations, trials and the plan of a single one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palmette.registry import methods

JOB = Path(__file__).with_name("two_processes.py")
METHODS = [method.name for method in methods("depth")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found, and what a single one does."""
    if not hasattr(os, "fork"):
        pytest.skip("the system has no fork")
    folder, own = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    command = [sys.executable, str(JOB), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as two:
        spec = importlib.util.spec_from_file_location("two_processes", JOB)
        job = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(job)
        one = json.loads(json.dumps(job.work(own)))
        said, _ = two.communicate(timeout=200)
    assert two.returncode == 0, said.decode()[-3000:]
    return one, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_those_of_one_process(found, name) -> None:
    one, two = found
    keys = [key for key in one["scores"] if key.startswith(f"{name} ")]
    assert keys
    assert two[0]["scores"] == two[1]["scores"]
    for key in keys:
        assert two[0]["scores"][key] == pytest.approx(one["scores"][key], rel=1e-12, abs=1e-13), key


def test_counts_are_exact(found) -> None:
    one, two = found
    for key in ("easier {}", "easier {'position_first': False}"):
        assert two[0]["scores"][key] == one["scores"][key]


def test_fits_are_those_of_one_process(found) -> None:
    one, two = found
    assert two[0]["fit"] == two[1]["fit"]
    for site, numbers in one["fit"].items():
        for ours, theirs in zip(two[0]["fit"][site], numbers, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-13)
    assert two[0]["residual"] == pytest.approx(one["residual"], rel=1e-11)
    assert two[0]["positions"] == two[1]["positions"] == one["positions"] == 48 * 36


def test_batches_are_dealt_out_and_not_seen_twice(found) -> None:
    one, two = found
    assert [result["batches"] for result in (one, *two)] == [3, 3, 3]
    assert [result["own batches"] for result in (one, *two)] == [3, 2, 1]


def test_evaluations_are_bit_for_bit_those_of_one_process(found) -> None:
    one, two = found
    assert two[0]["evaluations"] == two[1]["evaluations"] == one["evaluations"]
    assert [evaluation["n"] for evaluation in one["evaluations"]] == [48, 48]
    assert one["evaluations"][0]["accuracy"] == 1 > one["evaluations"][1]["accuracy"]


def test_trials_are_dealt_out_and_each_is_done_alone(found) -> None:
    one, two = found
    assert two[0]["trials"] == two[1]["trials"] == two[0]["again"] == two[1]["again"] == one["trials"] == one["again"]
    assert [result["own trials"] for result in (one, *two)] == [5, 3, 2]
    assert {value["processes"] for value in one["trials"].values()} == {1}


def test_shrink_finds_the_plan_of_one_process(found) -> None:
    one, two = (found[0]["shrunk"], [result["shrunk"] for result in found[1]])
    assert two[0] == two[1], "both processes hold the same network and figures"
    assert two[0]["ranking"] == one["ranking"]
    edits = [result["plan"]["edits"] for result in (one, two[0])]
    assert len(edits[0]) == 1
    for ours, theirs in zip(edits[1], edits[0], strict=True):
        assert {k: ours[k] for k in ("kind", "site", "fit")} == {k: theirs[k] for k in ("kind", "site", "fit")}
        for key in ("slope", "offset"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-12, abs=1e-13)
    for key in ("depth", "macs", "params"):
        assert two[0]["rows"][1][key] == one["rows"][1][key] < one["rows"][0][key]


def test_training_is_shared_too(found) -> None:
    one, two = (found[0]["shrunk"], found[1][0]["shrunk"])
    assert one["state"].keys() == two["state"].keys()
    assert one["state"] != two["state"], "half the steps, of twice the samples"
