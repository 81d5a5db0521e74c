"""The coverage table, one family per test, each in its own process within a limit of time and memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _load(name: str) -> ModuleType:
    """A benchmark script as a module; its folder stays off the import path, for `coverage` is also a package's name."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name.removeprefix('table_')}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


families = _load("coverage_families")
errors = _load("coverage_errors")
coverage = _load("table_coverage")
KEYS = [f.key for f in families.families()]


def test_the_table_is_as_wide_as_promised() -> None:
    assert len(KEYS) == len(set(KEYS))
    assert sum(k.startswith("torchvision:") for k in KEYS) >= 18
    assert sum(k.startswith("timm:") for k in KEYS) >= 18
    named = ("Bert", "Roberta", "DistilBert", "ViT", "Swin", "MobileNetV2", "ConvNext")
    assert all(any(k.startswith(f"hf:{n}For") for k in KEYS) for n in named)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("key", KEYS)
def test_family(key: str) -> None:
    package = {"hf": "transformers"}.get(key.split(":", maxsplit=1)[0], key.split(":", maxsplit=1)[0])
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    row = coverage.run_isolated(key, seconds=900, gibibytes=16)
    assert row["passed"], row["failures"]
    assert row["merges"] > 0 or row["reasons"]


def test_the_bound_is_what_rounding_does_where_that_is_more() -> None:
    calm, wild = {"rounding": 1e-6, "condition": 10.0}, {"rounding": 1e-6, "condition": 1e8}
    assert errors.bound(calm, torch.float64) == errors.FLOAT64_BOUND
    assert errors.bound(calm, torch.float32) == errors.FLOAT32_BOUND
    assert errors.bound(wild, torch.float64) == pytest.approx(8 * 1e8 * 2**-53)
    assert errors.bound(wild, torch.float32) == pytest.approx(8 * 1e8 * 2**-24)


def test_the_condition_of_a_linear_network_is_about_one() -> None:
    family = next(f for f in families.families() if f.key == "torchvision:alexnet")
    size = families.inputs(family, 1, 0).shape[-1]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size * size, 4, bias=False)).double()
    assert 1e-3 < errors.condition(family, net) <= 3 * size * size
