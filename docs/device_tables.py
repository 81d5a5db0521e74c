"""The section "Supernets: computed and real costs" of the page of benchmarks: memory of runtimes, tables of latency."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layout import table

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

MEMORY = """
Bytes of activations in KiB, batch 1, float32, of sub-networks spread over the peaks that their supernet can reach.
Computed: the closed form of the supernet, from no run and no extraction (for folded norms: from the graph). Alive: the
largest sum of tensors alive at once in the program that ExecuTorch's portable operators run, not delegated, inputs
planned. Arena: what ExecuTorch's planner allocates for it, and what that of `palmette.meter.executorch_plan` does.
Eager: computed with the input held for the whole pass, the storages that were alive in a real run, and the peak of
torch's allocator. The largest distance between computed and alive is {alive:.2f} %, to the arena of palmette's planner
{tight:.2f} %, to that of ExecuTorch's {arena:.1f} %, and in eager mode {eager:.2f} % (allocator: {allocator:.1f} %). By
`benchmarks/supernet/runtime_memory.py`.
"""

NOTE = """
Where the figures would differ, and why. Hardswish and hardsigmoid are no core operators: without a delegate
ExecuTorch takes them apart (copy, add, two clamps, multiply, divide, copy), which needs three tensors where their own
kernel needs two; `DeviceProfile(operators="core")` counts so, and without it the peak is up to {own:.0f} % too low.
ExecuTorch would also transpose the weight of a linear layer at every run, into the arena: the export keeps `linear`,
for which it has a kernel. Its planner adds up buckets, and a tensor lies in one of them, behind whatever lives there
at the same time: none crosses two buckets or fills a gap in front. The lowest free offset in one arena closes the
gaps. Sizes are rounded up to 16 bytes, which changes nothing at these shapes. Batch norms are not folded at export;
on both sides they are a step that reads one tensor and writes another, and the rows with folded norms agree as well.
PyTorch's allocator adds what kernels take for themselves, which no operator reports.
"""

LATENCY = """
Tables of `palmette profile`: whole sub-networks timed in turn with the largest; milliseconds of each choice and rates
per multiply-add and per byte of weights fitted to three quarters of them. Error: mean absolute, in percent of the time,
on the quarter that was not fitted, with the 95 % interval of a bootstrap over networks. Range: the fastest and slowest
median. The machine was shared with other work, which the rounds in turn take out only in part. By
`benchmarks/supernet/latency_tables.py`.
"""


def device_section() -> str:
    """Both tables; nothing where no results are stored."""
    parts = [part for part in (memory_table(), latency_table()) if part]
    return "\n\n".join(["## Supernets: computed and real costs", *parts]) if parts else ""


def _rows(name: str) -> dict[str, Any]:
    file = RESULTS / f"supernet_{name}.json"
    return dict(json.loads(file.read_text())["rows"]) if file.exists() else {}


def memory_table() -> str:
    """Computed, planned and used bytes of sub-networks."""
    rows = _rows("runtime_memory")
    if not rows:
        return ""

    def worst(one: str, other: str) -> float:
        return max(100 * abs(row[one] / row[other] - 1) for row in rows.values())

    about = MEMORY.format(
        alive=worst("core", "live"),
        tight=worst("core", "tight"),
        arena=worst("core", "arena"),
        eager=worst("held", "storages"),
        allocator=worst("held", "allocator"),
    )
    planned = ("computed", "alive", "arena: ExecuTorch", "palmette")
    head = ("sub-network", "px", *planned, "eager: computed", "run", "allocator")
    keys = ("core", "live", "arena", "tight", "held", "storages", "allocator")
    lines = [
        (key.replace("/", ", "), str(row["edge"]), *(f"{row[k] / 1024:,.1f}" for k in keys))
        for key, row in rows.items()
    ]
    note = NOTE.format(own=max(100 * (1 - row["own"] / row["core"]) for row in rows.values()))
    return f"### Memory that runtimes plan\n\n{about.strip()}\n\n{table(head, lines)}\n\n{note.strip()}"


def latency_table() -> str:
    """The error of latency tables by network and runtime."""
    rows = _rows("latency")
    if not rows:
        return ""
    lines = []
    for key, row in rows.items():
        error, (low, high) = row["error"], row["range_ms"]
        span = f"{error['mean']:.1f} [{error['low']:.1f}, {error['high']:.1f}]"
        lines.append(
            (
                key,
                f"{row['choices']}",
                f"{row['networks']} ({error['n']})",
                f"{low:.3g} to {high:.3g}",
                span,
                f"{error['bias']:+.1f}",
                f"{error['worst']:.1f}",
                f"{error['rank']:.2f}",
            )
        )
    head = ("supernet", "choices", "timed (left out)", "range, ms", "error, %", "bias, %", "worst, %", "Kendall's tau")
    hardware = next(iter(rows.values()))["hardware"]
    return f"### Latency tables\n\n{LATENCY.strip()} {hardware}.\n\n{table(head, lines)}"
