"""Commands that turn one file into another: `palmette collapse`, `palmette export`, `palmette report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from palmette.cli import options as opt
from palmette.cli import tables

SavedFile = Annotated[
    Path | None,
    typer.Option(
        "--saved",
        "-s",
        metavar="FILE",
        help="model.safetensors of a run of this model, or what palmette collapse wrote.",
    ),
]


def collapse(
    model: opt.ModelSpec,
    plan: Annotated[Path, typer.Option("--plan", "-p", metavar="FILE", show_default=False, help="A fitted plan.json.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="safetensors file to write.")] = Path(
        "model.safetensors"
    ),
    weights: opt.Weights = None,
    data: opt.OptionalData = None,
    image_size: opt.ImageSize = None,
    classes: opt.Classes = None,
    cost: Annotated[str, typer.Option(help=f"What a merge must not raise: {opt.RUNTIME_NAMES}, macs.")] = "macs",
    force: Annotated[bool, typer.Option("--force", help="Merge also where it costs more.")] = False,
    pad: Annotated[str, typer.Option(help="Borders of merged convolutions: repad, exact or bias_map.")] = "repad",
    trust: opt.Trust = False,
) -> None:
    """Apply a plan to a network, merge what it made linear, verify, and save the smaller network.

    Nothing is trained: the network that a run healed is in its model.safetensors.

    Example: palmette collapse -m palmette:mlp -w dense.safetensors -d digits --plan runs/first/plan.json
    """
    from palmette.errors import VerifyError
    from palmette.files import read_bytes
    from palmette.graph import Plan, save, verify
    from palmette.graph import collapse as collapse_network

    network, example = opt.load_model(model, weights, data, image_size, classes, trust)
    opt.warn_of_random_weights(model, weights)
    edits = Plan.from_json(read_bytes(plan).decode("utf-8", errors="replace"))
    edited = edits.apply(network, example, pad=pad).eval()
    small, record = collapse_network(edited, cost=cost, force=force)
    seen = verify(edited, small.eval(), [example], example_inputs=example)
    if not seen.max_relative_error <= 1e-4:
        raise VerifyError(f"the collapsed network differs from the edited one by {seen.max_relative_error:.1e}")
    rows = [
        (", ".join(m.members), m.exactness, f"{m.macs_before:,}", f"{m.macs_after:,}", "done" if m.done else m.reason)
        for m in record.merges
    ]
    save(small, out, source=network)
    columns = ("members", "exactness", "MACs before", "MACs after", "result")
    if rows:
        tables.console.print(tables.plain("Merges", columns, rows, right=("MACs before", "MACs after")))
    else:
        tables.say("There is nothing to merge")
    tables.say(f"Largest relative output error {seen.max_relative_error:.1e}. Written: {out}")


def export(
    model: opt.ModelSpec,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help=".onnx, .pt2, .xml (OpenVINO) or .pte (ExecuTorch) file."),
    ] = Path("model.onnx"),
    weights: opt.Weights = None,
    saved: SavedFile = None,
    data: opt.OptionalData = None,
    image_size: opt.ImageSize = None,
    classes: opt.Classes = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="In 8 bits, calibrated on the data's calibration split: .onnx or .pte.")
    ] = False,
    trust: opt.Trust = False,
) -> None:
    """Write a network for a runtime and check that the runtime agrees.

    Give --saved for the network of a run, or --weights for a network as it is.

    Example: palmette export -m palmette:mlp -d digits --saved runs/first/model.safetensors -o small.onnx
    """
    from palmette.deploy import export as export_network
    from palmette.graph import load

    network, example = opt.load_model(model, weights, data, image_size, classes, trust)
    if saved is None:
        opt.warn_of_random_weights(model, weights)
    else:
        network = load(network, saved)
    if int8:
        tables.say(str(_quantized(network.eval(), example, data, out)))
    else:
        tables.say(f"{out}: {export_network(network.eval(), example, out)}")


def _quantized(network: Any, example: Any, data: str | None, out: Path) -> Any:
    """The network in 8 bits, in the format that the suffix names."""
    from palmette.deploy import quantize_int8
    from palmette.errors import InputError
    from palmette.resolve import resolve_data

    backend = {".onnx": "onnxruntime", ".pte": "executorch"}.get(out.suffix.lower())
    if backend is None:
        raise InputError(f"no 8-bit export is known for the suffix '{out.suffix}'", fix="Use .onnx or .pte")
    if data is None:
        raise InputError("8 bits need real inputs, to learn the ranges of activations", fix="Add --data SPEC")
    source = resolve_data(data, model_input=example)
    return quantize_int8(network, example, source.calibration, out, backend=backend)


def report(run: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.", show_default=False)]) -> None:
    """Draw the report of a run again from its files.

    Example: palmette report runs/first
    """
    from palmette.report import render

    tables.say(f"Report: {render(run)}")
