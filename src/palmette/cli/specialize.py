"""`palmette specialize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from palmette.cli import options as opt
from palmette.cli import tables
from palmette.cli.shrink import command_line

_BOARD = (
    "A device, such as nano:ram=256KiB,flash=1MiB,dtype=int8,weights_in=flash; may be repeated. Further fields: "
    "reserve, inplace_elementwise, inplace_depthwise, operators, latency_ms, which needs --latency."
)
_SEARCH = "Learn from networks that fit and solve for the best exactly, or evolve them (nsga2, by Optuna)."
_STORAGE = "Where a study of nsga2 lives: a file, or the URL of a database. Processes that name it work together."
_LATENCY = (
    "A table that `palmette profile` made of this supernet on the device, for one board or for all with latency_ms; "
    "may be repeated."
)
_MODE = "What a board's RAM bounds: an inference, or a training step on the board at --train-batch."
_STRATEGY = (
    "Which networks a step trains: the largest, the smallest and two more (sandwich), or as palmette's docs say."
)


def specialize(
    model: opt.ModelSpec,
    data: opt.DataSpec,
    board: Annotated[list[str], typer.Option("--board", "-b", metavar="BOARD", show_default=False, help=_BOARD)],
    weights: opt.Weights = None,
    run: Annotated[Path, typer.Option("--run", "-r", metavar="DIR", help="Run folder to write.")] = Path(
        "runs/specialize"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    strategy: Annotated[
        Literal["sandwich", "delayed", "random", "balanced", "progressive"], typer.Option(help=_STRATEGY)
    ] = "sandwich",
    epochs: Annotated[int, typer.Option(min=0, help="Epochs that the supernet is trained.")] = 5,
    lr: Annotated[float | None, typer.Option(help="Learning rate; 0.01 if not given.")] = None,
    optimizer: opt.Optimizer = None,
    search: Annotated[Literal["exact", "nsga2"], typer.Option(help=_SEARCH)] = "exact",
    measurements: Annotated[int, typer.Option(min=10, help="Networks that are judged for each board.")] = 40,
    latency: Annotated[list[str] | None, typer.Option(metavar="[BOARD=]FILE", help=_LATENCY)] = None,
    mode: Annotated[Literal["infer", "train"], typer.Option(help=_MODE)] = "infer",
    train_batch: Annotated[int, typer.Option(min=1, help="Samples of a training step on the board.")] = 1,
    width: opt.Width = None,
    depth: opt.Depth = 2,
    kernel: opt.Kernel = None,
    heads: opt.Heads = None,
    resolution: opt.Resolution = None,
    bits: opt.Bits = None,
    transforms: Annotated[bool, typer.Option("--transforms", help="Learn smaller kernels from larger ones.")] = False,
    protect: opt.Protect = None,
    control: Annotated[bool, typer.Option(help="Also judge as many networks drawn at random.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is elastic and whether each board can be met; train nothing.")
    ] = False,
    ray: opt.Ray = None,
    storage: Annotated[str | None, typer.Option(metavar="FILE|URL", help=_STORAGE)] = None,
    image_size: opt.ImageSize = None,
    batch_size: opt.BatchSize = 64,
    seed: opt.Seed = 0,
    trust: opt.Trust = False,
) -> None:
    """Train one network as a supernet, and give every board the best part of it that provably fits.

    Example: palmette specialize -m palmette:digits-mobile -d digits -b "nano:ram=8KiB,dtype=int8,weights_in=flash"
    """
    from palmette.supernet.boards import Recipe, parse_board, parse_tables, run_boards

    heal = opt.heal_config(epochs=epochs, lr=lr, optimizer=optimizer)
    elastic = opt.elastic(width, depth, kernel, heads, resolution, bits, protect) | {"transforms": transforms}
    boards = [parse_board(text) for text in board]
    clocks = parse_tables(latency or (), boards)
    resolved, found = opt.load_pair(model, weights, data, image_size, batch_size, seed, trust)
    opt.warn_of_random_weights(model, weights)
    result = run_boards(
        resolved.model,
        found.train,
        found.val,
        found.test,
        boards=boards,
        latency=clocks,
        recipe=Recipe(
            heal=heal,
            strategy=strategy,
            elastic=elastic,
            searcher=search,
            measurements=measurements,
            control=control,
            mode=mode,
            batch=train_batch if mode == "train" else 1,
        ),
        example_inputs=found.example_inputs,
        run_dir=run,
        resume=resume,
        dry_run=dry_run,
        ray=ray,
        storage=storage,
        seed=seed,
        names={"command": command_line(), "model": model, "data": data},
        say=tables.say,
    )
    if dry_run:
        tables.say("Dry run: nothing was trained or written")
        return
    for made in result.boards:
        tables.say("")
        for line in str(made).splitlines():
            tables.say(line)
    tables.say(f"Report: {result.report}")
