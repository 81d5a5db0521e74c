"""What every test gets: one torch thread, hypothesis profiles, and the real data where there is any.

Real data and trained networks are found through the environment variable PALMETTE_DATA. A test that needs them asks for
`palmette_data` and is skipped without them; where PALMETTE_DATA_REQUIRED is set, such a skip is a failure.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile("default", max_examples=15, deadline=None, derandomize=True)
settings.register_profile(
    "slow", max_examples=500, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def palmette_data() -> Path:
    """The folder of real data and trained networks."""
    folder = os.environ.get("PALMETTE_DATA")
    if not folder:
        pytest.skip("the environment variable PALMETTE_DATA does not name a folder of real data")
    if not Path(folder).is_dir():
        pytest.skip(f"PALMETTE_DATA names a folder that does not exist: {folder}")
    return Path(folder)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Turn a skip for missing data into a failure where the data is required."""
    return _refuse_missing_data((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """The same for a module that skips itself."""
    return _refuse_missing_data((yield))


def _refuse_missing_data(report: Any) -> Any:
    required = bool(os.environ.get("PALMETTE_DATA_REQUIRED"))
    if required and report.outcome == "skipped" and "PALMETTE_DATA" in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped, but PALMETTE_DATA_REQUIRED is set: {report.longrepr}"
    return report
