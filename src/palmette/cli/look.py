"""Commands that only look: `palmette sites`, `palmette measure`, `palmette methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from palmette.cli import options as opt
from palmette.cli import tables


def sites(
    model: opt.ModelSpec,
    weights: opt.Weights = None,
    data: opt.OptionalData = None,
    image_size: opt.ImageSize = None,
    classes: opt.Classes = None,
    trust: opt.Trust = False,
) -> None:
    """List the places where a network can be changed, and what each would save.

    Example: palmette sites -m timm:mobilenetv2_100 --image-size 96
    """
    from palmette.graph import find_sites

    network, example = opt.load_model(model, weights, data, image_size, classes, trust)
    rows = [
        (
            site.kind,
            site.path,
            site.op,
            site.exactness,
            f"{site.macs_saved:,}",
            "yes" if site.removable else site.reason,
        )
        for site in find_sites(network, example)
    ]
    tables.console.print(
        tables.plain("Sites", ("kind", "path", "operation", "exactness", "MACs saved", "removable"), rows)
    )


def measure(
    model: opt.ModelSpec,
    weights: opt.Weights = None,
    data: opt.OptionalData = None,
    image_size: opt.ImageSize = None,
    classes: opt.Classes = None,
    runtime: Annotated[list[str] | None, typer.Option(help="eager or onnxruntime; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size for memory and latency.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: torch's.")] = None,
    profile: Annotated[str, typer.Option(help="Device profile whose limits to compare with.")] = "cpu",
    trust: opt.Trust = False,
) -> None:
    """Say what a network costs: parameters, MACs, depth, peak memory, latency.

    Example: palmette measure -m torchvision:resnet18 --image-size 224 --runtime eager --runtime onnxruntime
    """
    from palmette.meter import measure as measure_network

    network, example = opt.load_model(model, weights, data, image_size, classes, trust)
    runtimes = tuple(runtime or ("eager",))
    tables.say(str(measure_network(network, example, profile, runtimes=runtimes, batch=batch, threads=threads)))


def methods() -> None:
    """List the registered methods with paper and unit of their score.

    Example: palmette methods
    """
    from palmette.registry import methods as registered

    rows = [(m.name, m.sites, m.unit, f"{m.title}. {m.paper}") for m in registered()]
    tables.console.print(tables.plain("Methods", ("name", "ranks", "unit of score", "what it does; paper"), rows))
