"""`measure`: all figures of one network, together."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from palmette.device import DeviceProfile
from palmette.errors import InputError, PalmetteError
from palmette.meter import Cost, depth, macs, measure, param_bytes, params, peak_bytes

Network = tuple[nn.Module, Any, fx.GraphModule]


def test_measure_gathers_what_the_parts_say(build: Callable[[str], Network]) -> None:
    model, inputs, captured = build("residual")
    cost = measure(model, inputs, runtimes=("eager", "onnxruntime"), batch=3, threads=1)
    assert (cost.params, cost.param_bytes) == (params(model), param_bytes(model))
    assert (cost.macs, cost.depth) == (macs(model, inputs), depth(captured))
    assert cost.peak_bytes == peak_bytes(captured, 3)
    assert [(entry.runtime, entry.batch) for entry in cost.latency] == [("eager", 3), ("onnxruntime", 3)]


def test_measure_times_every_runtime_that_is_asked_for(build: Callable[[str], Network]) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    model, inputs, _captured = build("residual")
    cost = measure(model, inputs, runtimes=("openvino", "onnxruntime"), threads=1)
    assert [(entry.runtime, entry.dtype) for entry in cost.latency] == [
        ("openvino", "float32"),
        ("onnxruntime", "float32"),
    ]


def test_measure_takes_every_form_of_input(network: Network) -> None:
    model, inputs, captured = network
    cost = measure(model, inputs, runtimes=())
    assert min(cost.params, cost.macs, cost.depth, cost.peak_bytes) > 0
    assert cost.latency == ()
    assert cost == measure(captured, inputs, runtimes=())


def test_a_cost_prints_as_a_table_and_goes_to_json(build: Callable[[str], Network]) -> None:
    model, inputs, _captured = build("residual")
    cost = measure(model, inputs)
    lines = str(cost).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["parameters", "multiply-adds", "depth", "peak memory", "latency"]
    assert len({len(line) - len(line.partition("  ")[2].lstrip()) for line in lines}) == 1  # one column of labels
    assert f"{cost.macs:,}" in lines[1]
    data = json.loads(json.dumps(cost.to_dict()))
    assert data["latency"][0]["runtime"] == "eager"
    assert {"params", "param_bytes", "macs", "depth", "peak_bytes", "latency"} <= data.keys()


def test_the_profile_says_what_does_not_fit(build: Callable[[str], Network]) -> None:
    model, inputs, _captured = build("residual")
    tight = DeviceProfile(name="board", ram="1KiB", flash="1KiB", latency_ms=1e-6)
    cost = measure(model, inputs, tight)
    assert len(cost.exceeded) == 3
    assert str(cost).count("\nboard") == 3
    assert measure(model, inputs, runtimes=()).exceeded == ()


def test_a_model_without_a_batch_of_two_is_measured_by_repeating_its_input() -> None:
    cost = measure(nn.Linear(4, 4), torch.randn(1, 4), runtimes=())
    assert cost == Cost(20, 80, 16, 1, 32, ())


def test_bad_input_is_a_palmette_error() -> None:
    with pytest.raises(InputError, match="'abacus'"):
        measure(nn.Linear(4, 4), torch.randn(2, 4), "abacus")
    with pytest.raises(InputError, match="'abacus'"):
        measure(nn.Linear(4, 4), torch.randn(2, 4), runtimes=("abacus",))
    with pytest.raises(PalmetteError):
        measure(nn.Linear(4, 4), torch.randn(2, 5))
