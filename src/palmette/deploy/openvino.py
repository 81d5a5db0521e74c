"""OpenVINO IR: two files, .xml and .bin, with a dynamic batch, compared with the network before they appear."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palmette.compat import optional
from palmette.deploy.parity import Parity, measure_parity
from palmette.deploy.plain import Prepared
from palmette.errors import ExportError
from palmette.files import atomic_path
from palmette.graph.inputs import Example, as_call, batch_size, tensors
from palmette.meter.running import Flat, quiet, reason
from palmette.meter.runtime_openvino import Compiled, fix_shapes, from_program, openvino_compiled, read_model

_AUTO = torch.export.Dim.AUTO


def export_openvino(
    model: nn.Module, example_inputs: Example, path: str | Path, *, batches: Iterable[Any] | None = None
) -> Parity:
    """Write `model` as OpenVINO IR with a dynamic batch, and return its parity in OpenVINO, computing in float32.

    `path` ends in .xml; the weights, in float32, are in a .bin beside it. `batches`: real inputs for the parity check,
    besides the example and random ones. Raises ExportError (nothing is written then) when the model cannot be
    converted, when the comparison is not informative, or when OpenVINO disagrees; MissingDependency without openvino.
    """
    openvino = optional("openvino", package="palmette[openvino]")
    prepared = Prepared(model, example_inputs)
    target = Path(path)
    try:
        converted = _convert(prepared)
    except Exception as error:  # torch.export and OpenVINO's front end raise whatever they like
        raise ExportError(
            "The model cannot be written for OpenVINO",
            why=reason(error),
            fix="Export to .onnx, which OpenVINO reads.",
        ) from error
    with atomic_path(target) as xml, atomic_path(target.with_suffix(".bin")) as weights:
        with quiet():
            openvino.save_model(converted, str(xml), compress_to_fp16=False)
        xml.with_suffix(".bin").replace(weights)
        compiled = openvino_compiled(read_model(str(xml), str(weights)), torch.get_num_threads())
        written = Compiled(compiled, input_names(prepared.inputs))
        return measure_parity(
            prepared.reference,
            written.outputs,
            example_inputs,
            batches,
            main=prepared.main,
            runtime="OpenVINO (float32)",
        )


def _convert(prepared: Prepared) -> Any:
    """An OpenVINO model with named inputs and outputs; inputs that nothing reads are missing."""
    arguments = tuple(tensors(prepared.inputs))
    size = batch_size(prepared.inputs)
    axes = tuple({0: _AUTO} if t.dim() and t.shape[0] == size else None for t in arguments)
    with quiet():
        program = torch.export.export(Flat(prepared.model, prepared.inputs).eval(), arguments, dynamic_shapes=(axes,))
    names = input_names(prepared.inputs)
    converted = from_program(program, names)
    shapes = [
        [-1 if axis == 0 and marked else length for axis, length in enumerate(tensor.shape)]
        for tensor, marked in zip(arguments, axes, strict=True)
    ]
    fix_shapes(converted, names, shapes)
    for port, name in zip(converted.outputs, prepared.output_names or (), strict=False):
        port.get_tensor().set_names({name})
    return converted


def input_names(inputs: Any) -> list[str]:
    """Names for the tensors of `inputs`: the keys of a flat dict, else "input" or "input_0", "input_1", ..."""
    args, kwargs = as_call(inputs)
    found = tensors(inputs)
    if len(kwargs) == len(found):
        return list(kwargs)
    return ["input"] if len(args) == 1 == len(found) else [f"input_{i}" for i in range(len(found))]
