"""Files that runtimes load: ONNX and exported programs, each held against the network that it came from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from palmette.deploy.onnx import export_onnx
from palmette.deploy.parity import Parity
from palmette.deploy.program import export_program, load_program
from palmette.deploy.session import OrtSession
from palmette.errors import ExportError
from palmette.graph.inputs import Example

__all__ = ["OrtSession", "Parity", "export", "export_onnx", "export_program", "load_program"]

_BY_SUFFIX = {".onnx": export_onnx, ".pt2": export_program}


def export(
    model: nn.Module, example_inputs: Example, path: str | Path, *, batches: Iterable[Any] | None = None
) -> Parity:
    """Write `model` to `path` in the format that its suffix names (`.onnx` or `.pt2`) and return the measured parity.

    `batches`: real inputs, each shaped like `example_inputs` (or `(inputs, target)` pairs), for the parity check.
    Raises ExportError for another suffix, a model that cannot be exported, or a parity that fails; no file is left.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _BY_SUFFIX:
        raise ExportError(
            f"No export is known for the suffix '{suffix}'", where=str(path), fix=f"Use one of {', '.join(_BY_SUFFIX)}."
        )
    return _BY_SUFFIX[suffix](model, example_inputs, path, batches=batches)
