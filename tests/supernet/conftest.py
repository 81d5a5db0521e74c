"""Measured networks of the papers, the spaces of samples.py, the networks of nets.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from palmette.supernet import Configs


def beside(file):
    """A module beside this file, under a name that no other test folder has."""
    name = f"palmette_test_supernet_{file}"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{file}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def samples():
    return beside("samples")


@pytest.fixture(scope="session")
def nets():
    return beside("nets")


@pytest.fixture(scope="session")
def stored(palmette_data):
    """stored(name): configurations, top-1 in 0..1 and peak in elements."""

    def load(name):
        data = np.load(palmette_data / "supernet" / f"{name}.npz")
        return Configs(*(data[field] for field in Configs._fields)), data["top1"].astype(float), data["peak_elements"]

    return load


@pytest.fixture
def mixed(nets):
    return nets.trained_like(nets.Mixed()), torch.randn(2, 3, 12, 12)


@pytest.fixture
def tiny(nets):
    return nets.trained_like(nets.Tiny()), torch.randn(2, 3, 16, 16)


@pytest.fixture
def transformer(nets):
    return nets.Transformer(fused=False).eval(), torch.randn(2, 7, 8)


@pytest.fixture
def fused(nets):
    return nets.Transformer(fused=True).eval(), torch.randn(2, 7, 8)


@pytest.fixture(params=["mixed", "transformer", "fused"])
def any_model(request):
    return request.getfixturevalue(request.param)
