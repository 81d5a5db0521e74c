"""ExecuTorch: one .pte file for the XNNPACK delegate, compared with the network before it appears."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palmette.deploy.parity import Parity, measure_parity, singles
from palmette.deploy.plain import Prepared
from palmette.files import atomic_path
from palmette.graph.inputs import Example, with_batch
from palmette.meter.runtime_executorch import Program, to_executorch, use_threads


def export_executorch(
    model: nn.Module, example_inputs: Example, path: str | Path, *, batches: Iterable[Any] | None = None
) -> Parity:
    """Write `model` as a .pte for one sample at a time, and return its parity in ExecuTorch's own runtime.

    What XNNPACK can do is delegated to it; the batch is fixed at 1, because memory is planned for it. `batches`: real
    inputs for the parity check, besides the example and random ones. Raises ExportError (nothing is written then) when
    the model cannot be lowered, when the comparison is not informative, or when ExecuTorch disagrees;
    MissingDependency without executorch.
    """
    use_threads(torch.get_num_threads())
    prepared = Prepared(model, example_inputs)
    content = to_executorch(prepared.model, with_batch(prepared.inputs, 1))
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
        return measure_parity(
            prepared.reference,
            Program(temporary).outputs,
            example_inputs,
            batches,
            main=prepared.main,
            runtime="ExecuTorch (XNNPACK)",
            cases=singles(example_inputs, batches),
            sizes=(1,),
        )
