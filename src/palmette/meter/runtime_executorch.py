"""ExecuTorch on the CPU: networks lowered to XNNPACK, run by ExecuTorch's Python runtime."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palmette.compat import optional
from palmette.errors import ExportError, InputError
from palmette.graph.inputs import batch_size, one_sample, tensors
from palmette.meter.compute import evaluating
from palmette.meter.running import Flat, Loaded, Packed, Runner, Runtime, quiet, reason, silent

_EXTRA = "palmette[executorch]"


class PteModel(Packed):
    """An ExecuTorch program (a .pte file's bytes) as a module: takes the network's inputs, returns a tensor or a tuple.

    A program has the batch size that it was written for; where that is 1, larger batches run sample by sample.
    `measure_latency` times it beside plain networks: "eager" calls it, "executorch" loads the program itself.
    """

    runtimes = ("eager", "executorch")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; arguments as the network takes them. Raises InputError for shapes that do not fit."""
        use_threads(torch.get_num_threads())
        if not self._sessions:
            self._sessions[0] = Program(self.content)
        program: Program = self._sessions[0]
        found = program.by_sample(kwargs or args)
        return found[0] if len(found) == 1 else tuple(found)


@functools.cache
def executorch_parts() -> dict[str, Any]:
    """What is used of ExecuTorch, imported in silence. Raises MissingDependency."""
    with silent():
        exir = optional("executorch.exir", package=_EXTRA)
        partitioner = optional("executorch.backends.xnnpack.partition.xnnpack_partitioner", package=_EXTRA)
        runtime = optional("executorch.runtime", package=_EXTRA)
        bindings = optional("executorch.extension.pybindings.portable_lib", package=_EXTRA)
        bindings._threadpool_get_thread_count()  # the pool is made, and complains of the processor, at its first use
        return {"exir": exir, "partitioner": partitioner, "runtime": runtime.Runtime.get(), "bindings": bindings}


class _Pool:
    """How often ExecuTorch's pool of threads was made anew: a program holds on to the pool that it was loaded with."""

    made = 0


def use_threads(count: int) -> None:
    """Make ExecuTorch's pool, one for the whole process, `count` threads wide.

    It must be idle. Every `Program` loads itself again afterwards; programs that others loaded before must not run.
    """
    bindings = executorch_parts()["bindings"]
    if bindings._threadpool_get_thread_count() != count:
        with silent():
            bindings._unsafe_reset_threadpool(count)
        _Pool.made += 1


def to_executorch(model: nn.Module, inputs: Any) -> bytes:
    """A .pte of the model at the shapes of `inputs`, what XNNPACK can do delegated to it; some seconds.

    Its inputs are the tensors of `inputs` in order. Raises ExportError when the model does not lower.
    """
    parts = executorch_parts()
    try:
        with quiet(), evaluating(model):
            arguments = tuple(map(in_order, tensors(inputs)))
            return lowered(parts, torch.export.export(Flat(model, inputs).eval(), arguments))
    except Exception as error:  # torch.export and ExecuTorch's passes raise whatever they like
        raise ExportError("The network cannot be lowered for ExecuTorch", why=reason(error)) from error


def lowered(parts: dict[str, Any], program: torch.export.ExportedProgram) -> bytes:
    """The bytes of a .pte for an exported program."""
    exir = parts["exir"]
    edge = exir.to_edge_transform_and_lower(
        program,
        partitioner=[parts["partitioner"].XnnpackPartitioner()],
        compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
    )
    return bytes(edge.to_executorch().buffer)


class Program:
    """A loaded .pte (bytes, or a path). Raises ExportError when ExecuTorch does not load it."""

    def __init__(self, content: bytes | Path) -> None:
        self.content = content
        self._load()
        meta = self._method.metadata
        self.shapes = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]

    def _load(self) -> None:
        with silent() as said:
            try:
                program = executorch_parts()["runtime"].load_program(self.content)
                self._method = program.load_method("forward")
            except RuntimeError as error:
                raise ExportError("ExecuTorch does not load the program", why=_why(said(), error)) from error
        self._program, self._pool = program, _Pool.made  # a program must outlive its method

    def _execute(self, arguments: list[Tensor]) -> Any:
        if self._pool != _Pool.made:
            self._load()
        return self._method.execute(arguments)

    def bind(self, inputs: Any) -> Runner:
        """A pass over the inputs, outputs copied. Raises InputError for other shapes than the program's."""
        arguments = [in_order(tensor) for tensor in tensors(inputs)]
        shapes = [tuple(tensor.shape) for tensor in arguments]
        if shapes != self.shapes:
            raise InputError(f"The ExecuTorch program is written for inputs {self.shapes}, not for {shapes}")
        return functools.partial(self._execute, arguments)

    def outputs(self, inputs: Any) -> list[Tensor]:
        """Every output in order. Raises ExportError when ExecuTorch fails."""
        return self._run([self.bind(inputs)])[0]

    def _run(self, passes: list[Runner]) -> list[list[Tensor]]:
        with silent() as said:
            try:
                return [list(run()) for run in passes]
            except RuntimeError as error:
                raise ExportError("ExecuTorch does not run the program", why=_why(said(), error)) from error

    def by_sample(self, inputs: Any) -> list[Tensor]:
        """Every output in order; inputs of a larger batch run one by one where the program is written for one."""
        size = batch_size(inputs)
        if size == self.shapes[0][0] or self.shapes[0][0] != 1:
            return self.outputs(inputs)
        rows = self._run([self.bind(one_sample(inputs, index)) for index in range(size)])
        return [torch.cat(column) for column in zip(*rows, strict=True)]


def in_order(tensor: Tensor) -> Tensor:
    """A copy with the strides of its shape: axes of length 1 may carry any, and ExecuTorch tells layouts by strides."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _why(said: list[str], error: Exception) -> str:
    """The runtime's own words, which say more than the number of its error."""
    lines = [line.partition("] ")[2] for line in said if line.startswith("[")]
    return next((line for line in lines if line.startswith("Missing operator")), lines[-1] if lines else reason(error))


def _load(models: list[nn.Module], inputs: Any, threads: int, fast: bool) -> list[Loaded]:
    del fast
    use_threads(threads)
    return [Program(m.content if isinstance(m, PteModel) else to_executorch(m, inputs)) for m in models]


RUNTIME = Runtime(
    name="executorch",
    title="ExecuTorch (XNNPACK)",
    load=_load,
    modules=("executorch",),
    extra="executorch",
    library="executorch",
)
