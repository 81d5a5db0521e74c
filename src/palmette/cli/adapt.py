"""`palmette adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from palmette.cli import options as opt
from palmette.cli import tables
from palmette.cli.shrink import command_line

if TYPE_CHECKING:
    from palmette.ondevice.outcome import AdaptResult

_BUDGET = 'What training may keep, such as "512KiB" or "2MB"; if not given, only the exact forms are used.'
_SCOPE = "What the budget bounds: what is kept for backward, that with gradients and optimizer, or all that is alive."
_METHOD = "auto, lossless, or one that palmette methods lists for adapt; FILE.py:FUNCTION is your own."
_FREEZE = "Batch norms use their running statistics; their sums over a batch would not fit a budget."


def adapt(
    model: opt.ModelSpec,
    data: opt.DataSpec,
    weights: opt.Weights = None,
    budget: Annotated[str | None, typer.Option("--budget", "-b", metavar="BYTES", help=_BUDGET)] = None,
    scope: Annotated[Literal["saved", "saved+gradients+optimizer", "peak"], typer.Option(help=_SCOPE)] = "saved",
    run: Annotated[Path, typer.Option("--run", "-r", metavar="DIR", help="Run folder to write.")] = Path("runs/adapt"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    method: Annotated[str, typer.Option(help=_METHOD)] = "auto",
    option: opt.MethodOption = None,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning.")] = 5,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; if not given 0.05 for sgd, 0.01 momentum, 0.001 adam.")
    ] = None,
    optimizer: Annotated[
        Literal["sgd", "momentum", "adam"],
        typer.Option(help="sgd keeps nothing, momentum one and adam two numbers for each that is trained."),
    ] = "sgd",
    clip: Annotated[float, typer.Option(help="Bound on the norm of the gradient.")] = 2.0,
    freeze_bn: Annotated[bool, typer.Option(help=_FREEZE)] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan, measure one step and print it; train and write nothing.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, ...; if not given a GPU if there is one.")
    ] = None,
    image_size: opt.ImageSize = None,
    batch_size: opt.BatchSize = 64,
    seed: opt.Seed = 0,
    trust: opt.Trust = False,
) -> None:
    """Fine-tune a network within a budget of bytes, prove what training keeps, and write a report.

    Example: palmette adapt -m palmette:mlp -d digits -w dense.safetensors --budget 16KiB --run runs/adapted
    """
    from palmette.ondevice.outcome import Wish, run_adapt

    wish = Wish(
        budget=budget,
        scope=scope,
        method=method,
        config=opt.method_options(method, option, verb="adapt"),
        freeze_bn=freeze_bn,
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        clip=clip,
        seed=seed,
    )
    resolved, found = opt.load_pair(model, weights, data, image_size, batch_size, seed, trust)
    opt.warn_of_random_weights(model, weights)
    result = run_adapt(
        resolved.model.to(opt.device_of(device)),
        found.train,
        found.val,
        found.test,
        wish=wish,
        run_dir=run,
        resume=resume,
        dry_run=dry_run,
        names={"command": command_line(), "model": model, "data": data},
        say=tables.say,
    )
    show(result)


def show(result: AdaptResult) -> None:
    """Print a result: what is kept and by whom, the accuracy before and after, and the path of the report."""
    if result.tuned is None:
        for line in result.text.splitlines():
            tables.say(line)
        tables.say("Dry run: nothing was trained or written")
        return
    found = result.figures["accuracy"]
    sides = [
        f"{100 * found[side]['accuracy']:.2f} % [{', '.join(f'{100 * v:.1f}' for v in found[side]['interval'])}]"
        for side in ("before", "after")
    ]
    points, low, high = found["difference"]
    split = "validation" if found["split"] == "val" else found["split"]
    tables.say("")
    tables.say(f"Accuracy: {sides[0]} before, {sides[1]} after fine-tuning, {found['after']['n']:,} {split} samples")
    tables.say(f"Difference: {points:+.2f} points [{low:+.2f}, {high:+.2f}]; intervals of 95 %, paired per sample")
    tables.say(f"Report: {result.report}")
