"""`palmette curve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palmette.cli import options as opt
from palmette.cli import tables
from palmette.cli.shrink import command_line, cost_of

_POINTS = "Networks to heal along the front; the fastest that has hope of being mended is always one."
_OPTION = "An option of auto (palmette methods auto); may be repeated. trainings does not concern curve; --points does."


def curve(
    model: opt.ModelSpec,
    data: opt.DataSpec,
    weights: opt.Weights = None,
    run: Annotated[Path, typer.Option("--run", "-r", metavar="DIR", help="Run folder to write.")] = Path("runs/curve"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    points: Annotated[int, typer.Option(help=_POINTS)] = 4,
    width: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="Also prune this share of the channels at each point; may be repeated."),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also quantise every network to 8 bits.")] = False,
    max_drop: Annotated[
        float, typer.Option(metavar="POINTS", help="The best network loses at most so many points on validation data.")
    ] = 0.5,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help=_OPTION)] = None,
    cost: opt.CostName = None,
    threads: Annotated[int, typer.Option(help="Threads that latencies are measured with.")] = 1,
    protect: opt.Protect = None,
    pad: opt.Pad = None,
    epochs: opt.Epochs = None,
    lr: opt.Rate = None,
    optimizer: opt.Optimizer = None,
    distill: opt.Distill = None,
    temperature: opt.Temperature = None,
    features: opt.Features = None,
    fade: opt.Fade = None,
    precision: opt.Precision = None,
    calibration_batches: Annotated[int, typer.Option(help="Batches for fits.")] = 32,
    controls: Annotated[bool, typer.Option(help="Also train dense + same training.")] = True,
    devices: opt.Devices = 1,
    nodes: opt.Nodes = 1,
    ray: opt.Ray = None,
    image_size: opt.ImageSize = None,
    batch_size: opt.BatchSize = 64,
    seed: opt.Seed = 0,
    trust: opt.Trust = False,
) -> None:
    """The whole front of accuracy and latency of one network on this device, healed and reported.

    Example: palmette curve -m palmette:mlp -d digits -w dense.safetensors --points 3 --epochs 2 --run runs/front
    """
    from palmette.depth.curve import curve as trace

    heal = opt.heal_config(
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        distill=distill,
        temperature=temperature,
        features=features,
        fade=fade,
        precision=precision,
    )
    config = opt.method_config("auto", option)
    resolved, found = opt.load_pair(model, weights, data, image_size, batch_size, seed, trust)
    opt.warn_of_random_weights(model, weights)
    result = trace(
        resolved.model,
        found.train,
        found.val,
        found.test,
        example_inputs=found.example_inputs,
        config=config,
        points=points,
        width=width or (),
        int8=int8,
        max_drop=max_drop,
        protect=protect or [],
        run_dir=run,
        resume=resume,
        heal=heal,
        pad=pad,
        cost=cost_of(cost),
        threads=threads,
        calibration_loader=found.calibration,
        calibration_batches=calibration_batches,
        controls=controls,
        seed=seed,
        devices=devices,
        nodes=nodes,
        ray=ray,
        names={"command": command_line(), "model": model, "data": data},
        say=tables.say,
    )
    tables.console.print(tables.front(result.rows, result.split, result.best))
    for line in tables.measured_on(result.rows):
        tables.say(line)
    tables.say(result.message)
    if result.report is not None:
        tables.say(f"Report: {result.report}")
