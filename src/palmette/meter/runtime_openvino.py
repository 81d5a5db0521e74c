"""OpenVINO on the CPU, in float32 unless bfloat16 is asked for: left alone it chooses by the processor.

Networks are read by OpenVINO's PyTorch front end directly: `openvino.convert_model` would do the same, and report its
use over the network.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from palmette.compat import optional
from palmette.errors import ExportError, InputError
from palmette.graph.inputs import tensors
from palmette.meter.compute import evaluating
from palmette.meter.running import Flat, Loaded, Packed, Runner, Runtime, first_that_works, quiet, reason

_HINTS = {"float32": "f32", "bfloat16": "bf16"}
_CANNOT = "The network cannot be converted for OpenVINO"


@functools.cache
def core() -> Any:
    """OpenVINO's core, one per process. Raises MissingDependency."""
    return optional("openvino", package="palmette[openvino]").Core()


def from_program(program: torch.export.ExportedProgram, names: list[str]) -> Any:
    """An OpenVINO model of an exported program, its inputs called `names`; those that nothing reads may be missing.

    Axes that are symbols in the program stay dynamic. Raises what OpenVINO raises.
    """
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    with quiet():
        converted = _converted(TorchFXPythonDecoder.from_exported_program(program))
    called = dict(zip(program.graph_signature.user_inputs, names, strict=True))
    for port in converted.inputs:
        port.get_tensor().set_names({called[name] for name in port.get_names() if name in called})
    return converted


def _converted(decoder: Any) -> Any:
    from openvino.frontend import FrontEndManager

    front = FrontEndManager().load_by_framework("pytorch")
    return front.convert(front.load(decoder))


def _traced(model: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with quiet(), torch.no_grad():
        warnings.simplefilter("error", TracerWarning)  # a value that became a constant
        trace = torch.jit.trace(model, arguments, check_trace=False)
        converted = _converted(TorchScriptPythonDecoder(trace))
    for port, name in zip(converted.inputs, _numbered(len(arguments)), strict=True):
        port.get_tensor().set_names({name})
    return converted


def _numbered(count: int) -> list[str]:
    return [f"in{i}" for i in range(count)]


def _exported(model: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
    with quiet():
        program = torch.export.export(model, arguments)
    return from_program(program, _numbered(len(arguments)))


def to_openvino(models: list[nn.Module], inputs: Any, *, fast: bool = False) -> list[Any]:
    """OpenVINO models at the shapes of `inputs`, all by the same way so that they compare.

    Their inputs are called in0, in1, ... in the order of `tensors(inputs)`. fast: by a trace (some 0.2 s, not 2 s)
    where that can do all of them and follows every value. Raises ExportError when a model does not convert.
    """
    arguments = tuple(tensors(inputs))

    def by(convert: Any) -> list[Any]:
        found = [convert(Flat(model, inputs).eval(), arguments) for model in models]
        for converted in found:
            fix_shapes(converted, _numbered(len(arguments)), [list(tensor.shape) for tensor in arguments])
        return found

    with evaluating(*models):
        attempts = [functools.partial(by, convert) for convert in ((_traced, _exported) if fast else (_exported,))]
        found: list[Any] = first_that_works(_CANNOT, *attempts)
    return found


def fix_shapes(converted: Any, names: list[str], shapes: list[list[int]]) -> None:
    """Give the inputs of these names these shapes, -1 where an axis stays dynamic: a static graph is planned better."""
    given = dict(zip(names, shapes, strict=True))
    converted.reshape({port: given[port.any_name] for port in converted.inputs})


def openvino_compiled(model: Any, threads: int, precision: str = "float32") -> Any:
    """An OpenVINO model compiled for the CPU, with `threads` threads and one stream.

    precision: "float32", or "bfloat16" where the processor has it. Threads are not pinned to cores, so that what is
    timed next moves freely. Raises ExportError when OpenVINO does not run the model.
    """
    options = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    try:
        return core().compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise ExportError(
            "OpenVINO does not run this network", why=reason(error), fix="Measure with the runtime 'eager'."
        ) from error


class Compiled:
    """A network that OpenVINO has compiled.

    names: what the tensors of an input are called there, in their order; some may be missing. None: it has all of them,
    in order. Raises InputError for another number of tensors.
    """

    def __init__(self, compiled: Any, names: list[str] | None = None) -> None:
        self.compiled, self.names = compiled, names

    def bind(self, inputs: Any) -> Runner:
        """A pass over arrays that are handed over once: handing them over costs as much as a small network."""
        tensor_of = optional("openvino", package="palmette[openvino]").Tensor
        request = self.compiled.create_infer_request()
        arrays = self._arrays(inputs)  # kept by the pass below, because the request does not
        for index, array in enumerate(arrays):
            request.set_input_tensor(index, tensor_of(array, shared_memory=True))
        return lambda _=arrays: request.infer(share_outputs=True)  # type: ignore[misc]

    def outputs(self, inputs: Any) -> list[Tensor]:
        """Every output in order."""
        found = self.compiled.create_infer_request().infer(self._arrays(inputs))
        return [torch.from_numpy(found[port].copy()) for port in self.compiled.outputs]

    def _arrays(self, inputs: Any) -> list[Any]:
        given = [tensor.detach().cpu().contiguous().numpy() for tensor in tensors(inputs)]
        called = [port.any_name for port in self.compiled.inputs]
        names = called if self.names is None else self.names
        if len(given) != len(names):
            raise InputError(f"The network takes the inputs {names}, and {len(given)} tensors were given")
        return [given[names.index(name)] for name in called]


def read_model(*content: bytes | str) -> Any:
    """The OpenVINO model in an ONNX graph's bytes, or in the files of an IR (.xml and .bin). Raises ExportError."""
    try:
        return core().read_model(*content)
    except RuntimeError as error:
        raise ExportError("OpenVINO does not read this network", why=reason(error)) from error


def _read(graph: bytes, inputs: Any) -> Any:
    """An ONNX graph in OpenVINO, at the shapes of `inputs`. Raises InputError for inputs that are not the graph's."""
    model = read_model(graph)
    names = [port.any_name for port in model.inputs]
    given = tensors(inputs)
    if len(given) != len(names):
        raise InputError(f"The ONNX graph takes the inputs {names}, and {len(given)} tensors were given")
    fix_shapes(model, names, [list(tensor.shape) for tensor in given])
    return model


def _load(models: list[nn.Module], inputs: Any, threads: int, fast: bool, precision: str) -> list[Loaded]:
    core()
    plain = [model for model in models if not isinstance(model, Packed)]
    converted = iter(to_openvino(plain, inputs, fast=fast))
    names = _numbered(len(tensors(inputs)))
    return [
        Compiled(openvino_compiled(_read(model.content, inputs), threads, precision))
        if isinstance(model, Packed)
        else Compiled(openvino_compiled(next(converted), threads, precision), names)
        for model in models
    ]


def need_bfloat16() -> None:
    """Raises InputError when OpenVINO does not compute in bfloat16 on this processor."""
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise InputError("This processor does not compute in bfloat16", fix="Use the runtime 'openvino'.")


RUNTIME = Runtime(
    name="openvino",
    title="OpenVINO",
    load=functools.partial(_load, precision="float32"),
    modules=("openvino",),
    extra="openvino",
    library="openvino",
    precision="float32",
)
BFLOAT16 = Runtime(
    name="openvino-bf16",
    title="OpenVINO in bfloat16",
    load=functools.partial(_load, precision="bfloat16"),
    modules=("openvino",),
    extra="openvino",
    library="openvino",
    precision="bfloat16",
    tolerance=0.25,
    check=need_bfloat16,
)
