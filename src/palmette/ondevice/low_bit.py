"""Low-bit: keep a layer's input as 8, 4, 2 or 1 bits per number.

Idea: the weight gradient averages over batch and positions, so rounding errors of the input cancel; each group of
numbers has its own range. After Chakrabarti and Moseley, "Backprop with Approximate Activations", NeurIPS 2019, and
ActNN (Chen et al., ICML 2021). What differs: rounding to nearest, so that a step is reproducible; plain torch, no
compiled extension. Shapes: any; groups of `group` numbers in memory order, two numbers of 16 bits for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from palmette.ondevice.bits import pack_bits, pack_small, packed_bytes, unpack_bits, unpack_small
from palmette.ondevice.codec import Codec, Payload, State
from palmette.ondevice.layer import Layer
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class LowBit(Codec):
    """Numbers of `bits`, with the smallest value and the step of each group in bfloat16."""

    name: ClassVar[str] = "low_bit"
    bits: Literal[1, 2, 4, 8] = 4
    group: Annotated[int, Bounds(low=8)] = 128

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:  # noqa: ARG002
        """The packed numbers and four bytes a group."""
        count = math.prod(shape)
        groups = -(-count // self.group)
        return packed_bytes(groups * self.group, self.bits) + 4 * groups

    def can_encode(self, shape: Sequence[int]) -> bool:
        """Where it is smaller than the input in 32 bits."""
        return self.nbytes(shape, 4) < 4 * math.prod(shape)

    def encode(self, x: Tensor, state: State) -> Payload:  # noqa: ARG002
        """Packed numbers, and the ranges."""
        missing = -x.numel() % self.group
        flat = F.pad(x.reshape(-1), (0, missing)) if missing else x.reshape(-1)
        rows = flat.view(-1, self.group).float()
        if self.bits == 1:
            return self._two_levels(rows)
        low = rows.amin(1).bfloat16()
        step = ((rows.amax(1) - low.float()) / (2**self.bits - 1)).bfloat16()
        scale = step.float().clamp_min(torch.finfo(torch.bfloat16).tiny)
        levels = (rows - low.float()[:, None]).div_(scale[:, None]).round_().clamp_(0, 2**self.bits - 1)
        return pack_small(levels.to(torch.uint8), self.bits), torch.stack([low, step])

    def _two_levels(self, rows: Tensor) -> Payload:
        """Above or below the group's mean, with the means of both parts as levels: the ends would be far too wide."""
        mean = rows.mean(1, keepdim=True)
        above = rows > mean
        count = above.sum(1)
        total, high = rows.sum(1), (rows * above).sum(1)
        low = ((total - high) / (self.group - count).clamp_min(1)).bfloat16()
        step = (high / count.clamp_min(1) - low.float()).where(count > 0, torch.zeros_like(total)).bfloat16()
        return pack_bits(above), torch.stack([low, step])

    def decode(self, payload: Payload, layer: Layer) -> Tensor:
        """The input, rounded."""
        packed, ranges = payload
        low, step = ranges.float()
        count = layer.x_shape.numel()
        shape = torch.Size((len(low), self.group))
        levels = unpack_bits(packed, shape) if self.bits == 1 else unpack_small(packed, shape, self.bits)
        rows: Tensor = (levels * step[:, None]).add_(low[:, None])
        return rows.view(-1)[:count].view(layer.x_shape)


@dataclass(frozen=True, kw_only=True)
class LowBitConfig(MethodConfig):
    """bits: for every input; None: 8, 4, 2 or 1 by the budget. group: numbers that share a range."""

    bits: Literal[1, 2, 4, 8] | None = None
    group: Annotated[int, Bounds(low=8)] = 128


@method(
    name="low_bit",
    title="Low-bit: layer inputs in 1 to 8 bits",
    paper="Chakrabarti and Moseley, Backprop with Approximate Activations, NeurIPS 2019; Chen et al., ActNN, ICML 2021",
    unit="squared gradient error",
    sites="input",
    edit="codec",
    config=LowBitConfig,
)
def options(x: Tensor, layer: Layer, config: LowBitConfig) -> list[LowBit]:  # noqa: ARG001  # the interface of codecs
    """The widths to choose from for this input, from coarse to fine."""
    widths: tuple[Literal[1, 2, 4, 8], ...] = (1, 2, 4, 8) if config.bits is None else (config.bits,)
    return [codec for codec in (LowBit(bits=bits, group=config.group) for bits in widths) if codec.can_encode(x.shape)]
