"""From what a user types (`timm:resnet18`, `cifar10:DIR`, `path/file.py:function`) to a network and its data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palmette.data import Data, load_source
from palmette.data.options import HELP as DATA_HELP
from palmette.errors import DataError, InputError
from palmette.graph.inputs import Example, call, main_output, split_batch, with_batch
from palmette.usercode import call_user_function, is_file_spec
from palmette.weights import load_weights
from palmette.zoo import MODEL_HELP, Shape, build_model, declared_shape, example_for

__all__ = [
    "DATA_HELP",
    "MODEL_HELP",
    "Data",
    "ResolvedModel",
    "check_input",
    "load_weights",
    "resolve_data",
    "resolve_model",
    "resolve_pair",
]

Size = int | tuple[int, int]
_SIZES = (224, 32, 96, 128, 64, 28, 16, 8, 192, 256, 160, 299, 384)  # tried, in this order, to say what a model accepts


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A network in eval mode, its specification, and example inputs (a batch of 2) where that tells them."""

    model: nn.Module
    example_inputs: Example | None
    spec: str


def resolve_model(
    spec: str,
    weights: Path | None = None,
    *,
    num_classes: int | None = None,
    input_shape: Shape | None = None,
    image_size: Size | None = None,
    trust: bool = False,
) -> ResolvedModel:
    """The network that `spec` names (MODEL_HELP lists the forms), with `weights` loaded into it where given.

    `num_classes` sizes the head where the maker can; `input_shape` (channels, height, width) is what the data gives,
    and networks of the zoo are built for it; `image_size` changes the size of the example inputs. `trust` lets a
    Hugging Face folder run its own code. Raises InputError for a spec, file or function that cannot be used,
    MissingDependency for a package that is not installed.
    """
    shape = input_shape or declared_shape(spec)
    if image_size is not None:
        shape = (shape[0] if shape else 3, *_pair(image_size))
    if is_file_spec(spec):
        model, example = _user_model(spec, num_classes)
    else:
        model, example = build_model(spec, num_classes=num_classes, shape=shape, trust=trust), None
    if weights is not None:
        load_weights(model, weights)
    model.eval()
    if example is None:
        example = example_for(model, shape)
    return ResolvedModel(model=model, example_inputs=example, spec=spec)


def resolve_data(
    spec: str,
    *,
    image_size: Size | None = None,
    batch_size: int = 64,
    seed: int = 0,
    model_input: Example | None = None,
) -> Data:
    """The loaders that `spec` names (DATA_HELP lists the forms).

    Images take the size that the spec's options say, else `image_size` (pixels, or height and width), else that of
    `model_input`, else their own. Raises InputError for a spec or function that cannot be used, DataError for data
    that cannot be read.
    """
    size = None if image_size is None else _pair(image_size)
    expected = None if model_input is None else image_shape(model_input)
    if size is None and expected is not None:
        size = expected[1:]
    if is_file_spec(spec):
        return _user_data(spec, image_size=size, batch_size=batch_size, seed=seed)
    return load_source(spec, image_size=size, batch_size=batch_size, seed=seed)


def resolve_pair(
    model: str,
    data: str,
    weights: Path | None = None,
    *,
    num_classes: int | None = None,
    image_size: Size | None = None,
    batch_size: int = 64,
    seed: int = 0,
    trust: bool = False,
) -> tuple[ResolvedModel, Data]:
    """A network and data that fit: images of the size that the model declares, a head for the data's classes.

    Networks of palmette's zoo follow the data instead. Example inputs come from the data. Raises InputError as the
    two resolvers do, and when the model refuses the images or has another number of outputs than the data has
    classes.
    """
    declared = None if model.startswith("palmette:") else declared_shape(model)
    found = resolve_data(
        data, image_size=image_size or (declared[1:] if declared else None), batch_size=batch_size, seed=seed
    )
    example = found.example_inputs
    shape, classes = image_shape(example), num_classes or found.num_classes
    resolved = resolve_model(model, weights, num_classes=classes, input_shape=shape, trust=trust)
    check_input(resolved.model, example, num_classes=classes, where=f"{model} on {data}", declared=declared)
    return replace(resolved, example_inputs=example), found


def check_input(
    model: nn.Module,
    example_inputs: Example,
    *,
    num_classes: int | None = None,
    where: str = "model",
    declared: Shape | None = None,
) -> None:
    """Run one batch through `model` in eval mode; its state is not changed.

    Raises InputError when it refuses the batch, naming the shape that it got and one that it accepts (`declared`, or
    found by trial), and when its outputs are not [batch, classes] with `num_classes` classes.
    """
    try:
        output = main_output(_run(model, example_inputs))
    except _REFUSALS as error:
        raise _refused(model, example_inputs, error, where, declared) from error
    if num_classes is not None and (output.dim() != 2 or output.shape[1] != num_classes):
        raise InputError(
            f"the model returns {_shape(output.shape[1:])} outputs for an image, the data has {num_classes} classes",
            where=where,
            fix="Give the model a head of that many outputs",
        )


_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError, KeyError, AttributeError)


