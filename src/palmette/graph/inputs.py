"""What goes into a network and what comes out of it: tensors, tuples or dicts, batched along their first axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from palmette.errors import DataError, InputError

LABELS = ("labels", "label")
"""Keys under which a dict that a loader yields may have its target."""
Example = Tensor | tuple[Any, ...] | dict[str, Any]
"""Inputs of a model: called as `model(x)`, `model(*x)` or `model(**x)`."""


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for `inputs`."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, list | tuple):
        return tuple(inputs), {}
    return (inputs,), {}


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output for `inputs`."""
    args, kwargs = as_call(inputs)
    return model(*args, **kwargs)


def map_tensors(fn: Callable[[Tensor], Any], inputs: Any) -> Any:
    """`inputs` with `fn` applied to every tensor in it; other values stay."""
    if isinstance(inputs, Tensor):
        return fn(inputs)
    if isinstance(inputs, Mapping):
        return {k: map_tensors(fn, v) for k, v in inputs.items()}
    if isinstance(inputs, list | tuple):
        mapped = [map_tensors(fn, v) for v in inputs]
        return mapped if isinstance(inputs, list) else tuple(mapped)
    return inputs


def tensors(inputs: Any) -> list[Tensor]:
    """Every tensor in `inputs`, depth first."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        return [t for v in inputs.values() for t in tensors(v)]
    if isinstance(inputs, list | tuple):
        return [t for v in inputs for t in tensors(v)]
    return []


def batch_size(inputs: Any) -> int:
    """Length of the first axis of the first tensor."""
    found = tensors(inputs)
    if not found or found[0].dim() == 0:
        raise InputError(
            "The inputs hold no batched tensor", fix="Pass a tensor, a tuple or a dict of tensors [batch, ...]."
        )
    return int(found[0].shape[0])


def with_batch(inputs: Any, n: int) -> Any:
    """`inputs` repeated or cut to a batch of `n` along the first axis of every tensor that shares the batch size."""
    size = batch_size(inputs)

    def fit(x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[0] != size:
            return x
        return x[torch.arange(n, device=x.device) % size]

    return map_tensors(fit, inputs)


def one_sample(inputs: Any, index: int) -> Any:
    """Sample `index` as a batch of 1; tensors that do not share the batch size stay."""
    size = batch_size(inputs)
    return map_tensors(lambda t: t[index : index + 1] if t.dim() and t.shape[0] == size else t, inputs)


def to_device(inputs: Any, device: torch.device | str) -> Any:
    """`inputs` on `device`."""
    return map_tensors(lambda t: t.to(device), inputs)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and target of what a loader yields: `(inputs, target)`, or a dict with "labels" or "label".

    Raises DataError for anything else.
    """
    if isinstance(batch, Mapping):
        for key in LABELS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, target = batch
        return (tuple(inputs) if isinstance(inputs, list) else inputs), target
    raise DataError(
        f"A batch of type {type(batch).__name__} is not understood",
        fix='Yield (inputs, target) pairs, or dicts with a "labels" entry.',
    )


def inputs_of(batch: Any, like: Any = None) -> Any:
    """The inputs alone: of a labelled batch as `split_batch` reads it, else the batch itself.

    `like`: example inputs; a pair of tensors is taken as inputs where these are a pair of such tensors too.
    """
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k not in LABELS}
    if not isinstance(batch, list | tuple) or len(batch) != 2 or _alike(batch, like):
        return batch
    return split_batch(batch)[0]


def _alike(batch: Any, like: Any) -> bool:
    """Whether both are pairs whose members have the same nesting and, where tensors, as many axes."""
    if isinstance(batch, Tensor) or isinstance(like, Tensor):
        return isinstance(batch, Tensor) and isinstance(like, Tensor) and batch.dim() == like.dim()
    if isinstance(batch, list | tuple) and isinstance(like, list | tuple):
        return len(batch) == len(like) and all(_alike(b, e) for b, e in zip(batch, like, strict=True))
    return type(batch) is type(like)


def main_output(output: Any) -> Tensor:
    """The logits: the tensor itself, `.logits` or `["logits"]`, else the first floating tensor.

    Raises InputError if there is none.
    """
    entry = output.get("logits") if isinstance(output, Mapping) else None
    logits = entry if isinstance(entry, Tensor) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    for t in tensors(output):
        if t.is_floating_point():
            return t
    raise InputError(
        "The model returns no floating-point tensor", fix="Return the logits, or a dict with a 'logits' entry."
    )
