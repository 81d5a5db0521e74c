"""Commands that only look: `palmette sites`, `palmette measure`, `palmette methods`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from palmette.cli import options as opt
from palmette.cli import tables

_VERBS = {"shrink": "", "adapt": " (and its own auto and lossless, without options)"}


def sites(
    model: opt.ModelSpec,
    weights: opt.Weights = None,
    data: opt.OptionalData = None,
    image_size: opt.ImageSize = None,
    classes: opt.Classes = None,
    trust: opt.Trust = False,
) -> None:
    """List the places where a network can be changed, and what each would save.

    Column merge: exact, or the padding policy that makes it so. MACs saved: together, for what pays only together.

    Example: palmette sites -m timm:mobilenetv2_100 --image-size 96
    """
    from palmette.graph import candidates, capture, find_sites

    network, example = opt.load_model(model, weights, data, image_size, classes, trust)
    captured = capture(network, example)
    kept = {
        (site.kind, site.path): candidate.reason
        for kind in ("activation", "block")
        for candidate in candidates(captured, example, kind=kind)
        for site in candidate.sites
        if not candidate.pays
    }
    rows: list[tuple[str, ...]] = []
    reasons: list[str] = []
    for site in find_sites(network, example):
        reason = kept.get((site.kind, site.path), site.reason)
        reasons += [reason] if reason and reason not in reasons else []
        worth = f"no: {reasons.index(reason) + 1}" if reason else "yes"
        rows.append((site.kind, site.path, site.op, site.exactness, f"{site.macs_saved:,}", worth))
    columns = ("kind", "path", "operation", "merge", "MACs saved", "removable")
    tables.console.print(tables.plain("Sites", columns, rows, right=("MACs saved",)))
    for number, reason in enumerate(reasons, start=1):
        tables.say(f"{number}: {reason}")


def measure(
    model: opt.ModelSpec,
    weights: opt.Weights = None,
    data: opt.OptionalData = None,
    image_size: opt.ImageSize = None,
    classes: opt.Classes = None,
    runtime: Annotated[list[str] | None, typer.Option(help=f"{opt.RUNTIME_NAMES}; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size for memory and latency.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: torch's.")] = None,
    profile: Annotated[str, typer.Option(help="Device profile whose limits to compare with.")] = "cpu",
    training: Annotated[
        bool, typer.Option("--training", help="Also what one training step keeps for backward, and its peak.")
    ] = False,
    trust: opt.Trust = False,
) -> None:
    """Say what a network costs: parameters, MACs, depth, peak memory, latency; with --training, what training keeps.

    Example: palmette measure -m torchvision:resnet18 --image-size 224 --runtime eager --runtime onnxruntime
    """
    from palmette.meter import measure as measure_network

    network, example = opt.load_model(model, weights, data, image_size, classes, trust)
    runtimes = tuple(runtime or ("eager",))
    tables.say(str(measure_network(network, example, profile, runtimes=runtimes, batch=batch, threads=threads)))
    if training:
        from palmette.graph.inputs import with_batch
        from palmette.meter.training import measure_training

        tables.say(f"\nOne training step at batch {batch}, in train mode, the mean of the output as loss")
        for line in str(measure_training(network.train(), with_batch(example, batch))).splitlines():
            tables.say(line)


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", show_default=False, help="A method, for its options; a command, for its methods."
        ),
    ] = None,
) -> None:
    """List the registered methods by the command that uses them, with paper and unit of their score, or one's options.

    Example: palmette methods auto
    """
    from palmette.registry import config_help, get_method
    from palmette.registry import methods as registered

    if name is not None and name not in _VERBS:
        entry = get_method(name)
        tables.say(entry.title if entry.paper.startswith("none") else f"{entry.title}. {entry.paper}")
        if options := option_rows(entry.config):
            tables.say(config_help(entry.config))
            tables.console.print(tables.plain("Options", ("--option", "allowed", "default"), options))
        else:
            tables.say("It has no options")
        return
    for verb in _VERBS if name is None else (name,):
        rows = [
            (m.name, m.ranks, m.unit, m.title if m.paper.startswith("none") else f"{m.title}. {m.paper}")
            for m in registered()
            if m.verb == verb
        ]
        title = f"Methods of palmette {verb}{_VERBS[verb]}"
        tables.console.print(tables.plain(title, ("name", "ranks", "unit of score", "what it does; paper"), rows))
        tables.console.print()


def option_rows(config: type) -> list[tuple[str, str, str]]:
    """Name, what is allowed and default of each option of a method, as they are typed."""
    hints = get_type_hints(config, include_extras=True)
    return [(field.name, allowed(hints[field.name]), _typed(field.default)) for field in dataclasses.fields(config)]


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def allowed(hint: Any) -> str:
    """What an option may be, from the annotation of its field, as it is typed."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        return " ".join([allowed(inner), *(f"in {mark}" for mark in marks)])
    if get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    if get_args(hint):
        return " or ".join(allowed(part) for part in get_args(hint))
    return {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
