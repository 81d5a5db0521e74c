"""OpenVINO: the network, in the precision that was asked for, with the threads that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from palmette.errors import ExportError, InputError
from palmette.graph.inputs import call, map_tensors, tensors
from palmette.meter import OnnxModel, measure_latency
from palmette.meter.runtime_onnx import to_onnx
from palmette.meter.runtime_openvino import core, need_bfloat16, openvino_compiled, to_openvino
from palmette.meter.runtimes import load

pytest.importorskip("openvino", reason="openvino is not installed")

QUICK = [("residual", True), ("keywords", True), ("transformer", False)]
OTHERS = [(name, fast) for name in ("attention", "branches", "recurrent") for fast in (True, False)]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]


@pytest.mark.parametrize(("name", "fast"), CASES)
def test_what_openvino_times_is_the_network(name: str, fast: bool, build: Callable[[str], Any]) -> None:
    model, inputs, _ = build(name)
    with torch.no_grad():
        expected = tensors(call(model, inputs))
    found = load({"m": model}, inputs, "openvino", 1, fast=fast)["m"]
    for ours, reference in zip(found.outputs(inputs), expected, strict=True):
        spread = float(reference.std())
        assert spread > 1e-3
        assert float((ours - reference).abs().max()) < 1e-4 * spread + 1e-5
    passed = found.bind(inputs)()
    np.testing.assert_allclose(next(iter(passed.values())), found.outputs(inputs)[0], rtol=1e-5, atol=1e-6)


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)).eval()


def deviation(runtime: str, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want = model(x)
    return float((load({"m": model}, x, runtime, 1, fast=True)["m"].outputs(x)[0] - want).norm() / want.norm())


def test_precision_is_float32_unless_bfloat16_is_asked_for() -> None:
    model, x = convnet(), torch.randn(1, 3, 8, 8)
    assert deviation("openvino", model, x) < 1e-5
    exact = measure_latency({"m": model}, x, runtime="openvino", threads=1, runs=2, fast=True)["m"]
    assert exact.dtype == "float32"
    assert "openvino 20" in exact.hardware
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(InputError, match="does not compute in bfloat16"):
            need_bfloat16()
        return
    assert 1e-4 < deviation("openvino-bf16", model, x) < 0.1
    rough = measure_latency({"m": model}, x, runtime="openvino-bf16", threads=1, runs=2, fast=True)["m"]
    assert rough.dtype == "bfloat16"


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_asked_for(threads: int) -> None:
    (graph,) = to_openvino([convnet()], torch.randn(1, 3, 8, 8), fast=True)
    compiled = openvino_compiled(graph, threads)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert compiled.get_property("NUM_STREAMS") == 1


def test_an_onnx_graph_is_read_as_it_is() -> None:
    model, x = convnet(), torch.randn(2, 3, 8, 8)
    (graph,) = to_onnx([model], x, fast=True)
    found = load({"m": OnnxModel(graph)}, x, "openvino", 1)["m"].outputs(x)[0]
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="2 tensors were given"):
        load({"m": OnnxModel(graph)}, (x, x), "openvino", 1)
    with pytest.raises(ExportError, match="does not read this network"):
        load({"m": OnnxModel(b"no graph")}, x, "openvino", 1)


class Second(nn.Module):
    """Leaves its first input alone; a scalar comes third."""

    def forward(self, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return b.t().contiguous().t() * scale


def test_unused_inputs_and_other_layouts_keep_their_places() -> None:
    inputs = (torch.randn(2, 3), torch.randn(3, 2).t(), torch.tensor(2.0))
    for fast in (True, False):
        found = load({"m": Second()}, inputs, "openvino", 1, fast=fast)["m"].outputs(inputs)
        torch.testing.assert_close(found[0], inputs[1] * 2)


class Unconvertible(nn.Module):
    """A pseudo-inverse has no operation in OpenVINO's front end."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.linalg.pinv(x)


@pytest.mark.parametrize("fast", [True, False])
def test_what_does_not_convert_is_said_in_one_line(fast: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match="cannot be converted for OpenVINO") as caught:
        to_openvino([Unconvertible()], torch.randn(3, 3), fast=fast)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_value_that_would_become_a_constant_falls_back_to_the_other_way() -> None:
    class Depends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.shape[0]) if int(x.sum()) else x

    with pytest.raises(ExportError):
        to_openvino([Depends()], torch.ones(2, 2), fast=True)


def test_inputs_of_the_caller_are_read_where_they_are_and_left_alone() -> None:
    model, x = convnet(), torch.randn(1, 3, 8, 8)
    kept = map_tensors(torch.clone, x)
    measure_latency({"m": model}, x, runtime="openvino", threads=1, runs=2, warmup=1, fast=True)
    assert torch.equal(x, kept)
