"""Options that several commands share, and how they become models, data and training settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palmette.cli import tables

if TYPE_CHECKING:
    from palmette.resolve import Data, ResolvedModel

ModelSpec = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="SPEC",
        show_default=False,
        help="palmette:NAME, timm:NAME, torchvision:NAME, hf:PATH, or path/file.py:function.",
    ),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", "-w", metavar="FILE", help="safetensors, or a .pt that holds weights only.")
]
DataSpec = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        metavar="SPEC",
        show_default=False,
        help="digits, cifar10:DIR, fashion-mnist:DIR, imagefolder:DIR, each with options such as ?size=96&norm=half "
        "behind it (in quotes), or path/file.py:function.",
    ),
]
OptionalData = Annotated[
    str | None,
    typer.Option(
        "--data", "-d", metavar="SPEC", help="Data that shows the shape of the input; see palmette shrink --help."
    ),
]
ImageSize = Annotated[int | None, typer.Option("--image-size", min=1, help="Images of N times N pixels.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")]
Classes = Annotated[int | None, typer.Option("--classes", min=1, help="Number of classes, where no data tells it.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Let files of others run their code. Only for sources that you trust.")
]
Devices = Annotated[
    int,
    typer.Option(
        "--devices", min=1, help="GPUs, or processes where there is none, that work together; --batch-size is each's."
    ),
]
Nodes = Annotated[
    int, typer.Option("--nodes", min=1, help="Machines with so many devices each; start the command on every one.")
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help='Where trials run: "local", "auto" or the address of a Ray cluster.'),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]

RUNTIME_NAMES = "eager, compile, onnxruntime, openvino, openvino-bf16, executorch"
"""Of `palmette.meter.RUNTIMES`, written out because that would import torch for a help page."""
CostName = Annotated[
    str | None,
    typer.Option(
        "--cost",
        metavar="RUNTIME",
        help=f"The clock that decides: {RUNTIME_NAMES}, macs, or a cost_table.json. Default: onnxruntime if installed.",
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="NAME=VALUE", help="An option of the method (palmette methods NAME); may be repeated."
    ),
]
Protect = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH", help="Leave the site, or all sites below this path, alone; may be repeated."),
]
Width = Annotated[
    list[float] | None,
    typer.Option(
        metavar="SHARE", help="A share of channels that may stay; may be repeated. If not given 0.5, 0.75, 1."
    ),
]
Depth = Annotated[int, typer.Option(min=0, help="Blocks that may be left out at the end of each chain of equal ones.")]
Kernel = Annotated[
    list[int] | None,
    typer.Option(metavar="EDGE", help="An edge to which larger kernels may be cropped; may be repeated. 0: none."),
]
Heads = Annotated[
    list[float] | None,
    typer.Option(metavar="SHARE", help="A share of attention heads that may stay; may be repeated. 1: all stay."),
]
Bits = Annotated[
    list[int] | None,
    typer.Option(metavar="BITS", help="8 lets the weight of each layer be stored in 8 bits, with a scale per channel."),
]
Resolution = Annotated[
    list[int] | None,
    typer.Option(
        metavar="EDGE", help="Pixels to which square images may be scaled; may be repeated. Else as they are."
    ),
]
Pad = Annotated[
    str | None, typer.Option(help="Borders of merged convolutions: repad (if not given), exact or bias_map.")
]
Epochs = Annotated[int | None, typer.Option(help="Healing epochs per round; 5 if not given.")]
Rate = Annotated[float | None, typer.Option(help="Healing learning rate; 0.01 if not given.")]
Optimizer = Annotated[str | None, typer.Option(help="Healing optimizer: sgd (if not given) or adamw.")]
Distill = Annotated[
    float | None, typer.Option(help="Weight of distillation from the dense network, 0 (if not given) to 1.")
]
Temperature = Annotated[float | None, typer.Option(help="Softening of distillation; 2 if not given.")]
Features = Annotated[
    float | None, typer.Option(help="Weight of distillation inside the network, 0 (if not given) or more.")
]
Fade = Annotated[
    float | None, typer.Option(help="Share of healing over which an edit is faded in, 0 (if not given) to 1.")
]
Precision = Annotated[
    str | None, typer.Option(help="Healing precision: auto (if not given), 32-true, bf16-mixed, 16-mixed, ...")
]


def method_config(method: str, options: list[str] | None) -> Any:
    """The method's config from texts such as "rate=0.5"; None without any. Raises InputError, UnknownMethod."""
    from palmette.registry import get_method

    return get_method(method).make_config(**typed(options)) if options else None


