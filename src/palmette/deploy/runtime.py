"""How closely a runtime follows a network, without a file: what is timed is held against PyTorch itself."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn

from palmette.deploy.parity import Bounds, Parity, inputs_of, measure_parity, random_like
from palmette.graph.inputs import Example, batch_size, call, main_output, with_batch
from palmette.meter.compute import evaluating
from palmette.meter.running import flat_outputs
from palmette.meter.runtimes import load, runtime_named

_REAL_BATCHES = 4
_BFLOAT16 = Bounds(max_relative_error=None, min_snr_db=20.0, advice="Use a runtime that computes in float32.")


def runtime_parity(
    model: nn.Module,
    example_inputs: Example,
    runtime: str,
    *,
    batches: Iterable[Any] | None = None,
    threads: int | None = None,
) -> Parity:
    """Parity of `model` in a runtime ("compile", "onnxruntime", "openvino", ...) with eager, at the example's batch.

    Compared are the example, up to four of `batches` (real inputs, or (inputs, target) pairs) and two random batches.
    float32 is held to the bounds of a file; bfloat16 to 20 dB. Raises ExportError when the runtime cannot run the
    network, differs by more, or when the comparison is not informative; InputError and MissingDependency as
    `measure_latency` does.
    """
    described = runtime_named(runtime)
    size = batch_size(example_inputs)
    real = [with_batch(inputs_of(b, example_inputs), size) for b in islice(batches or (), _REAL_BATCHES)]
    cases = [example_inputs, *real, *(random_like(example_inputs, seed) for seed in range(2))]
    with evaluating(model):
        with torch.no_grad():
            output = call(model, example_inputs)
        decisive = main_output(output)
        loaded = load({"model": model}, example_inputs, runtime, threads or torch.get_num_threads())["model"]

        def reference(inputs: Any) -> list[torch.Tensor]:
            with torch.no_grad():
                return flat_outputs(call(model, inputs))

        return measure_parity(
            reference,
            loaded.outputs,
            example_inputs,
            None,
            main=next(i for i, t in enumerate(flat_outputs(output)) if t is decisive),
            runtime=described.title,
            cases=cases,
            sizes=(size,),
            bounds=_BFLOAT16 if described.precision == "bfloat16" else None,
        )
