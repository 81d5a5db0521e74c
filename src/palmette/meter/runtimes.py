"""Ways to run a network, for timing: PyTorch itself, and ONNX Runtime through a short-lived export."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.utils._pytree import tree_leaves

from palmette.errors import ExportError, InputError, MissingDependency
from palmette.graph.inputs import call, map_tensors, tensors
from palmette.meter.compute import evaluating

Runner = Callable[[], Any]
"""One forward pass, with model and inputs bound."""

RUNTIMES = ("eager", "onnxruntime")


def check_runtime(runtime: str) -> str:
    """`runtime` itself. Raises InputError for an unknown one, MissingDependency when its packages are not installed."""
    if runtime not in RUNTIMES:
        raise InputError(f"No runtime is called {runtime!r}", fix=f"Known: {', '.join(RUNTIMES)}.")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if runtime == "onnxruntime" and missing:
        raise MissingDependency(
            f"ONNX Runtime needs {', '.join(missing)}", fix="Install with `pip install palmette[onnx]`."
        )
    return runtime


def runners(
    models: dict[str, nn.Module], inputs: Any, runtime: str, threads: int, *, fast: bool = False
) -> dict[str, Runner]:
    """One bound forward pass per model, which is expected in eval mode. fast: see `to_onnx`."""
    check_runtime(runtime)
    if runtime == "eager":
        return {name: lambda model=model: call(model, inputs) for name, model in models.items()}  # type: ignore[misc]
    feeds = {f"in{i}": t.detach().cpu().numpy() for i, t in enumerate(tensors(inputs))}
    found: dict[str, Runner] = {}
    for name, graph in zip(models, to_onnx(list(models.values()), inputs, fast=fast), strict=True):
        session = onnx_session(graph, threads)
        used = {i.name: feeds[i.name] for i in session.get_inputs()}
        found[name] = lambda session=session, used=used: session.run(None, used)  # type: ignore[misc]
    return found


def onnx_session(graph: bytes, threads: int) -> Any:
    """An ONNX Runtime session on the CPU with `threads` intra-op threads and one inter-op thread.

    Its threads stop spinning when a run ends, so that they do not slow what is timed next.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
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
    error: Exception | None = None
    for dynamo in (False, True) if fast else (True,):
        try:
            return [_export(model, inputs, dynamo) for model in models]
        except Exception as caught:  # noqa: BLE001 - exporters raise whatever they like
            error = caught
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise ExportError("The network cannot be exported to ONNX", why=reason) from error


def _export(model: nn.Module, inputs: Any, dynamo: bool) -> bytes:
    flat = _Flat(model, inputs)
    arguments = tuple(tensors(inputs))
    names = [f"in{i}" for i in range(len(arguments))]
    with tempfile.TemporaryDirectory() as folder, evaluating(model), quiet():
        warnings.simplefilter("error", TracerWarning)  # a value that became a constant
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            flat.eval(), arguments, path, input_names=names, dynamo=dynamo, verbose=False, external_data=not dynamo
        )
        return path.read_bytes()


class _Flat(nn.Module):
    """A model as a function of its input tensors, in the order of `tensors(inputs)`, to a tuple of tensors."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model = model
        self.form = (inputs,)  # in a tuple: a tensor attribute would become a constant of the graph

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        following = iter(arguments)
        output = call(self.model, map_tensors(lambda _: next(following), self.form[0]))
        return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, logs or prints from inside the block."""
    level, log = logging.root.manager.disable, torch._C._jit_onnx_log
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        torch._C._jit_onnx_log = lambda *_: None  # the older exporter's log goes past Python's streams
        try:
            yield
        finally:
            logging.disable(level)
            torch._C._jit_onnx_log = log
