"""Independent trials: journaled one by one, the same here and on Ray; after an interruption only what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from palmette.depth.auto import search
from palmette.depth.battery import specimen
from palmette.depth.opening import Loaders, opened
from palmette.depth.session import Settings
from palmette.errors import MissingDependency, RefusedEdit, RunError
from palmette.graph import capture
from palmette.train import HealConfig
from palmette.train.spread import Spread
from palmette.trials import Journal, connect, run_trials

JOB = Path(__file__).with_name("trials_job.py")


@pytest.fixture(scope="module")
def job():
    """The trials, as a module that workers can import too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(JOB.parent))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(JOB.parent), os.environ.get("PYTHONPATH", "")]))
        yield importlib.import_module("trials_job")


@pytest.fixture(scope="module")
def ray(job):
    """A Ray of two workers, started once."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    yield connect("local", cpus=2)
    import ray

    ray.shutdown()


@pytest.fixture(params=["here", "ray"])
def where(request):
    """Whether the trials run in this process, or on Ray."""
    if request.param == "here":
        return None
    request.getfixturevalue("ray")
    return "local"


def draws(found: dict) -> dict:
    return {key: (value["item"], value["draw"]) for key, value in found.items()}


def test_values_are_those_of_each_trial_alone_whatever_the_order(job, where, tmp_path) -> None:
    found = run_trials(job.draw, job.ITEMS, journal=tmp_path / "all", seed=4, ray=where)
    assert list(found) == list(job.ITEMS)
    backwards = run_trials(job.draw, dict(reversed(job.ITEMS.items())), journal=tmp_path / "backwards", seed=4)
    assert draws(found) == draws(backwards)
    assert len({tuple(value["draw"]) for value in found.values()}) == len(job.ITEMS)
    other = run_trials(job.draw, job.ITEMS, journal=tmp_path / "other", seed=5)
    assert draws(found) != draws(other)


def test_what_is_journaled_is_not_computed_again(job, where, tmp_path) -> None:
    log, said = tmp_path / "log", list[str]()
    trial = partial(job.draw, log=str(log))
    some = dict(list(job.ITEMS.items())[:4])
    first = run_trials(trial, some, journal=tmp_path / "journal", ray=where)
    found = run_trials(trial, job.ITEMS, journal=tmp_path / "journal", ray=where, label="seeds", say=said.append)
    assert sorted(log.read_text().split()) == ["0", "1", "2", "3", "4", "5"]
    assert {key: found[key] for key in some} == first
    assert said == ["seeds: 4 of 6 are done already"]
    assert run_trials(trial, job.ITEMS, journal=tmp_path / "journal", ray=where, say=said.append) == found
    assert len(log.read_text().split()) == 6
    assert len(said) == 1


def test_a_refused_trial_is_named_and_the_others_stay(job, where, tmp_path) -> None:
    with pytest.raises(RefusedEdit, match=r"it cannot be done \(at trial 'seed 2/a', site\): reasons. Leave it out."):
        run_trials(job.refuse, job.ITEMS, journal=tmp_path, ray=where)
    assert Journal(tmp_path).read("seed 2/a") == (False, None)
    assert any(Journal(tmp_path).read(key) == (True, None) for key in job.ITEMS)


@pytest.mark.parametrize(("trial", "why"), [("crash", "ZeroDivisionError"), ("nothing", "object is no JSON value")])
def test_any_other_failure_is_named(job, where, tmp_path, trial, why) -> None:
    with pytest.raises(RunError, match=why) as raised:
        run_trials(getattr(job, trial), {"only": 0}, journal=tmp_path, ray=where)
    assert "trial 'only'" in str(raised.value)


def test_captured_networks_travel(job, where, tmp_path) -> None:
    inputs = torch.randn(3, 4)
    networks = [capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), inputs).eval() for _ in range(2)]
    trial = partial(job.outputs, network=networks[0], inputs=inputs)
    found = run_trials(trial, {"shared": None, "own": networks[1]}, journal=tmp_path, ray=where)
    for key, network in zip(("shared", "own"), networks, strict=True):
        assert found[key] == network(inputs).flatten().tolist()


@pytest.mark.slow
def test_auto_finds_the_same_plan_on_ray(ray, tmp_path) -> None:
    here, there = (found_by_auto(tmp_path / str(where), where) for where in (None, "local"))
    assert there == here
    assert len(here["table"]) > 3
    assert len(json.loads(here["plan"])["edits"]) > 0


def found_by_auto(folder: Path, where: str | None) -> dict:
    """The importance table of `auto`, the front, and the plan of the point that it heals."""
    model, loader = specimen()
    with opened(
        Loaders(loader, loader),
        model=model,
        example_inputs=None,
        method="auto",
        config=None,
        settings=Settings(max_drop=100.0, rounds=1),
        heal=HealConfig(epochs=1, lr=1e-3),
        run_dir=folder,
        resume=False,
        cost="macs",
        protect=(),
        loss_fn=None,
        metric=None,
        names={},
        spread=Spread(ray=where),
    ) as session:
        found = search(session, {"accuracy": 1.0}, lambda _: None)
        table = {file.name: file.read_bytes() for file in session.run.path("importance").iterdir()}
        return {
            "table": table,
            "plan": found.branch.at(found.winner).plan.to_json(),
            "scores": found.first_scores,
            "rounds": [entry.to_dict() for entry in found.rounds],
        }


# ---- Ray alone -------------------------------------------------------------------------------------------------------


def test_workers_share_the_work_with_one_thread_each(job, ray, tmp_path) -> None:
    found = run_trials(partial(job.draw, pause=0.3), job.ITEMS, journal=tmp_path, ray="local")
    assert len({value["process"] for value in found.values()} - {os.getpid()}) == 2
    assert {value["threads"] for value in found.values()} == {1}
    wide = run_trials(job.draw, {"wide": 1}, journal=tmp_path, ray="local", cpus_per_trial=2)
    assert wide["wide"]["threads"] == 2


@pytest.mark.slow
def test_a_worker_that_dies_is_named(job, ray, tmp_path) -> None:
    with pytest.raises(RunError, match=r"A worker failed \(at trial 'only'\): "):
        run_trials(job.die, {"only": 0}, journal=tmp_path, ray="local")


@pytest.mark.slow
def test_a_driver_killed_in_the_middle_goes_on_with_what_is_missing(job, ray, tmp_path) -> None:
    journal, log = tmp_path / "journal", tmp_path / "log"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, str(JOB), str(journal), str(log), address]
    with subprocess.Popen(command) as driver:
        deadline = time.monotonic() + 120
        while len(list(journal.glob("[!.]*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    kept = {file.name: file.read_bytes() for file in journal.glob("[!.]*.json")}
    assert 2 <= len(kept) < 6
    log.unlink()
    found = run_trials(partial(job.draw, log=str(log)), job.ITEMS, journal=journal, ray="local")
    assert len(log.read_text().split()) == 6 - len(kept)
    assert draws(found) == draws(run_trials(job.draw, job.ITEMS, journal=tmp_path / "here"))
    for name, content in kept.items():
        assert (journal / name).read_bytes() == content


# ---- the journal -----------------------------------------------------------------------------------------------------


def test_an_interrupted_search_goes_on_with_what_is_missing(tmp_path) -> None:
    done: list[int] = []
    stops = iter([True])

    def trial(item: int) -> int:
        if item == 3 and next(stops, False):
            raise KeyboardInterrupt
        done.append(item)
        return item

    items = {str(number): number for number in range(6)}
    with pytest.raises(KeyboardInterrupt):
        run_trials(trial, items, journal=tmp_path)
    assert run_trials(trial, items, journal=tmp_path) == items
    assert done == [0, 1, 2, 3, 4, 5]


def test_names_that_look_alike_have_files_of_their_own(tmp_path) -> None:
    journal = Journal(tmp_path)
    keys = ["a/b", "a b", "a-b", "A-b", "é", "", "." * 300, "../x", "x" * 300, "x" * 301]
    files = [journal.file(key) for key in keys]
    assert len({file.name.lower() for file in files}) == len(keys)
    for number, key in enumerate(keys):
        journal.write(key, number)
    assert [journal.read(key) for key in keys] == [(True, number) for number in range(len(keys))]
    assert all(file.parent == tmp_path for file in files)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "other", "value": 1}', '{"key": "a"}'])
def test_a_damaged_entry_is_named(tmp_path, text) -> None:
    journal = Journal(tmp_path)
    journal.file("a").write_text(text)
    with pytest.raises(RunError, match="damaged"):
        run_trials(lambda _: 1, {"a": 1}, journal=tmp_path)


def test_floats_are_exact_and_tuples_become_lists(tmp_path) -> None:
    found = run_trials(lambda item: (item, [item / 3]), {"a": 0.1}, journal=tmp_path)
    assert found == {"a": [0.1, [0.1 / 3]]}
    assert found == run_trials(lambda _: 1 / 0, {"a": 0.1}, journal=tmp_path)
    assert json.loads(next(tmp_path.glob("*.json")).read_text()) == {"key": "a", "value": [0.1, [0.1 / 3]]}


def test_random_states_are_left_as_they_were(tmp_path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run_trials(lambda _: float(torch.rand(())), {"a": 0}, journal=tmp_path)
    assert torch.equal(torch.rand(2), expected)


def test_no_trials_need_no_ray(tmp_path) -> None:
    assert run_trials(lambda _: 1, {}, journal=tmp_path, ray="nowhere:1") == {}


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"palmette\[ray\]"):
        run_trials(lambda _: 1, {"a": 1}, journal=tmp_path, ray="local")
