"""Measured networks of the papers, and the spaces of samples.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from palmette.supernet import Configs


@pytest.fixture(scope="session")
def samples():
    """samples.py beside this file, under a name that no other test folder has."""
    name = "palmette_test_supernet_samples"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("samples.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stored(palmette_data):
    """stored(name): configurations, top-1 in 0..1 and peak in elements."""

    def load(name):
        data = np.load(palmette_data / "supernet" / f"{name}.npz")
        return Configs(*(data[field] for field in Configs._fields)), data["top1"].astype(float), data["peak_elements"]

    return load
