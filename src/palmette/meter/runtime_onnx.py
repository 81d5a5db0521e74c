"""ONNX Runtime on the CPU, through a short-lived export or with an ONNX graph that exists already."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from palmette.compat import optional
from palmette.errors import ExportError, InputError
from palmette.graph.inputs import batch_size, tensors
from palmette.meter.compute import evaluating
from palmette.meter.onnx_memory import remembered
from palmette.meter.running import Flat, Loaded, Packed, Runner, Runtime, first_that_works, quiet


class OnnxModel(Packed):
    """An ONNX graph (its file's bytes) as a module: takes the network's inputs, returns a tensor or a tuple of them.

    The first axis must be dynamic to take batches of several sizes. `measure_latency` times it beside plain networks:
    "eager" calls it, "onnxruntime" and "openvino" load the graph itself. Raises ExportError when a runtime refuses the
    graph, InputError for inputs that are not the graph's.
    """

    runtimes = ("eager", "onnxruntime", "openvino", "openvino-bf16")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; arguments as the network takes them, by the graph's names where these are given."""
        threads = torch.get_num_threads()
        if threads not in self._sessions:
            self._sessions[threads] = onnx_session(self.content, threads)
        session = self._sessions[threads]
        found = [torch.from_numpy(array) for array in session.run(None, feeds_by_order(session, kwargs or args))]
        return found[0] if len(found) == 1 else tuple(found)


def feeds_by_order(session: Any, inputs: Any) -> dict[str, Any]:
    """Arrays for the session's inputs: by name for a dict that has them all, else in order. Raises InputError."""
    names = [entry.name for entry in session.get_inputs()]
    if isinstance(inputs, dict) and set(names) <= set(inputs):
        return {name: _array(inputs[name]) for name in names}
    given = tensors(inputs)
    if len(given) != len(names):
        raise InputError(f"The ONNX graph takes the inputs {names}, and {len(given)} tensors were given")
    return {name: _array(tensor) for name, tensor in zip(names, given, strict=True)}


def onnx_session(graph: bytes, threads: int, batch: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU with `threads` intra-op threads and one inter-op thread.

    Its threads stop spinning when a run ends, so that they do not slow what is timed next. batch: fixes an axis called
    "batch", so that the graph is planned for it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise ExportError(
            "ONNX Runtime does not run this network",
            why=" ".join(str(error).split())[:200],
            fix="Measure with the runtime 'eager', or use float32.",
        ) from error


def to_onnx(models: list[nn.Module], inputs: Any, *, fast: bool = False) -> list[bytes]:
    """ONNX graphs of the models at the shapes of `inputs`, all by the same exporter so that they compare.

    Inputs are named in0, in1, ... in the order of `tensors(inputs)`. fast: by torch's older exporter (some 10 ms, not a
    second) where it can do all of them and follows every value. Raises ExportError when a model does not export.
    """

    def by(dynamo: bool) -> list[bytes]:
        if not dynamo:
            return [_export(model, inputs, dynamo) for model in models]
        return [remembered(model, inputs, functools.partial(_export, model, inputs, dynamo)) for model in models]

    attempts = [functools.partial(by, dynamo) for dynamo in ((False, True) if fast else (True,))]
    graphs: list[bytes] = first_that_works("The network cannot be exported to ONNX", *attempts)
    return graphs


def _export(model: nn.Module, inputs: Any, dynamo: bool) -> bytes:
    flat = Flat(model, inputs)
    arguments = tuple(tensors(inputs))
    names = [f"in{i}" for i in range(len(arguments))]
    with tempfile.TemporaryDirectory() as folder, evaluating(model), quiet():
        warnings.simplefilter("error", TracerWarning)  # a value that became a constant
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            flat.eval(), arguments, path, input_names=names, dynamo=dynamo, verbose=False, external_data=not dynamo
        )
        return path.read_bytes()


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


class _Session:
    """A graph in ONNX Runtime; numbered: its inputs are called in0, in1, ..., and some may be missing."""

    def __init__(self, session: Any, *, numbered: bool) -> None:
        self.session, self.numbered = session, numbered

    def feeds(self, inputs: Any) -> dict[str, Any]:
        if not self.numbered:
            return feeds_by_order(self.session, inputs)
        arrays = {f"in{i}": _array(tensor) for i, tensor in enumerate(tensors(inputs))}
        return {entry.name: arrays[entry.name] for entry in self.session.get_inputs()}

    def bind(self, inputs: Any) -> Runner:
        session, feeds = self.session, self.feeds(inputs)
        return lambda: session.run(None, feeds)

    def outputs(self, inputs: Any) -> list[Tensor]:
        return [torch.from_numpy(array) for array in self.session.run(None, self.feeds(inputs))]


def _load(models: list[nn.Module], inputs: Any, threads: int, fast: bool) -> list[Loaded]:
    optional("onnxruntime", package="palmette[onnx]")
    plain = [model for model in models if not isinstance(model, OnnxModel)]
    exported = iter(to_onnx(plain, inputs, fast=fast))
    return [
        _Session(onnx_session(model.content, threads, batch_size(inputs)), numbered=False)
        if isinstance(model, OnnxModel)
        else _Session(onnx_session(next(exported), threads), numbered=True)
        for model in models
    ]


RUNTIME = Runtime(
    name="onnxruntime",
    title="ONNX Runtime",
    load=_load,
    modules=("onnx", "onnxscript", "onnxruntime"),
    extra="onnx",
    library="onnxruntime",
)
