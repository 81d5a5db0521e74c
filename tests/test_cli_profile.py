"""`palmette profile`: a table, resumed or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from palmette.cli import main
from palmette.supernet import latency
from palmette.supernet.latency import LatencyTable


@pytest.fixture(autouse=True)
def stored_times(monkeypatch):
    """No clock: times follow the number of parameters."""

    def sizes(models, *_, **__):
        return {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}

    monkeypatch.setattr(latency, "runners", sizes)
    monkeypatch.setattr(latency, "_rounds", lambda passes, _: {k: [0.1 + 1e-4 * n] * 3 for k, n in passes.items()})


def run(*arguments: object) -> int:
    """Exit code of one command in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in ("profile", "-m", "palmette:digits-resnet", "--image-size", 8, *arguments)])
    return int(caught.value.code or 0)


def test_a_table_is_made_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.json"
    options = ("--runtime", "eager", "--count", 16, "--out", file)
    assert run(*options) == 0
    said = capsys.readouterr().out
    assert "16 of 16 networks" in said
    assert "Kendall's tau" in said
    table = LatencyTable.load(file)
    assert (table.device.runtime, table.device.threads, len(table.rows)) == ("eager", 1, 16)
    assert run(*options) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(*options, "--resume") == 0
    assert LatencyTable.load(file) == table


def test_what_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--count", 3, "--runtime", "eager", "--out", tmp_path / "t.json") == 2
    assert run("--runtime", "abacus", "--out", tmp_path / "t.json") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "abacus" in lines[1]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["profile", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for word in ("latency table", "onnxruntime", "--resume", "--seconds"):
        assert word in said
