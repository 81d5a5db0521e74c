"""How a layer's input is kept for the weight gradient: the interface of a codec, and the ones that lose nothing.

A codec encodes the input x into payload tensors and computes the weight gradient from the payload. It is a frozen
dataclass, so that a plan can be written as JSON; what it remembers between steps lies in `state`, which belongs to the
place where it is used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from palmette.ondevice.layer import Layer
from palmette.registry import MethodConfig

Payload = tuple[Tensor, ...]
State = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec(MethodConfig):
    """Base of all codecs. `lossless`: the weight gradient is exact. `layers`: the kinds of layers it knows."""

    name: ClassVar[str] = ""
    lossless: ClassVar[bool] = False
    fresh: ClassVar[bool] = True  # its payload is memory of its own, not the input's
    keeps_input: ClassVar[bool] = False  # its payload is the input's own memory

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Exact bytes of the payload for an input of `shape` with `itemsize` bytes per number; known before running."""
        raise NotImplementedError

    def encode(self, x: Tensor, state: State) -> Payload:
        """The payload; called without gradients."""
        raise NotImplementedError

    def decode(self, payload: Payload, layer: Layer) -> Tensor:
        """The input again, exactly or nearly; codecs that have a shorter way to the gradient need not have it."""
        raise NotImplementedError

    def weight_gradient(self, payload: Payload, layer: Layer, grad: Tensor) -> Tensor:
        """dL/dw [out, in / groups, *kernel] from the payload and dL/dy."""
        return layer.weight_gradient(as_stored(self.decode(payload, layer), grad.dtype), grad)

    def input_gradient(self, layer: Layer, grad: Tensor, weight: Tensor) -> Tensor:
        """dL/dx; exact for nearly all codecs, so that no error travels to earlier layers."""
        return layer.input_gradient(grad, weight)

    def can_encode(self, shape: Sequence[int]) -> bool:
        """Whether the codec has a form for inputs of this shape."""
        return len(shape) >= 2

    def to_dict(self) -> dict[str, Any]:
        """Name and options, for JSON."""
        return {"codec": self.name, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep(Codec):
    """The input as it is, as autograd keeps it."""

    name: ClassVar[str] = "keep"
    lossless: ClassVar[bool] = True
    fresh: ClassVar[bool] = False
    keeps_input: ClassVar[bool] = True

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """All of it, if nobody else keeps it."""
        return math.prod(shape) * itemsize

    def encode(self, x: Tensor, state: State) -> Payload:  # noqa: ARG002  # the interface
        """The input itself."""
        return (x,)

    def decode(self, payload: Payload, layer: Layer) -> Tensor:  # noqa: ARG002
        """The input itself."""
        return payload[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip(Codec):
    """Nothing: the layers that read this input are frozen by the plan."""

    name: ClassVar[str] = "skip"
    fresh: ClassVar[bool] = False

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:  # noqa: ARG002
        """None."""
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recompute(Codec):
    """Nothing of its own: the input is computed again from what the operation before it keeps anyway."""

    name: ClassVar[str] = "recompute"
    lossless: ClassVar[bool] = True
    fresh: ClassVar[bool] = False

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:  # noqa: ARG002
        """None: its source is counted where it is kept."""
        return 0


def codecs() -> dict[str, type[Codec]]:
    """Every codec class by name: those of this file, and each that a method's file defines."""
    found: dict[str, type[Codec]] = {}
    waiting: list[type[Codec]] = [Codec]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.name:
            found[kind.name] = kind
    return found


def as_stored(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """X in the type in which it is kept."""
    return x if dtype is None or x.dtype == dtype else x.to(dtype)


def compact(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own size: a view would keep all of what it looks into."""
    size = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == size else tensor.clone(memory_format=torch.contiguous_format)
