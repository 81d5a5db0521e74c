"""`palmette shrink`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palmette.cli import options as opt
from palmette.cli import tables

if TYPE_CHECKING:
    from palmette.depth.shrink import ShrinkResult


def shrink(
    model: opt.ModelSpec,
    data: opt.DataSpec,
    weights: opt.Weights = None,
    run: Annotated[Path, typer.Option("--run", "-r", metavar="DIR", help="Run folder to write.")] = Path("runs/shrink"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    method: Annotated[
        str,
        typer.Option(
            help="auto searches all edits on the clock; palmette methods lists all; FILE.py:FUNCTION is your own."
        ),
    ] = "auto",
    max_drop: Annotated[
        float, typer.Option(metavar="POINTS", help="Points of validation accuracy to give up at most.")
    ] = 0.5,
    target_latency: Annotated[
        str | None, typer.Option(metavar="TIME", help='Latency to reach: "3.2ms", or "0.5x" of the dense one.')
    ] = None,
    option: opt.MethodOption = None,
    cost: opt.CostName = None,
    threads: Annotated[int, typer.Option(help="Threads that latencies are measured with.")] = 1,
    rounds: Annotated[int | None, typer.Option(help="At most this many rounds; of auto: trainings.")] = None,
    step: Annotated[int, typer.Option(help="Candidates removed per round; not for auto.")] = 1,
    one_shot: Annotated[
        bool, typer.Option("--one-shot", help="Remove to the target latency in one round, and heal once; not for auto.")
    ] = False,
    patience: Annotated[int, typer.Option(help="Rounds in a row that may miss before the end; not for auto.")] = 2,
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
    calibration_batches: Annotated[int, typer.Option(help="Batches for scores and fits.")] = 32,
    controls: Annotated[bool, typer.Option(help="Also train dense + same training and random removal.")] = True,
    reproduce: Annotated[bool, typer.Option("--reproduce", help="The method in its paper's form.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the ranking and the expected time; write nothing.")
    ] = False,
    devices: opt.Devices = 1,
    nodes: opt.Nodes = 1,
    ray: opt.Ray = None,
    image_size: opt.ImageSize = None,
    batch_size: opt.BatchSize = 64,
    seed: opt.Seed = 0,
    trust: opt.Trust = False,
) -> None:
    """Make a trained network smaller and faster, prove it, and write a report.

    Example: palmette shrink -m palmette:mlp -d digits -w dense.safetensors --max-drop 0.5 --run runs/first
    """
    from palmette.depth.opening import check_request
    from palmette.depth.shrink import shrink as shrink_network

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
    config = opt.method_config(method, option)
    check_request(method, config=config, reproduce=reproduce, max_drop=max_drop, target_latency=target_latency)
    resolved, found = opt.load_pair(model, weights, data, image_size, batch_size, seed, trust)
    opt.warn_of_random_weights(model, weights)
    result = shrink_network(
        resolved.model,
        found.train,
        found.val,
        found.test,
        example_inputs=found.example_inputs,
        method=method,
        config=config,
        max_drop=max_drop,
        target_latency=target_latency,
        protect=protect or [],
        run_dir=run,
        resume=resume,
        heal=heal,
        rounds=rounds,
        step=step,
        one_shot=one_shot,
        patience=patience,
        pad=pad,
        cost=cost_of(cost),
        threads=threads,
        calibration_loader=found.calibration,
        calibration_batches=calibration_batches,
        controls=controls,
        seed=seed,
        dry_run=dry_run,
        reproduce=reproduce,
        devices=devices,
        nodes=nodes,
        ray=ray,
        names={"command": command_line(), "model": model, "data": data},
        say=tables.say,
    )
    show(result, method)


def cost_of(text: str | None) -> Any:
    """A runtime's name as it is; a file of stored timings as a table that never measures."""
    if text is None or not text.endswith(".json"):
        return text
    from palmette.meter.table import CostTable

    return CostTable.stored(Path(text))


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["palmette", *sys.argv[1:]])


def show(result: ShrinkResult, method: str) -> None:
    """Print a result: the ranking of a dry run, or the accounting table, the proof and the path of the report."""
    from palmette.registry import get_method

    if not result.rows:
        if result.ranking:
            tables.console.print(tables.ranking(result.ranking, get_method(method).unit))
        tables.say(result.message)
        return
    tables.console.print(tables.accounting(result.rows, result.split))
    tables.console.print()
    for line in tables.measured_on(result.rows):
        tables.say(line)
    if result.verification is not None:
        tables.say(f"Proof: {proof(result)}")
    for kind, parity in result.exports.items():
        name = kind if kind == "huggingface" else f"model.{kind}"
        tables.say(f"{name}: {parity.get('error') or tables.parity(parity)}")
    tables.say(result.message)
    if result.report is not None:
        tables.say(f"Report: {result.report}")


def proof(result: ShrinkResult) -> str:
    """One line on how closely the collapsed network follows the edited one, and how many merges were done."""
    seen, record = result.verification, result.record
    if seen is None or record is None:
        return "nothing was edited"
    done = sum(merge.done for merge in record.merges)
    return (
        f"{done} of {len(record.merges)} merges done; largest relative output error {seen.max_relative_error:.1e}"
        f" (float64 twin {seen.max_relative_error_float64:.1e}), top-1 agreement {100 * seen.top1_agreement:.2f} %"
    )
