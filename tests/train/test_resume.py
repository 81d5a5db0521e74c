"""Healing, killed at random moments and resumed until it is done, ends with the bytes of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from palmette.train.checkpoint import load_checkpoint

JOB = Path(__file__).with_name("kill_job.py")
CASES = (
    "sgd",
    "adamw",
    "sgd-distil-workers",
    "adamw-distil",
    "adamw-persistent-workers",
    "by-the-clock",
    "channels-last",
    pytest.param("features", marks=pytest.mark.slow),
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


class Nursery:
    """Starts healing processes without paying for the imports each time, and kills them."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PALMETTE_PROGRESS": "0"}
        self.process = subprocess.Popen(
            [sys.executable, str(JOB)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.read() == "ready"

    def read(self) -> str:
        line = self.process.stdout.readline()
        assert line, "the nursery died"
        return line.strip()

    def heal(self, case: str, folder: Path, kill_after: float | None = None, *, inside: bool = False) -> int:
        """Run a case; the exit status, -9 when it was killed: after seconds, or once it has saved inside an epoch."""
        folder.mkdir(exist_ok=True)
        self.process.stdin.write(f"{case} {folder}\n")
        self.process.stdin.flush()
        child = int(self.read())
        killer = None
        if kill_after is not None:
            killer = threading.Timer(kill_after, self._kill, (child,))
            killer.start()
        elif inside:
            killer = threading.Timer(0, self._kill_inside, (child, folder / "state.safetensors"))
            killer.start()
        status = int(self.read())
        if killer is not None:
            killer.cancel()
        return status

    def _kill(self, child: int) -> None:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _kill_inside(self, child: int, state: Path) -> None:
        while not is_inside(state):
            try:
                os.kill(child, 0)
            except ProcessLookupError:
                return
            time.sleep(0.001)
        self._kill(child)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def nursery():
    opened = Nursery()
    yield opened
    opened.close()


def is_inside(state: Path) -> bool:
    """Whether the file is there and was saved inside an epoch; a state is never half-written."""
    if not state.exists():
        return False
    _, meta = load_checkpoint(state)
    return not meta["done"] and meta["place"]["step"] > 0


def outcome(folder: Path) -> tuple[bytes, dict]:
    return (folder / "state.safetensors").read_bytes(), json.loads((folder / "outcome.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_bit_identical(nursery, tmp_path, case):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    started = time.monotonic()
    assert nursery.heal(case, whole) == 0
    duration = time.monotonic() - started
    moments = random.Random(f"{case}-moments")
    state = broken / "state.safetensors"
    tries = (nursery.heal(case, broken, inside=True) != 0 and is_inside(state) for _ in range(3))
    assert any(tries), "no kill left a state inside an epoch"
    for _ in range(5):
        if nursery.heal(case, broken, kill_after=moments.uniform(0.1, 0.8) * duration) == 0:
            break
    assert nursery.heal(case, broken) == 0
    assert outcome(broken) == outcome(whole)


def test_finished_healing_is_read_back(nursery, tmp_path):
    assert nursery.heal("sgd", tmp_path) == 0
    first = outcome(tmp_path)
    changed = (tmp_path / "state.safetensors").stat().st_mtime_ns
    (tmp_path / "outcome.json").unlink()
    assert nursery.heal("sgd", tmp_path) == 0
    assert outcome(tmp_path) == first
    assert (tmp_path / "state.safetensors").stat().st_mtime_ns == changed
