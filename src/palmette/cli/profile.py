"""`palmette profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palmette.cli import options as opt
from palmette.cli import tables

if TYPE_CHECKING:
    from palmette.supernet.latency import LatencyTable

_RUNTIME = f"Where it is timed: {opt.RUNTIME_NAMES}."
_COUNT = "Sub-networks to time, 12 or more; every fourth is kept to tell the error of the table."
_SECONDS = "Stop after so many seconds, once 12 networks are timed."


def profile(
    model: opt.ModelSpec,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The table, JSON; written after every four networks.")
    ] = Path("latency.json"),
    weights: opt.Weights = None,
    data: opt.OptionalData = None,
    image_size: opt.ImageSize = None,
    classes: opt.Classes = None,
    runtime: Annotated[str, typer.Option(metavar="RUNTIME", help=_RUNTIME)] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, help="Threads that the runtime may use.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a pass.")] = 1,
    count: Annotated[int, typer.Option(help=_COUNT)] = 48,
    seconds: Annotated[float | None, typer.Option("--seconds", metavar="S", help=_SECONDS)] = None,
    width: opt.Width = None,
    depth: opt.Depth = 2,
    kernel: opt.Kernel = None,
    heads: opt.Heads = None,
    resolution: opt.Resolution = None,
    bits: opt.Bits = None,
    protect: opt.Protect = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the table in the file.")] = False,
    seed: opt.Seed = 0,
    trust: opt.Trust = False,
) -> None:
    """Make a latency table of a supernet on this machine, from which the time of any of its networks follows.

    Whole sub-networks are timed in turn with the largest. Milliseconds of each choice, and rates for multiply-adds and
    bytes of weights, are fitted to three quarters of them; on the last quarter the error is measured and printed. A
    search under a bound on latency reads the table. Run it on the machine that matters, with nothing else running
    there; for a phone or a board it says nothing.

    Example: palmette profile -m torchvision:mobilenet_v3_small --image-size 96 --runtime onnxruntime --out table.json
    """
    from palmette.errors import RunError
    from palmette.supernet.latency import measure_latencies
    from palmette.supernet.supernet import Supernet

    if out.exists() and not resume:
        raise RunError("The file exists", where=str(out), fix="Add --resume to go on with it, or name another --out")
    network, example = opt.load_model(model, weights, data, image_size, classes, trust)
    net = Supernet.from_model(network, example, **opt.elastic(width, depth, kernel, heads, resolution, bits, protect))
    tables.say(f"{len(net.space)} choices, {float(net.space.size()):.3g} networks; timing {count} of them")
    table = measure_latencies(
        net,
        runtime=runtime,
        threads=threads,
        batch=batch,
        count=count,
        budget_seconds=seconds,
        seed=seed,
        path=out,
        say=tables.say,
    )
    show(table)
    tables.say(f"Table: {out}")


def show(table: LatencyTable) -> None:
    """Print the milliseconds that each value of each choice saves against its largest, and the error."""
    rows = []
    for name, times in table.entries.items():
        most = times[max(times)]
        rows.append((name, ", ".join(f"{value}: {ms - most:+.3g}" for value, ms in times.items())))
    tables.console.print(
        tables.plain(
            "Milliseconds against the largest value, beside those of MACs and weights", ("choice", "value: ms"), rows
        )
    )
    device, largest = table.device, max(row.median_ms for row in table.rows)
    tables.say(
        f"The slowest of {len(table.rows)} networks takes {largest:.4g} ms ({device.runtime}, batch {device.batch}, "
        f"{device.threads} thread{'s' if device.threads > 1 else ''}, {device.hardware})"
    )
    tables.say(
        f"And {1e9 * table.ms_per_mac:.3g} ms for 1e9 MACs, {2**20 * table.ms_per_byte:.3g} ms for a MiB of weights"
    )
    tables.say(f"Error of the table: {table.error}")
