"""The journal of timing decisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from palmette.errors import InputError, PalmetteError, RunError
from palmette.meter import CostTable, macs, table

X = torch.randn(2, 16)
SMALL, LARGE = nn.Linear(16, 4), nn.Linear(16, 2048)


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any measurement from here on fails the test."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(table, "measure_latency", fail)
    monkeypatch.setattr(table, "macs", fail)


slow = pytest.mark.slow
CLOCKS = ["eager", "onnxruntime", "openvino", "macs", *(pytest.param(r, marks=slow) for r in ("compile", "executorch"))]


@pytest.mark.parametrize("runtime", CLOCKS)
def test_what_was_measured_is_journaled_and_looked_up(runtime: str, tmp_path: Path) -> None:
    if runtime in ("openvino", "executorch"):
        pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    path = tmp_path / "costs.json"
    first = CostTable(runtime, path)
    pair = first.compare("merge a", LARGE, SMALL, X)
    single = first.time("a alone", SMALL, X)
    assert pair[0] > pair[1] > 0
    assert single > 0
    assert [p.name for p in tmp_path.iterdir()] == ["costs.json"]
    text = path.read_text()

    again = CostTable(runtime, path)  # a resumed run, with other modules to fall for
    assert again.compare("merge a", SMALL, LARGE, X) == pair
    assert again.time("a alone", LARGE, X) == single
    looked_up = CostTable.stored(path)
    assert looked_up.runtime == runtime
    assert looked_up.compare("merge a", SMALL, LARGE, X) == pair
    assert path.read_text() == text


def test_every_measurement_is_in_the_file_before_it_is_returned(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    costs = CostTable("macs", path)
    for count in range(1, 4):
        costs.compare(f"key {count}", LARGE, SMALL, X)
        assert len(json.loads(path.read_text())["entries"]) == count


def test_milliseconds_carry_their_circumstances(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    CostTable("eager", path, threads=1).compare("key", LARGE, SMALL, X)
    entry = json.loads(path.read_text())["entries"]["key"]
    assert (entry["batch"], entry["threads"], entry["dtype"]) == (2, 1, "float32")
    assert "torch" in entry["hardware"]


def test_macs_are_those_of_the_inputs_as_given() -> None:
    costs = CostTable("macs")
    assert costs.compare("key", LARGE, SMALL, X) == (2 * 16 * 2048, 2 * 16 * 4)
    assert costs.time("other", LARGE, X) == 2 * macs(LARGE, X)


@pytest.mark.usefixtures("no_measuring")
def test_a_stored_table_never_measures_and_names_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"schema": 1, "runtime": "eager", "entries": {"known": {"before": 2.0, "after": 1.0}}}))
    costs = CostTable.stored(path)
    assert costs.compare("known", LARGE, SMALL, X) == (2.0, 1.0)
    with pytest.raises(PalmetteError, match=r"no entry 'layer1\.0 merge'"):
        costs.compare("layer1.0 merge", LARGE, SMALL, X)
    with pytest.raises(PalmetteError, match="no entry 'alone'"):
        costs.time("alone", SMALL, X)
    with pytest.raises(PalmetteError, match="'known' is a comparison"):
        costs.time("known", SMALL, X)


def test_a_time_is_no_comparison() -> None:
    costs = CostTable("macs")
    costs.time("key", SMALL, X)
    with pytest.raises(RunError, match="'key' is no comparison"):
        costs.compare("key", LARGE, SMALL, X)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"schema": 1, "runtime": "eager", "entr',
        "[]",
        '{"schema": 2, "runtime": "eager", "entries": {}}',
        '{"schema": 1}',
    ],
)
def test_a_damaged_file_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    for make in (lambda: CostTable("eager", path), lambda: CostTable.stored(path)):
        with pytest.raises(RunError, match=r"costs\.json"):
            make()
    assert path.read_text() == text


def test_wrong_files_and_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with pytest.raises(RunError, match=r"costs\.json"):
        CostTable.stored(path)
    CostTable("macs", path).time("key", SMALL, X)
    with pytest.raises(RunError, match="for 'macs', not for 'eager'"):
        CostTable("eager", path)
    with pytest.raises(InputError, match="'abacus'"):
        CostTable("abacus")
