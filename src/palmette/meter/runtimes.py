"""The ways to run a network, by name: PyTorch itself, torch.compile, ONNX Runtime, OpenVINO, ExecuTorch."""

from __future__ import annotations

import copy
import functools
import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from palmette.errors import ExportError, InputError, MissingDependency
from palmette.graph.inputs import call, map_tensors
from palmette.meter import runtime_compile, runtime_executorch, runtime_onnx, runtime_openvino
from palmette.meter.running import Loaded, Packed, Runner, Runtime, flat_outputs


class _Eager:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def bind(self, inputs: Any) -> Runner:
        return functools.partial(call, self.model, inputs)

    def outputs(self, inputs: Any) -> list[Tensor]:
        with torch.inference_mode():
            return flat_outputs(call(self.model, inputs))


def _eager(models: list[nn.Module], inputs: Any, threads: int, fast: bool) -> list[Loaded]:
    del inputs, threads, fast
    return [_Eager(model) for model in models]


_KNOWN = {
    runtime.name: runtime
    for runtime in (
        Runtime(name="eager", title="PyTorch eager", load=_eager, everywhere=True),
        runtime_compile.RUNTIME,
        runtime_onnx.RUNTIME,
        runtime_openvino.RUNTIME,
        runtime_openvino.BFLOAT16,
        runtime_executorch.RUNTIME,
    )
}
RUNTIMES = tuple(_KNOWN)
_LOW_PRECISION = 0.25
"""Tolerance for packed networks of few bits, whose steps every runtime rounds in its own way."""


def has_onnx() -> bool:
    """Whether everything is installed that writing and running ONNX needs."""
    return all(find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime"))


def runtime_named(name: str) -> Runtime:
    """The description of a runtime. Raises InputError for an unknown one."""
    if name not in _KNOWN:
        raise InputError(f"No runtime is called {name!r}", fix=f"Known: {', '.join(RUNTIMES)}.")
    return _KNOWN[name]


def check_runtime(name: str) -> str:
    """`name` itself. Raises InputError for an unknown runtime, MissingDependency when it is not all installed."""
    runtime = runtime_named(name)
    missing = [module for module in runtime.modules if find_spec(module) is None]
    if missing:
        raise MissingDependency(
            f"{runtime.title} needs {', '.join(missing)}", fix=f"Install with `pip install palmette[{runtime.extra}]`."
        )
    if runtime.check is not None:
        runtime.check()
    return name


def load(
    models: dict[str, nn.Module], inputs: Any, runtime: str, threads: int, *, fast: bool = False
) -> dict[str, Loaded]:
    """The models, in eval mode, in a runtime at the shapes of `inputs`. fast: prefer a quicker export.

    What a runtime computes is held against the model itself. Raises InputError and MissingDependency as
    `check_runtime`, InputError for a packed network of another runtime, ExportError when a model does not export or
    the runtime computes something else.
    """
    described = runtime_named(check_runtime(runtime))
    for name, model in models.items():
        if isinstance(model, Packed) and runtime not in model.runtimes:
            raise InputError(
                f"{name!r} is a {type(model).__name__}, which {described.title} does not run",
                fix=f"Use one of {', '.join(model.runtimes)}.",
            )
    here, placed = list(models.values()), inputs
    if not described.everywhere:
        here, placed = [_on_cpu(model) for model in here], map_tensors(lambda t: t.detach().cpu(), inputs)
    found = dict(zip(models, described.load(here, placed, threads, fast), strict=True))
    if runtime != "eager":
        for model, loaded in zip(models.values(), found.values(), strict=True):
            _check_same(described, model, loaded, inputs)
    return found


def runners(
    models: dict[str, nn.Module], inputs: Any, runtime: str, threads: int, *, fast: bool = False
) -> dict[str, Runner]:
    """One bound forward pass per model, which is expected in eval mode. Arguments and errors as for `load`."""
    return {name: loaded.bind(inputs) for name, loaded in load(models, inputs, runtime, threads, fast=fast).items()}


def _on_cpu(model: nn.Module) -> nn.Module:
    elsewhere = any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers()))
    return copy.deepcopy(model).cpu() if elsewhere else model


def _check_same(runtime: Runtime, model: nn.Module, loaded: Loaded, inputs: Any) -> None:
    """Raises ExportError when the loaded network's outputs are not the model's; chance and overflow cannot tell."""
    eager = _Eager(model)
    low = isinstance(model, Packed) and model.precision != "float32"
    allowed = _LOW_PRECISION if low else runtime.tolerance
    want = eager.outputs(inputs)
    off = _deviation(want, loaded.outputs(inputs))
    if off <= allowed or _deviation(want, eager.outputs(inputs)) > allowed:
        return
    raise ExportError(
        f"{runtime.title} does not compute what the network computes",
        why=f"its outputs differ by {off:.1e} of their norm, and {allowed:g} is allowed",
        fix="Look for operations that depend on values or on chance, or measure with the runtime 'eager'.",
    )


def _deviation(want: list[Tensor], got: list[Tensor]) -> float:
    """Norm of the difference over the floating outputs, relative to the network's own; infinite for other shapes.

    0 when the network's output is not finite or vanishes, so that nothing can be said.
    """
    if [tuple(t.shape) for t in want] != [tuple(t.shape) for t in got]:
        return math.inf
    power = noise = 0.0
    for ours, theirs in zip(want, got, strict=True):
        if ours.is_floating_point():
            reference = ours.detach().cpu().double()
            power += reference.square().sum().item()
            noise += (theirs.detach().cpu().double() - reference).square().sum().item()
    if not math.isfinite(power) or power == 0:
        return 0.0
    return math.sqrt(noise / power) if math.isfinite(noise) else math.inf
