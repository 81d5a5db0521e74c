"""Latency: warmed up, interleaved A/B/A/B in one process, as medians with quartiles, on named hardware."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palmette.errors import InputError
from palmette.graph.inputs import batch_size, tensors, to_device, with_batch
from palmette.meter.compute import evaluating
from palmette.meter.running import Packed, Runner
from palmette.meter.runtimes import runners, runtime_named

_SAMPLE_S = 1e-3
"""A sample repeats the pass until it lasts about this long, well above the clock's resolution and the call overhead."""
_FEWEST_SAMPLES = 7
"""Medians and quartiles of fewer samples mean little; a budget of time does not go below."""


MOST_THREADS = 1024
"""More threads than any machine has cores: torch crashes on absurd numbers."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one eval forward pass: median and quartiles over `runs` samples, and what ran on what."""

    runtime: str
    median_ms: float
    q25_ms: float
    q75_ms: float
    runs: int
    batch: int
    threads: int
    dtype: str
    hardware: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return (
            f"{self.median_ms:.4g} ms [{self.q25_ms:.4g}, {self.q75_ms:.4g}] ({self.runtime}, batch {self.batch}, "
            f"{threads}, {self.dtype}, {self.runs} samples, {self.hardware})"
        )


def measure_latency(
    models: dict[str, nn.Module],
    example_inputs: Any,
    *,
    runtime: str = "eager",
    batch: int | None = 1,
    threads: int | None = None,
    runs: int = 30,
    warmup: int = 5,
    budget_s: float | None = None,
    fast: bool = False,
) -> dict[str, Latency]:
    """Time the models against each other: every round takes one sample of each, in alternating order.

    models: plain networks, or packed ones (`OnnxModel`, `PteModel`) that the runtime can load. A cheap pass is
    repeated until a sample lasts about a millisecond. batch: None takes `example_inputs` as they are. threads: None
    takes torch's present number. budget_s: stop early (after 7 samples) when the rounds last longer. fast: for ONNX
    Runtime and OpenVINO, prefer the quicker export. Raises InputError for an unknown runtime or counts below 1,
    MissingDependency without the runtime's packages, ExportError when a model does not export or the runtime computes
    something else.
    """
    if not models or any(n is not None and n < 1 for n in (runs, warmup, threads, batch)):
        raise InputError("Nothing can be timed with no model, or with runs, warmup, threads or batch below 1")
    inputs = example_inputs if batch is None else with_batch(example_inputs, batch)
    device = _device(models)
    inputs = to_device(inputs, device)
    count = torch.get_num_threads() if threads is None else threads
    if count > MOST_THREADS:
        raise InputError(f"{count} threads are more than {MOST_THREADS}", fix="Give at most the number of cores.")
    described = runtime_named(runtime)
    sync = torch.cuda.synchronize if device.type == "cuda" and described.everywhere else None
    with evaluating(*models.values()), _threads(count):
        passes = runners(models, inputs, runtime, count, fast=fast)
        with torch.inference_mode():
            samples = interleave(passes, runs=runs, warmup=warmup, budget_s=budget_s, sync=sync)
    name = hardware(runtime, device)
    found = {}
    for key, times in samples.items():
        q25, median, q75 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        dtype = _dtype(models[key], inputs, described.precision)
        found[key] = Latency(runtime, median, q25, q75, len(times), batch_size(inputs), count, dtype, name)
    return found


def interleave(
    passes: dict[str, Runner],
    *,
    runs: int,
    warmup: int,
    budget_s: float | None = None,
    sync: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds per pass, up to `runs` samples for each of `passes`, taken in turn.

    sync: waits for an asynchronous device. budget_s: see `measure_latency`.
    """
    repeats = {name: _repeats(run, warmup, sync) for name, run in passes.items()}
    samples: dict[str, list[float]] = {name: [] for name in passes}
    order = list(passes)
    start = time.perf_counter()
    with _no_garbage_collection():
        for done in range(runs):
            if budget_s is not None and done >= _FEWEST_SAMPLES and time.perf_counter() - start > budget_s:
                break
            for name in order:
                samples[name].append(_sample(passes[name], repeats[name], sync))
            order.reverse()
    return samples


def _repeats(run: Runner, warmup: int, sync: Callable[[], None] | None) -> int:
    """Warm up, and say how often a pass must be repeated for one sample."""
    fastest = min(_sample(run, 1, sync) for _ in range(warmup))
    return max(1, min(1000, round(_SAMPLE_S * 1e3 / max(fastest, 1e-6))))


def _sample(run: Runner, repeats: int, sync: Callable[[], None] | None) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if sync is not None:
        sync()
    return (time.perf_counter() - start) * 1e3 / repeats


@cache
def hardware(runtime: str = "eager", device: torch.device | None = None) -> str:
    """Processor, cores and library versions, such as "AMD EPYC, 2 cores, Linux x86_64, torch 2.13.0".

    device: where the model lives, the CPU unless told; exported networks run on the CPU only.
    """
    described = runtime_named(runtime)
    if device is not None and device.type == "cuda" and described.everywhere:
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_cpu_model()}, {os.cpu_count()} cores"
    library = f", {described.library} {version(described.library)}" if described.library else ""
    return f"{processor}, {platform.system()} {platform.machine()}, torch {torch.__version__}{library}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device(models: dict[str, nn.Module]) -> torch.device:
    return next((t.device for m in models.values() for t in [*m.parameters(), *m.buffers()]), torch.device("cpu"))


def _dtype(model: nn.Module, inputs: Any, precision: str | None) -> str:
    """What is computed in: `precision` where the runtime fixes it, else the dtype of the weights or inputs."""
    if isinstance(model, Packed):
        return model.precision
    for tensor in [*model.parameters(), *tensors(inputs)]:
        if tensor.is_floating_point():
            return precision or str(tensor.dtype).removeprefix("torch.")
    return "int"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