def method_options(method: str, options: list[str] | None, *, verb: str) -> Any:
    """The options of a method of this verb, whose own "auto" and "lossless" have none.

    Raises InputError for a method of another verb and for options that it does not have, UnknownMethod.
    """
    from palmette.errors import InputError
    from palmette.registry import method_of

    if method in ("auto", "lossless"):
        if options:
            raise InputError(f"method {method!r} of palmette {verb} has no options", fix="Leave --option out")
        return None
    return method_of(verb, method).make_config(**typed(options))


def typed(options: list[str] | None) -> dict[str, Any]:
    """Names and values from texts such as "rate=0.5". Raises InputError."""
    from palmette.errors import InputError

    given: dict[str, Any] = {}
    for text in options or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--option {text!r} is no NAME=VALUE", fix="Write for instance --option batches=4")
        try:
            given[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            given[name.strip().replace("-", "_")] = value
    return given


def device_of(name: str | None) -> Any:
    """The device of that name; a GPU if there is one, else the CPU, where no name is given. Raises InputError."""
    import torch

    from palmette.errors import InputError

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"there is no device {name!r}", why=str(error).splitlines()[0], fix="Write cpu or cuda"
        ) from error
    return device


def load_pair(
    model: str, weights: Path | None, data: str, image_size: int | None, batch_size: int, seed: int, trust: bool
) -> tuple[ResolvedModel, Data]:
    """The model and the data of a command; the data's number of classes shapes the model where it may choose.

    Weights that nobody gives are drawn from the seed, so that --resume meets the same network again.
    """
    from palmette.resolve import resolve_pair
    from palmette.seeding import seeded

    with seeded("model", seed):
        return resolve_pair(model, data, weights, image_size=image_size, batch_size=batch_size, seed=seed, trust=trust)


def load_model(
    model: str, weights: Path | None, data: str | None, image_size: int | None, classes: int | None, trust: bool
) -> tuple[Any, Any]:
    """A model and example inputs for it, from the data, from the model's own specification, or from `--image-size`.

    Raises InputError when nothing tells the input's shape.
    """
    from palmette.errors import InputError
    from palmette.resolve import resolve_model, resolve_pair

    if data is not None:
        pair, _ = resolve_pair(model, data, weights, num_classes=classes, image_size=image_size, trust=trust)
        return pair.model, pair.example_inputs
    resolved = resolve_model(model, weights, num_classes=classes, image_size=image_size, trust=trust)
    if resolved.example_inputs is None:
        raise InputError("the shape of the model's input is not known", fix="Add --data SPEC or --image-size PIXELS")
    return resolved.model, resolved.example_inputs


def warn_of_random_weights(model: str, weights: Path | None) -> None:
    """Say so when nothing gives the network its weights: names of libraries stand for architectures."""
    if weights is None and model.startswith(("palmette:", "timm:", "torchvision:")):
        tables.say(f"Note: {model} has random weights, because no --weights FILE was given")


def heal_config(**given: Any) -> Any:
    """A HealConfig with the options that were given (those not None); raises InputError for a value out of bounds."""
    from palmette.train.loop import HealConfig

    known = {field.name for field in dataclasses.fields(HealConfig)}
    return HealConfig(**{name: value for name, value in given.items() if value is not None and name in known})


def elastic(
    width: list[float] | None,
    depth: int,
    kernel: list[int] | None,
    heads: list[float] | None,
    resolution: list[int] | None,
    bits: list[int] | None,
    protect: list[str] | None,
) -> dict[str, Any]:
    """Options of `Supernet.from_model`; what was not given keeps its default."""
    kernel = None if kernel is None else [size for size in kernel if size]
    given = {
        "width": width,
        "kernel": kernel,
        "heads": heads,
        "resolution": resolution,
        "bits": bits,
        "protect": protect,
    }
    return {"depth": depth} | {name: tuple(values) for name, values in given.items() if values is not None}
