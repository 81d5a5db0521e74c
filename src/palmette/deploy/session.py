"""A network file in ONNX Runtime, called like the network itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palmette.errors import ExportError, MissingDependency
from palmette.graph.inputs import Example, tensors


def require(*packages: str) -> Any:
    """Import the packages and return the first one. Raises MissingDependency, which says how to install them."""
    found = []
    for name in packages:
        try:
            found.append(importlib.import_module(name))
        except ImportError as error:
            raise MissingDependency(
                f"ONNX needs the package '{name}'", why=str(error), fix="pip install 'palmette[onnx]'"
            ) from error
    return found[0]


class OrtSession:
    """An ONNX file loaded in ONNX Runtime on the CPU.

    `threads`: intra-operator threads, None for the runtime's own choice. Raises ExportError when it does not load.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        ort = require("onnxruntime")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own, one per status code
            raise ExportError("ONNX Runtime cannot load the file", where=str(path), why=str(error)[:300]) from error
        self.input_names = [i.name for i in self._session.get_inputs()]
        self.output_names = [o.name for o in self._session.get_outputs()]

    def feed(self, inputs: Example) -> dict[str, Any]:
        """The runtime's named arrays for `inputs`: by key for a dict, else in order."""
        if isinstance(inputs, dict) and set(self.input_names) <= set(inputs):
            return {name: inputs[name].detach().cpu().numpy() for name in self.input_names}
        found = tensors(inputs)
        if len(found) != len(self.input_names):
            raise ExportError(f"The file takes the inputs {self.input_names}, and {len(found)} tensors were given")
        return {name: t.detach().cpu().numpy() for name, t in zip(self.input_names, found, strict=True)}

    def __call__(self, inputs: Example) -> list[Tensor]:
        """Every output of the network, in order."""
        return [torch.from_numpy(array) for array in self._session.run(None, self.feed(inputs))]