def image_shape(inputs: Example) -> Shape | None:
    """(channels, height, width) of a batch of images [B, C, H, W]; None for anything else."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        return None
    return int(inputs.shape[1]), int(inputs.shape[2]), int(inputs.shape[3])


def _refused(model: nn.Module, inputs: Example, error: BaseException, where: str, declared: Shape | None) -> InputError:
    why = re.sub(r"\s+", " ", str(error))[:200] or type(error).__name__
    got = image_shape(inputs)
    if got is None or not isinstance(inputs, Tensor):
        return InputError("the model refuses the data's inputs", where=where, why=why)
    wanted = next((shape for shape in _shapes(got, declared) if _accepts(model, shape, inputs)), None)
    if wanted is None:
        return InputError(f"the model refuses images of {_shape(got)}", where=where, why=why)
    options = [f"size={_shape(wanted[1:]) if wanted[1] != wanted[2] else wanted[1]}"] if wanted[1:] != got[1:] else []
    options += [f"channels={wanted[0]}"] if wanted[0] != got[0] else []
    return InputError(
        f"the model refuses images of {_shape(got)}",
        where=where,
        why=f"it accepts {_shape(wanted)} ({why})",
        fix=f"Give the data the options ?{'&'.join(options)}",
    )


def _shapes(got: Shape, declared: Shape | None) -> Iterator[Shape]:
    if declared is not None and declared != got:
        yield declared
    for channels in dict.fromkeys((got[0], 3, 1)):
        yield from ((channels, side, side) for side in _SIZES if (channels, side, side) != got)
        if channels != got[0]:
            yield channels, got[1], got[2]


def _accepts(model: nn.Module, shape: Shape, like: Tensor) -> bool:
    try:
        _run(model, torch.zeros(2, *shape, dtype=like.dtype, device=like.device))
    except _REFUSALS:
        return False
    return True


def _run(model: nn.Module, inputs: Example) -> Any:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return call(model, inputs)
    finally:
        for module, training in modes.items():
            module.training = training


def _user_model(spec: str, num_classes: int | None) -> tuple[nn.Module, Example | None]:
    offered = {} if num_classes is None else {"num_classes": num_classes}
    made = call_user_function(spec, **offered)
    if isinstance(made, nn.Module):
        return made, None
    if isinstance(made, tuple) and made and isinstance(made[0], nn.Module):
        if len(made) != 2 or not isinstance(made[1], Tensor | tuple | list | dict):
            raise InputError("the function returned a module and something else than example inputs", where=spec)
        example: Any = made[1]
        return made[0], example
    raise InputError(
        f"the function returned {_kind(made)}", where=spec, fix="Return an nn.Module, or (module, example_inputs)"
    )


def _user_data(spec: str, **offered: Any) -> Data:
    """Loaders from the user's function: a Data, a dict with train, val and more, or (train, val[, test])."""
    made = call_user_function(spec, **{name: value for name, value in offered.items() if value is not None})
    if isinstance(made, Data):
        return made
    known = ("train", "val", "test", "calibration", "num_classes", "classes", "example_inputs")
    if isinstance(made, tuple | list) and len(made) in (2, 3):
        made = dict(zip(known, made, strict=False))
    if not isinstance(made, Mapping) or not {"train", "val"} <= set(made) or not set(made) <= set(known):
        raise InputError(
            f"the function returned {_kind(made)}",
            where=spec,
            fix=f"Return loaders (train, val) or (train, val, test), or a dict of {', '.join(known)}",
        )
    loaders = {name: _loader(made[name], name, spec) for name in known[:4] if made.get(name) is not None}
    if {"train", "val"} - set(loaders):
        raise InputError("train and val must be loaders, not None", where=spec)
    classes = tuple(made.get("classes") or getattr(getattr(made["val"], "dataset", None), "classes", None) or ())
    example = made.get("example_inputs")
    return Data(
        name=spec,
        train=loaders["train"],
        val=loaders["val"],
        test=loaders.get("test"),
        calibration=loaders.get("calibration", loaders["train"]),
        num_classes=made.get("num_classes") or len(classes) or None,
        classes=tuple(str(name) for name in classes),
        example_inputs=_first_inputs(loaders["val"], spec) if example is None else example,
        description=f"{spec}: the user's loaders {', '.join(loaders)}",
    )


def _loader(value: Any, name: str, spec: str) -> Iterable[Any]:
    if isinstance(value, Iterator):
        raise DataError(f"{name} is an iterator, which can be read only once", where=spec, fix="Return a DataLoader")
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping | Tensor):
        raise InputError(
            f"{name} is {_kind(value)}, not a loader",
            where=spec,
            fix="Return a DataLoader that yields (inputs, target)",
        )
    return value


def _first_inputs(loader: Iterable[Any], spec: str) -> Example:
    try:
        for batch in loader:
            inputs: Example = with_batch(split_batch(batch)[0], 2)
            return inputs
    except DataError as error:
        raise DataError(error.what, where=spec, why=error.why, fix=error.fix) from error
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError("the validation loader failed at its first batch", where=spec, why=why) from error
    raise DataError("the validation loader is empty", where=spec)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _shape(sides: Iterable[int]) -> str:
    return "x".join(str(int(side)) for side in sides)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, list(value)[:6])) or 'nothing'}"
    return "None" if value is None else f"a {type(value).__name__}"
