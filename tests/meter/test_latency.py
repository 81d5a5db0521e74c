"""Latency: who is timed when, what is reported, and that nothing else is touched."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from palmette.errors import ExportError, InputError, MissingDependency
from palmette.graph.inputs import call, tensors
from palmette.meter import Latency, hardware, measure_latency, runtimes
from palmette.meter.latency import interleave
from palmette.meter.running import quiet
from palmette.meter.runtime_onnx import onnx_session, to_onnx

Network = tuple[nn.Module, Any, fx.GraphModule]


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64))


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_a_network_of_far_more_work_takes_longer(runtime: str) -> None:
    x = torch.randn(4, 64)
    models = {"small": mlp(16), "large": mlp(8192)}
    found = measure_latency(models, x, runtime=runtime, batch=4, threads=1, runs=15, fast=True)
    assert found["large"].median_ms > 3 * found["small"].median_ms
    for latency in found.values():
        assert 0 < latency.q25_ms <= latency.median_ms <= latency.q75_ms
        assert (latency.runtime, latency.runs, latency.batch, latency.threads) == (runtime, 15, 4, 1)
        assert latency.dtype == "float32"
        assert latency.hardware == hardware(runtime)


def test_hardware_names_processor_and_versions() -> None:
    assert torch.__version__ in hardware()
    assert "cores" in hardware()
    assert "onnxruntime" in hardware("onnxruntime")
    assert "onnxruntime" not in hardware()


def test_samples_alternate_and_slow_passes_are_not_repeated() -> None:
    log: list[str] = []
    x = torch.randn(700, 700)

    def run(name: str) -> Callable[[], None]:
        def heavy() -> None:
            log.append(name)
            for _ in range(3):
                torch.linalg.qr(x)

        return heavy

    samples = interleave({"a": run("a"), "b": run("b")}, runs=4, warmup=1)
    assert log == ["a", "b"] + ["a", "b", "b", "a"] * 2  # warm-up, then rounds in alternating order
    assert {name: len(s) for name, s in samples.items()} == {"a": 4, "b": 4}


def test_quick_passes_are_repeated_until_a_sample_lasts() -> None:
    calls = 0

    def quick() -> None:
        nonlocal calls
        calls += 1
        sum(range(1000))

    samples = interleave({"quick": quick}, runs=10, warmup=5)
    assert calls > 5 + 10 * 5
    assert max(samples["quick"]) < 1.0  # milliseconds of one pass, not of one sample


def test_a_budget_ends_the_rounds_early_but_keeps_enough_samples() -> None:
    x = torch.randn(700, 700)
    samples = interleave({"a": lambda: torch.linalg.qr(x)}, runs=10_000, warmup=1, budget_s=0.05)
    assert 7 <= len(samples["a"]) < 10_000


def test_timing_restores_modes_threads_and_statistics() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).train()
    model[2].eval()
    before, mean = torch.get_num_threads(), model[1].running_mean.clone()
    measure_latency({"m": model}, torch.randn(2, 8), batch=1, threads=2, runs=2, warmup=1)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert torch.get_num_threads() == before
    assert torch.equal(model[1].running_mean, mean)


def test_batch_is_set_or_left() -> None:
    seen: list[int] = []
    model = nn.Linear(4, 4)
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    for batch in (1, 5, None):
        seen.clear()
        found = measure_latency({"m": model}, torch.randn(3, 4), batch=batch, runs=1, warmup=1)["m"]
        assert set(seen) == {batch or 3} == {found.batch}


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"warmup": 0}, {"threads": 0}, {"batch": 0}, {"runtime": "abacus"}])
def test_bad_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        measure_latency({"m": nn.Linear(2, 2)}, torch.randn(2, 2), **wrong)
    with pytest.raises(InputError):
        measure_latency({}, torch.randn(2, 2))


def test_a_missing_runtime_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match=r"pip install palmette\[onnx\]"):
        measure_latency({"m": nn.Linear(2, 2)}, torch.randn(2, 2), runtime="onnxruntime")


def ort_outputs(graph: bytes, inputs: Any) -> list[np.ndarray]:
    session = onnx_session(graph, 1)
    names = [i.name for i in session.get_inputs()]
    return list(session.run(None, {f"in{i}": t.numpy() for i, t in enumerate(tensors(inputs)) if f"in{i}" in names}))


@pytest.mark.parametrize("fast", [True, False])
def test_what_onnx_runtime_times_is_the_network(network: Network, fast: bool) -> None:
    model, inputs, captured = network
    with torch.no_grad():
        expected = tensors(call(model, inputs))
    graphs = to_onnx([model, captured] if fast else [captured], inputs, fast=fast)
    for graph in graphs:
        for ours, reference in zip(ort_outputs(graph, inputs), expected, strict=True):
            spread = float(reference.std())
            assert spread > 1e-3
            assert np.abs(ours - reference.numpy()).max() < 1e-4 * spread + 1e-5


class Pooled(nn.Module):
    """Something that torch's older exporter refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x * 2, 3)


def test_export_falls_back_for_all_and_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(1, 2, 7, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphs = to_onnx([nn.Conv2d(2, 2, 1), Pooled()], x, fast=True)
    assert capfd.readouterr() == ("", "")
    assert all(b"pytorch" in graph for graph in graphs)
    torch.testing.assert_close(torch.from_numpy(ort_outputs(graphs[1], x)[0]), Pooled()(x))


class Unexportable(nn.Module):
    """Leaves torch on its way; torch's older exporter would make its result a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.linalg.pinv(x.detach().numpy()))


@pytest.mark.parametrize("fast", [True, False])
def test_what_does_not_export_is_said_in_one_line(fast: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match="cannot be exported to ONNX") as error:
        to_onnx([Unexportable()], torch.randn(3, 3), fast=fast)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_quiet_restores_logging() -> None:
    logging.disable(logging.INFO)
    try:
        with quiet():
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)


def test_latency_prints_all_that_it_was_measured_with() -> None:
    latency = Latency("eager", 1.5, 1.25, 2.0, 30, 2, 1, "float32", "a machine")
    text = str(latency)
    for part in ("1.5 ms", "1.25", "2]", "eager", "batch 2", "1 thread,", "float32", "30 samples", "a machine"):
        assert part in text
    assert Latency(**latency.to_dict()) == latency


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_waited_for_and_named() -> None:
    model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(8))).cuda()
    found = measure_latency({"m": model}, torch.randn(512, 4096), batch=512, runs=5)["m"]
    assert torch.cuda.get_device_name() in found.hardware
    assert found.median_ms > 0.5  # 69 G multiply-adds; launching alone takes less
