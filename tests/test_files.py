"""Files are whole or absent."""

from __future__ import annotations

import math
import os

import pytest

from palmette.errors import RunError
from palmette.files import atomic_path, read_bytes, read_json, remove_leftovers, write_atomic, write_json


def test_text_and_bytes_are_written(tmp_path):
    write_atomic(tmp_path / "a" / "b.txt", "größer")
    write_atomic(tmp_path / "c.bin", b"\x00\xff")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "größer"
    assert read_bytes(tmp_path / "c.bin") == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b.txt", "c.bin"]


def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_text("old")
    seen = []

    def write():
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            seen.append(temporary)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert (seen[0].parent, seen[0].suffix) == (tmp_path, ".onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert file.read_text() == "old"


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with atomic_path(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written.*file.inner"):
        write_atomic(tmp_path / "file" / "inner", "x")


def test_a_writer_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(RunError, match="missing"):
        with atomic_path(tmp_path / "missing"):
            pass


def test_json_round_trips_floats_exactly(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.pi, 1e22, math.inf]
    write_json(tmp_path / "x.json", {"values": values})
    assert [value.hex() for value in read_json(tmp_path / "x.json")["values"]] == [value.hex() for value in values]


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(RunError, match=r"x\.json"):
        write_json(tmp_path / "x.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b'{"a": [1, 2', b"\xff\xfe\x00"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RunError, match=r"damaged.*x\.json"):
        read_json(tmp_path / "x.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RunError, match=r"cannot be read.*nowhere\.json"):
        read_json(tmp_path / "nowhere.json")


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "kept.json").write_text("{}")
    child = os.fork()
    if child == 0:
        with atomic_path(tmp_path / "sub" / "x.json") as temporary:
            temporary.write_text("half")
            os._exit(0)  # as abrupt as a kill: no clean-up runs
    os.waitpid(child, 0)
    assert len(list((tmp_path / "sub").iterdir())) == 2
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["kept.json"]
