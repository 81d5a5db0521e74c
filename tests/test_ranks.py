"""Processes that work together: shares, sums, one voice; two of them, and one that must not notice any of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palmette import ranks
from palmette.errors import RunError, error_from

JOB = Path(__file__).with_name("ranks_job.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found, and their folder."""
    if not hasattr(os, "fork"):
        pytest.skip("the system has no fork")
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, str(JOB), str(folder)], check=True, timeout=120, capture_output=True)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], folder


def test_outside_of_together_each_process_is_alone(found) -> None:
    (first, second), _ = found
    assert first["outside"] == [1, True, 0, [0]]
    assert second["outside"] == [1, True, 1, [1]]


def test_inside_they_are_two_and_the_first_leads(found) -> None:
    (first, second), _ = found
    assert [first[key] for key in ("count", "rank", "leads", "is_first")] == [2, 0, True, True]
    assert [second[key] for key in ("count", "rank", "leads", "is_first")] == [2, 1, False, False]


def test_alone_stays_alone(found) -> None:
    for rank, one in enumerate(found[0]):
        assert one["alone"] == [1, 0, ["a", "b", "c"], [rank], 1]


def test_pieces_are_dealt_out_in_turn(found) -> None:
    assert [one["shard"] for one in found[0]] == [["a", "c", "e"], ["b", "d"]]


def test_values_reach_every_process(found) -> None:
    for one in found[0]:
        assert one["gathered"] == [{"rank": 0, "text": "ä"}, {"rank": 1, "text": "ää"}]
        assert one["from_first"][1:] == [0, 1, float("inf"), 0.1 + 0.2]
    assert found[0][0]["from_first"] == found[0][1]["from_first"]


def test_totals_are_added_up_exactly_also_where_only_one_process_met_a_name(found) -> None:
    for one in found[0]:
        assert one["counts"] == {"a": [2**60 + 6, 2], "only here": [1]}
        assert one["total"] == 0.1 + 0.2
        assert one["empty"] == [{}, 0.0]


def test_totals_of_another_type_are_refused(found) -> None:
    assert all(one["types"][0] == "TypeError" and "float32" in one["types"][1] for one in found[0])


def test_an_error_of_the_first_is_raised_in_all(found) -> None:
    (first, second), _ = found
    assert first["first"] == ["RefusedEdit", "no (at a): b. c", False]
    assert second["first"] == ["RefusedEdit", "no (at a): b. c", True]
    assert first["foreign"][:2] == ["ValueError", "odd"]
    assert second["foreign"] == ["RunError", "A process failed: ValueError: odd", True]


def test_an_error_in_a_share_is_raised_in_all(found) -> None:
    (first, second), _ = found
    assert first["joint"] == ["DataError", "bad batch (at process 1)", True]
    assert second["joint"] == ["DataError", "bad batch", True]
    assert first["joint, all"] == second["joint, all"] == ["DataError", "bad batch", True]


def test_an_error_that_has_nothing_to_do_with_processes_passes(found) -> None:
    assert all(one["unrelated"][:2] == ["RuntimeError", "shapes do not match"] for one in found[0])


def test_a_process_that_ends_is_noticed(found) -> None:
    kind, words, told = json.loads((found[1] / "gone.json").read_text())
    assert (kind, told) == ("RunError", True)
    assert "Another process of this run has ended" in words


def test_stages_of_a_run_are_computed_by_all_and_stored_by_the_first(found) -> None:
    (first, second), folder = found
    assert first["value"] == second["value"] == first["again"] == second["again"]
    assert first["value"][:2] == [0, [0, 1]]
    assert first["timed"] == second["timed"] == 0
    assert (first["who timed"], second["who timed"]) == ([0], [])
    assert json.loads((folder / "run" / "stages" / "both.json").read_text())["value"] == first["value"]
    assert first["environment"] == second["environment"] == 3


def test_the_first_writes(found) -> None:
    run = found[1] / "run"
    assert (run / "own.json").read_text().strip() == "0"
    assert (run / "text").read_text() == "0"
    assert not list(run.rglob(".tmp-*"))


def test_processes_of_different_runs_are_refused(found) -> None:
    for one in found[0]:
        assert one["other"][0] == "RunError"
        assert "The processes were started for different runs: another network" in one["other"][1]
        assert one["used"][0] == "RunError"
        assert "holds a run already" in one["used"][1]


# ---- one process -----------------------------------------------------------------------------------------------------


def test_a_single_process_notices_nothing() -> None:
    with ranks.together():
        assert (ranks.count(), ranks.rank(), ranks.leads()) == (1, 0, True)
        assert list(ranks.shard("abc")) == ["a", "b", "c"]
        value = object()
        assert ranks.from_first(lambda: value) is value
        assert ranks.gathered(value) == [value]
        ranks.wait()
        ranks.add_up([value])  # type: ignore[list-item]
        with pytest.raises(ZeroDivisionError), ranks.joint():
            1 / 0  # noqa: B018


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"])
def test_the_environment_tells_who_is_first_before_the_processes_meet(monkeypatch, name) -> None:
    assert ranks.is_first()
    monkeypatch.setenv(name, "1")
    assert not ranks.is_first()


def test_errors_keep_their_parts_on_the_way() -> None:
    error = RunError("what", where="where", why="why", fix="fix")
    again = error_from(error.to_dict())
    assert (type(again), str(again), again.to_dict()) == (RunError, str(error), error.to_dict())
    assert str(error_from({"type": "Unknown", "what": "x"})) == "x"
