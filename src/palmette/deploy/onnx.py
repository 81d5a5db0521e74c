"""ONNX: one file with a dynamic batch, run in ONNX Runtime and compared with the network before it appears."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palmette.deploy.onnx_int8 import store_as_int8
from palmette.deploy.parity import Parity, measure_parity
from palmette.deploy.plain import Prepared, one_line
from palmette.deploy.session import OrtSession, require
from palmette.errors import ExportError
from palmette.files import atomic_path
from palmette.graph.inputs import Example, as_call
from palmette.graph.int8 import stored_weights
from palmette.meter.running import quiet

_TWO_GIB = 2 * 1024**3
_MARGIN = 64 * 1024**2


def export_onnx(
    model: nn.Module, example_inputs: Example, path: str | Path, *, batches: Iterable[Any] | None = None
) -> Parity:
    """Write `model` as ONNX with a dynamic batch and return its parity in ONNX Runtime.

    `batches`: real inputs for the parity check, besides the example and random ones. One file; weights above 2 GiB go
    into `<path>.data` beside it, because the format ends there. Weights that `model` stores in 8 bits are int8 in the
    file, each behind a DequantizeLinear. Raises ExportError (nothing is written then) when the model cannot be
    exported, when the comparison is not informative, or when the runtime disagrees; MissingDependency without onnx,
    onnxscript and onnxruntime.
    """
    require("onnx", "onnxscript", "onnxruntime")
    prepared = Prepared(model, example_inputs)
    target = Path(path)
    data = target.with_name(f"{target.name}.data") if _bytes(prepared.model) > _TWO_GIB - _MARGIN else None
    try:
        with atomic_path(target) as temporary:
            _write(prepared, temporary, data, int8=bool(stored_weights(model)))
            return measure_parity(
                prepared.reference,
                OrtSession(temporary),
                example_inputs,
                batches,
                main=prepared.main,
                runtime="ONNX Runtime",
            )
    except BaseException:
        if data is not None:
            data.unlink(missing_ok=True)
        raise


def _write(prepared: Prepared, path: Path, data: Path | None, *, int8: bool) -> None:
    """Write the network to `path`, its weights to `data` in the same folder if given; int8: those on a grid so."""
    try:
        with quiet():
            model = _translate(prepared)
            strip_traces(model)
            if int8:
                store_as_int8(model)
            require("onnx_ir").save(model, path, external_data=data.name if data is not None else None)
    except OSError:
        raise
    except Exception as error:  # torch.onnx wraps whatever its passes raise in classes of its own
        raise ExportError(
            "The model cannot be written as ONNX",
            why=one_line(error),
            fix="Replace the operation named, or export to .pt2, which keeps every ATen operation.",
        ) from error


def _translate(prepared: Prepared) -> Any:
    """The network as an onnx_ir model."""
    args, kwargs = as_call(prepared.inputs)
    flat = all(isinstance(v, Tensor) for v in (*args, *kwargs.values()))
    names = list(kwargs) if kwargs else ["input"] if len(args) == 1 else [f"input_{i}" for i in range(len(args))]
    program = torch.onnx.export(
        prepared.model,
        args,
        kwargs=kwargs or None,
        dynamo=True,
        input_names=names if flat else None,
        output_names=prepared.output_names if flat else None,
        dynamic_shapes=prepared.dynamic_shapes("batch"),
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx returned no program")
    return program.model


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def strip_traces(model: Any) -> None:
    """Remove the exporter's notes (stack traces with the paths of this machine) from an onnx_ir model, in place."""
    model.metadata_props.clear()
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
