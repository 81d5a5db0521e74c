"""`palmette demo`: the main job end to end on scikit-learn's digits, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from palmette.cli import options as opt
from palmette.cli import tables


def demo(
    run: Annotated[Path, typer.Option("--run", "-r", metavar="DIR", help="Run folder to write.")] = Path("runs/demo"),
    network: Annotated[
        Literal["digits-mobile", "digits-mlp"],
        typer.Option(help="The dense network: inverted residuals or MLP blocks."),
    ] = "digits-mobile",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training the dense network.")] = 12,
    heal_epochs: Annotated[int, typer.Option(min=1, help="Healing epochs per round.")] = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    seed: opt.Seed = 0,
) -> None:
    """Train a small network on handwritten digits, shrink it, prove it, and show what it cost.

    Example: palmette demo
    """
    import torch

    from palmette.cli.shrink import command_line, show
    from palmette.depth.shrink import shrink
    from palmette.errors import RunError
    from palmette.models import build
    from palmette.resolve import resolve_data
    from palmette.seeding import derive_seed, seeded
    from palmette.train.loop import HealConfig, heal

    say = tables.say
    if (run / "run.json").exists() and not resume:
        raise RunError(
            "the folder holds a run already",
            where=str(run),
            fix="Go on with it (--resume), or give another folder (--run).",
        )
    torch.set_num_threads(1)  # networks this small gain nothing from more, and lose much where cores are busy
    found = resolve_data("digits", seed=seed)
    shape = tuple(found.example_inputs.shape[1:])
    with seeded("demo", seed):
        dense = build(network, num_classes=found.num_classes or 10, shape=shape)
    say(f"training {network} for {epochs} epochs on {found.description}")
    heal(dense, found.train, HealConfig(optimizer="adamw", lr=3e-3, epochs=epochs), seed=derive_seed("demo", seed))
    result = shrink(
        dense.eval(),
        found.train,
        found.val,
        found.test,
        example_inputs=found.example_inputs,
        method="easier",
        run_dir=run,
        resume=resume,
        max_drop=1.0,
        heal=HealConfig(optimizer="adamw", lr=2e-3, epochs=heal_epochs, distill=0.5),
        step=2,
        rounds=3,
        calibration_loader=found.calibration,
        seed=seed,
        names={"command": command_line(), "model": f"palmette:{network}", "data": "digits"},
        say=say,
    )
    show(result, "easier")
