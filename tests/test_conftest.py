"""The data fixture: skipped without data, failed where the data is required."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")

FILES = {
    "test_by_fixture.py": "def test_it(palmette_data):\n    assert palmette_data.is_dir()\n",
    "test_by_module.py": "import os\nimport pytest\n\nif not os.environ.get('PALMETTE_DATA'):\n"
    "    pytest.skip('PALMETTE_DATA is not set', allow_module_level=True)\n\n"
    "def test_it():\n    assert os.environ['PALMETTE_DATA']\n",
    "test_other_skip.py": "import pytest\n\ndef test_it():\n    pytest.skip('no such package')\n",
}


def run(folder: Path, **environment: str) -> Counter[str]:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "pytest.ini").write_text("[pytest]\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PALMETTE_DATA", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(folder), "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True, check=False)
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    return Counter({word: int(count) for count, word in found})


@pytest.mark.slow
def test_missing_data_is_skipped(tmp_path):
    assert run(tmp_path) == {"skipped": 3}


def test_missing_data_fails_where_it_is_required_and_other_skips_stay_skips(tmp_path):
    assert run(tmp_path, PALMETTE_DATA_REQUIRED="1") == {"skipped": 1, "error": 2}


@pytest.mark.slow
def test_data_that_is_there_is_handed_over(tmp_path):
    assert run(tmp_path, PALMETTE_DATA_REQUIRED="1", PALMETTE_DATA=str(tmp_path)) == {"passed": 2, "skipped": 1}
