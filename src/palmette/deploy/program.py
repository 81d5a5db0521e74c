"""Exported programs: a `.pt2` in torch's own format that runs in a process without palmette or the model's source.

Written without sample inputs, stack traces or pickles, in ATen operators only, so that `load_program` can recognise by
its content a file in which nothing but tensors and ATen calls can run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from palmette.deploy.archive import code_in
from palmette.deploy.parity import Parity, measure_parity
from palmette.deploy.plain import Prepared, one_line
from palmette.errors import ExportError
from palmette.files import atomic_path
from palmette.graph.inputs import Example, as_call, call, tensors
from palmette.meter.running import quiet

_AUTO = torch.export.Dim.AUTO
_KEPT_NOTES = ("val", "nn_module_stack", "torch_fn", "tensor_meta")


def export_program(
    model: nn.Module, example_inputs: Example, path: str | Path, *, batches: Iterable[Any] | None = None
) -> Parity:
    """Write `model` as a `.pt2` with a dynamic batch and return the parity of the file as loaded back.

    `batches`: real inputs for the parity check, besides the example and random ones. Raises ExportError when the model
    cannot be exported, when the comparison is not informative, or when the file disagrees; nothing is written then.
    """
    prepared = Prepared(model, example_inputs)
    args, kwargs = as_call(prepared.inputs)
    try:
        with quiet():
            program = torch.export.export(prepared.model, args, kwargs, dynamic_shapes=prepared.dynamic_shapes(_AUTO))
    except Exception as error:  # torch.export lets whatever the model's code raises through
        raise ExportError(
            "The model cannot be exported as a program",
            why=one_line(error),
            fix="Rewrite the line named without control flow that depends on values.",
        ) from error
    _bare(program)
    with atomic_path(path) as temporary:
        with quiet(), temporary.open("w+b") as file:
            torch.export.save(program, file)
        reason = code_in(temporary)
        if reason is not None:
            raise ExportError("The model needs more than ATen operators", why=reason, fix="Export to .onnx instead.")
        loaded = torch.export.load(temporary).module()
        return measure_parity(
            prepared.reference,
            _runner(loaded),
            example_inputs,
            batches,
            main=prepared.main,
            runtime="torch.export",
        )


def load_program(path: str | Path, trust: bool = False) -> torch.fx.GraphModule:
    """The network in a `.pt2` file, ready to call.

    Without `trust`, only a file in which nothing but tensors and ATen operators can run, as palmette writes it: torch's
    loader unpickles sample inputs and evaluates strings. Raises ExportError for any other file, and for one that is
    missing or damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError("There is no such file", where=str(file))
    reason = None if trust else code_in(file)
    if reason is not None:
        raise ExportError(
            "The program was not loaded, because it could carry code",
            where=str(file),
            why=reason,
            fix="Pass trust=True (--trust) if you know where it comes from.",
        )
    try:
        with quiet():
            return torch.export.load(file).module()
    except Exception as error:  # the archive reader raises RuntimeError, KeyError, ValueError and more
        raise ExportError("The program cannot be read", where=str(file), why=one_line(error)) from error


def _bare(program: ExportedProgram) -> None:
    """Leave out what would need pickle or tell about this machine: sample inputs, input guards, stack traces."""
    program.example_inputs = None
    program._guards_code = []
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta = {key: value for key, value in node.meta.items() if key in _KEPT_NOTES}


def _runner(module: torch.fx.GraphModule) -> Any:
    def run(inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            return tensors(call(module, inputs))

    return run
