"""Everything the meter says of one network, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from palmette.device import DeviceProfile, format_bytes, profile_named
from palmette.graph.capture import capture
from palmette.graph.inputs import batch_size, with_batch
from palmette.meter.compute import depth, macs, param_bytes, params
from palmette.meter.latency import Latency, measure_latency
from palmette.meter.memory import peak_bytes


@dataclass(frozen=True)
class Cost:
    """The cost of one network.

    params, param_bytes: shared ones once. macs: multiply-adds of one sample. depth: parametric operations on the
    longest input-output path. peak_bytes: inputs and activations at `batch`, weights apart. latency: one entry per
    runtime. exceeded: what the device profile does not allow, in words.
    """

    params: int
    param_bytes: int
    macs: int
    depth: int
    peak_bytes: int
    latency: tuple[Latency, ...]
    batch: int = 1
    profile: str = "cpu"
    exceeded: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"latency": [entry.to_dict() for entry in self.latency], "exceeded": list(self.exceeded)}

    def __str__(self) -> str:
        rows = [
            ("parameters", f"{self.params:,} ({format_bytes(self.param_bytes)})"),
            ("multiply-adds", f"{self.macs:,} per sample"),
            ("depth", f"{self.depth} parametric operations"),
            ("peak memory", f"{format_bytes(self.peak_bytes)} of inputs and activations at batch {self.batch}"),
            *(("latency", str(entry)) for entry in self.latency),
            *((self.profile, sentence) for sentence in self.exceeded),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def measure(
    model: nn.Module,
    example_inputs: Any,
    profile: str | DeviceProfile = "cpu",
    *,
    runtimes: Sequence[str] = ("eager",),
    batch: int = 1,
    threads: int | None = None,
) -> Cost:
    """What the model costs in eval mode; it is not changed.

    example_inputs: a tensor, tuple or dict of tensors [batch, ...]. Peak memory and latency are for `batch`. Latency is
    measured on this machine, once per runtime. Raises CaptureError for a model that does not trace, InputError for an
    unknown profile or runtime, MissingDependency without a runtime's packages.
    """
    device = profile_named(profile)
    captured = capture(model, with_batch(example_inputs, max(2, batch_size(example_inputs))))
    latency = tuple(
        measure_latency({"model": model}, example_inputs, runtime=r, batch=batch, threads=threads)["model"]
        for r in runtimes
    )
    weights, peak = param_bytes(model), peak_bytes(captured, batch)
    fastest = min((entry.median_ms for entry in latency), default=None)
    return Cost(
        params=params(model),
        param_bytes=weights,
        macs=macs(model, example_inputs),
        depth=depth(captured),
        peak_bytes=peak,
        latency=latency,
        batch=batch,
        profile=device.name,
        exceeded=tuple(device.exceeded(param_bytes=weights, peak_bytes=peak, latency_ms=fastest)),
    )
