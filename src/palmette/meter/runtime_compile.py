"""torch.compile with its default back end (Inductor): C++ on the CPU, Triton on a GPU; on the model's device."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from palmette.errors import ExportError, MissingDependency
from palmette.graph.inputs import call, tensors
from palmette.meter.running import Loaded, Runner, Runtime, flat_outputs, quiet, reason


class _Compiled:
    def __init__(self, function: Any) -> None:
        self.function = function

    def bind(self, inputs: Any) -> Runner:
        return functools.partial(call, self.function, inputs)

    def outputs(self, inputs: Any) -> list[Tensor]:
        with torch.inference_mode():
            return flat_outputs(call(self.function, inputs))


def _load(models: list[nn.Module], inputs: Any, threads: int, fast: bool) -> list[Loaded]:
    """Compiled and run once, in inference mode as they will be timed. Threads are torch's, which the caller sets."""
    del threads, fast
    if not any(tensor.device.type == "cuda" for tensor in tensors(inputs)):
        need_compiler()
    return [_Compiled(_compiled(model, inputs)) for model in models]


def _compiled(model: nn.Module, inputs: Any) -> Any:
    function: Any = torch.compile(_own_code(model), dynamic=False)
    try:
        with quiet(), torch.inference_mode():
            call(function, inputs)
    except Exception as error:  # Dynamo and Inductor raise whatever their parts and the compiler raise
        raise ExportError(
            "torch.compile cannot compile this network", why=reason(error), fix="Measure with the runtime 'eager'."
        ) from error
    return function


def _own_code(model: nn.Module) -> Any:
    """The model's call as a function with a code object of its own.

    Dynamo keeps its compiled versions per code object and silently runs eagerly after eight: two networks of one class
    would share that limit.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)


def need_compiler() -> None:
    """Raises MissingDependency when Inductor finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise MissingDependency(
            "torch.compile needs a C++ compiler",
            why="none was found",
            fix="Install g++ (or clang++), or name one in the environment variable CXX.",
        ) from error


RUNTIME = Runtime(name="compile", title="torch.compile", load=_load, everywhere=True, check=need_compiler)
