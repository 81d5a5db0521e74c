"""Files that runtimes load, each held against the network that it came from: ONNX, exported programs, OpenVINO IR,
ExecuTorch programs, and int8 versions of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from palmette.deploy.executorch import export_executorch
from palmette.deploy.onnx import export_onnx
from palmette.deploy.openvino import export_openvino
from palmette.deploy.parity import Parity
from palmette.deploy.program import export_program, load_program
from palmette.deploy.quantize import Quantized, quantize_int8
from palmette.deploy.runtime import runtime_parity
from palmette.deploy.session import OrtSession
from palmette.errors import ExportError
from palmette.graph.inputs import Example
from palmette.meter.runtimes import has_onnx

__all__ = [
    "OrtSession",
    "Parity",
    "Quantized",
    "export",
    "export_all",
    "export_executorch",
    "export_onnx",
    "export_openvino",
    "export_program",
    "load_program",
    "quantize_int8",
    "runtime_parity",
]

_BY_SUFFIX = {
    ".onnx": export_onnx,
    ".pt2": export_program,
    ".xml": export_openvino,
    ".pte": export_executorch,
}


def export(
    model: nn.Module, example_inputs: Example, path: str | Path, *, batches: Iterable[Any] | None = None
) -> Parity:
    """Write `model` to `path` and return the measured parity.

    The suffix names the format: .onnx, .pt2 (exported program), .xml (OpenVINO IR) or .pte (ExecuTorch with XNNPACK).
    `batches`: real inputs, each shaped like `example_inputs` (or `(inputs, target)` pairs), for the parity check.
    Raises ExportError for another suffix, a model that cannot be exported, or a parity that fails; no file is left.
    Raises MissingDependency without the format's packages.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _BY_SUFFIX:
        raise ExportError(
            f"No export is known for the suffix '{suffix}'", where=str(path), fix=f"Use one of {', '.join(_BY_SUFFIX)}."
        )
    return _BY_SUFFIX[suffix](model, example_inputs, path, batches=batches)


def export_all(
    model: nn.Module, example_inputs: Example, folder: Path, *, batches: Iterable[Any] | None = None
) -> dict[str, Any]:
    """Write model.pt2, and model.onnx where ONNX is installed, into `folder`; the parity of each as JSON.

    A format that fails is named with its "error", and the next is written.
    """
    found: dict[str, Any] = {}
    for kind in ("onnx", "pt2") if has_onnx() else ("pt2",):
        try:
            found[kind] = export(model, example_inputs, folder / f"model.{kind}", batches=batches).to_dict()
        except ExportError as error:
            found[kind] = {"error": str(error)}
    return found
