"""The archive of measured networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palmette.errors import InputError, RunError
from palmette.supernet.archive import Archive, Measured

ABOUT = {"space": "MOOFA", "metric": "moofa"}


def test_an_archive_comes_back_from_its_file(tmp_path):
    path = tmp_path / "new" / "archive.jsonl"
    archive = Archive(path, ABOUT)
    assert len(archive) == 0
    assert archive.best() is None
    archive.add(Measured("a", 0.7, 100), Measured("b", 0.72, 90))
    archive.add(Measured("c", 1 / 3, 10))
    again = Archive(path, ABOUT)
    assert list(again) == list(archive)
    assert again.get("c") == Measured("c", 1 / 3, 10)
    assert again.get("d") is None
    assert [entry.network for entry in again.front()] == ["c", "b"]


def test_the_last_measurement_of_a_network_counts(tmp_path):
    archive = Archive(tmp_path / "a.jsonl", ABOUT)
    archive.add(Measured("a", 0.9, 5))
    archive.add(Measured("a", 0.6, 5))
    assert [entry.value for entry in Archive(archive.path, ABOUT)] == [0.6]


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 5), st.integers(0, 9)), min_size=1))
def test_a_looser_budget_is_never_worse(tmp_path_factory, rows):
    archive = Archive(tmp_path_factory.mktemp("archive") / "a.jsonl", ABOUT)
    archive.add(*(Measured(name, value, peak) for name, value, peak in rows))
    found = [archive.best(budget) for budget in range(10)]
    values = [entry.value if entry else -1 for entry in found]
    assert values == sorted(values)
    assert all(entry is None or entry.peak <= budget for budget, entry in enumerate(found))
    assert archive.best() == found[-1]
    assert {entry for entry in found if entry} == set(archive.front())


def test_an_archive_of_something_else_is_refused(tmp_path):
    Archive(tmp_path / "a.jsonl", ABOUT).add(Measured("a", 0.5, 1))
    with pytest.raises(InputError, match=r"about something else .*a\.jsonl.*'moofa'.*'bytes'"):
        Archive(tmp_path / "a.jsonl", ABOUT | {"metric": "bytes"})


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (1, "{"), (1, "[]"), (3, '{"network": "b", "va'), (3, "7"), (3, '{"network": "b", "value": 1}'),
        (2, '{"network": "b", "value": "x", "peak": 1}'), (3, '{"network": "b", "value": 1, "peak": null}'),
        (2, "\xff"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, number, line):
    path = tmp_path / "a.jsonl"
    Archive(path, ABOUT).add(Measured("a", 0.5, 1), Measured("b", 0.6, 2))
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(RunError, match=rf"damaged .*a\.jsonl, line {number}.*Delete that line"):
        Archive(path, ABOUT)


def test_an_empty_file_is_damaged(tmp_path):
    path = tmp_path / "a.jsonl"
    path.touch()
    with pytest.raises(RunError, match="line 1"):
        Archive(path, ABOUT)


@pytest.mark.parametrize(("value", "peak"), [(float("nan"), 1), (float("inf"), 1), (0.5, -1)])
def test_what_is_no_measurement_is_not_stored(tmp_path, value, peak):
    archive = Archive(tmp_path / "a.jsonl", ABOUT)
    with pytest.raises(InputError, match="no measurement"):
        archive.add(Measured("a", 0.5, 1), Measured("b", value, peak))
    assert not archive.path.exists()
    assert len(archive) == 0


def test_numbers_of_numpy_are_stored_as_plain_ones(tmp_path):
    archive = Archive(tmp_path / "a.jsonl", ABOUT)
    archive.add(Measured("a", np.float64(0.5), np.int64(7)))
    assert json.loads(archive.path.read_text().splitlines()[1]) == {"network": "a", "value": 0.5, "peak": 7}
