"""Makes the networks that these tests share importable as a fixture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nets():
    spec = importlib.util.spec_from_file_location("palmette_train_nets", Path(__file__).with_name("nets.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
