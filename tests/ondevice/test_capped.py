"""The capped process: under one cap of the operating system, torch alone dies and Palmette learns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "capped.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the cap is set from Linux's own account of memory")
def test_vanilla_dies_and_palmette_learns_under_the_same_cap():
    dead = run("--vanilla", "--steps", "2")
    assert dead.returncode != 0
    assert "can't allocate memory" in dead.stderr
    assert "step 0" not in dead.stdout

    alive = run("--steps", "11")
    assert alive.returncode == 0, alive.stderr[-2000:]
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", alive.stdout))
    assert last < 0.8 * first
