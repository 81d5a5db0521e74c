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
    "reserve, inplace_elementwise, inplace_depthwise."
)
_STRATEGY = (
    "Which networks a step trains: the largest, the smallest and two more (sandwich), or as palmette's docs say."
)

_BITS = "8,32 lets the weight of each layer be stored in 8 bits, with one scale for each output channel."


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
    measurements: Annotated[int, typer.Option(min=10, help="Networks that are judged for each board.")] = 40,
    width: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="Shares of channels that may stay; 0.5, 0.75 and 1 if not given."),
    ] = None,
    depth: Annotated[int, typer.Option(min=0, help="Blocks that may be left out of each stage.")] = 2,
    bits: Annotated[str, typer.Option(metavar="BITS", show_default=False, help=_BITS)] = "",
    protect: opt.Protect = None,
    control: Annotated[bool, typer.Option(help="Also judge as many networks drawn at random.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is elastic and whether each board can be met; train nothing.")
    ] = False,
    image_size: opt.ImageSize = None,
    batch_size: opt.BatchSize = 64,
    seed: opt.Seed = 0,
    trust: opt.Trust = False,
) -> None:
    """Train one network as a supernet, and give every board the best part of it that provably fits.

    Example: palmette specialize -m palmette:digits-mobile -d digits -w dense.safetensors -b "nano:ram=8KiB,flash=32KiB"
    """
    from palmette.supernet.boards import Recipe, parse_board, run_boards

    heal = opt.heal_config(epochs=epochs, lr=lr, optimizer=optimizer)
    elastic = {"depth": depth, "protect": tuple(protect or ())} | ({"width": tuple(width)} if width else {})
    elastic |= {"bits": opt.whole_numbers(bits, "--bits")} if bits else {}
    boards = [parse_board(text) for text in board]
    resolved, found = opt.load_pair(model, weights, data, image_size, batch_size, seed, trust)
    opt.warn_of_random_weights(model, weights)
    result = run_boards(
        resolved.model,
        found.train,
        found.val,
        found.test,
        boards=boards,
        recipe=Recipe(heal=heal, strategy=strategy, elastic=elastic, measurements=measurements, control=control),
        example_inputs=found.example_inputs,
        run_dir=run,
        resume=resume,
        dry_run=dry_run,
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
