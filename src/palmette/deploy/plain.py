"""What every exporter needs: a copy of the network in eval mode on the CPU, plain outputs, dynamic batch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from palmette.errors import ExportError
from palmette.graph.inputs import Example, as_call, batch_size, call, main_output, map_tensors, tensors, with_batch


def plain(output: Any) -> Any:
    """`output` in tensors, tuples and dicts only: what a process without the model's packages can rebuild.

    Dataclass-like mappings become dicts; entries without a tensor (caches, None) are left out.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return {str(k): plain(v) for k, v in output.items() if tensors(v)}
    if isinstance(output, list | tuple):
        return tuple(plain(v) for v in output if tensors(v))
    raise ExportError(
        f"The model returns a {type(output).__name__}, which no runtime knows", fix="Return tensors, tuples or dicts."
    )


class PlainOutput(nn.Module):
    """The model with its outputs made plain, under the signature of its own forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return plain(self.model(*args, **kwargs))

        self.forward = forward


class Prepared:
    """A network ready for an exporter: a frozen CPU copy in eval mode, and inputs of batch 2 or more."""

    def __init__(self, model: nn.Module, example_inputs: Example) -> None:
        self.inputs = map_tensors(lambda t: t.detach().cpu(), example_inputs)
        if batch_size(self.inputs) < 2:
            self.inputs = with_batch(self.inputs, 2)
        copied = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        with torch.no_grad():
            output = call(copied, self.inputs)
        flat = plain(output)
        complete = type(output) in (tuple, dict) and len(tensors(output)) == len(tensors(flat))
        same = isinstance(output, Tensor) or complete
        self.model = copied if same else PlainOutput(copied)
        decisive = main_output(flat)
        self.main = next(i for i, t in enumerate(tensors(flat)) if t is decisive)
        self.output_names = _names(flat)

    def reference(self, inputs: Any) -> list[Tensor]:
        """Every tensor of the network's output."""
        with torch.no_grad():
            return tensors(call(self.model, inputs))

    def dynamic_shapes(self, axis: Any) -> Any:
        """For torch.export: `axis` for the first axis of every tensor that shares the batch size."""
        args, kwargs = as_call(self.inputs)
        size = batch_size(self.inputs)

        def mark(value: Any) -> Any:
            if isinstance(value, Tensor):
                return {0: axis} if value.dim() and value.shape[0] == size else None
            if isinstance(value, Mapping):
                return {k: mark(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(mark(v) for v in value)
            return None

        return {k: mark(v) for k, v in kwargs.items()} if kwargs else tuple(map(mark, args))


def _names(output: Any) -> list[str] | None:
    """Names for the flat outputs; None when they are nested."""
    if isinstance(output, Tensor):
        return ["output"]
    if isinstance(output, dict):
        return list(output) if all(isinstance(v, Tensor) for v in output.values()) else None
    return [f"output_{i}" for i in range(len(output))] if all(isinstance(v, Tensor) for v in output) else None


def one_line(error: BaseException) -> str:
    """The first informative line of an exporter's error, at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
