"""Booleans and small integers in as few bytes as they need: eight bits, or two nibbles, to a byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_GATHER = 0x0102040810204080  # gathers the lowest bits of eight bytes into the highest byte of their product
_NUMPY = (torch.float32, torch.float64, torch.float16)
_SPREAD = 0x0101010101010101
_SELECT = -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201 as a signed number: bit k of byte k


def packed_bytes(elements: int, bits: int = 1) -> int:
    """Bytes that `elements` numbers of `bits` (1, 2, 4 or 8) occupy."""
    return -(-elements * bits // 8)


def pack_between(x: Tensor, low: float, high: float) -> Tensor:
    """`pack_bits` of low < x < high; high may be infinite."""
    if _is_plain_cpu(x) and x.dtype in _NUMPY:
        flat = x.detach().reshape(-1).numpy()
        inside = flat > low
        if high != float("inf"):
            inside &= flat < high
        return torch.from_numpy(np.packbits(inside, bitorder="little"))
    mask = x > low
    if high != float("inf"):
        mask &= x < high
    return pack_bits(mask)


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor as uint8 [ceil(n / 8)], the first element in the lowest bit."""
    flat = mask.reshape(-1)
    if _is_plain_cpu(mask):
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    words = _padded(flat, 8).view(torch.int64)
    return ((words * _GATHER) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """The boolean tensor of `shape` that `pack_bits` packed, as 0 and 1 in uint8."""
    count = shape.numel()
    if _is_plain_cpu(packed):
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little")).view(shape)
    words = (packed.to(torch.int64) * _SPREAD) & _SELECT
    flags: Tensor = words.view(torch.uint8)[:count] != 0
    return flags.to(torch.uint8).view(shape)


def pack_small(numbers: Tensor, bits: int) -> Tensor:
    """uint8 numbers below 2**bits, bits in {2, 4, 8}, as uint8 [ceil(n * bits / 8)]; the first in the lowest bits."""
    if bits == 8:
        return numbers.reshape(-1)
    per_byte = 8 // bits
    columns = _padded(numbers.reshape(-1), per_byte).view(-1, per_byte)
    packed: Tensor = columns[:, 0].clone()
    for column in range(1, per_byte):
        packed |= columns[:, column] << (bits * column)
    return packed


def unpack_small(packed: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """The uint8 numbers of `shape` that `pack_small` packed."""
    if bits == 8:
        return packed.view(shape)
    shifts = [packed >> (bits * column) for column in range(8 // bits)]
    columns: Tensor = torch.stack(shifts, 1) & (2**bits - 1)
    return columns.view(-1)[: shape.numel()].view(shape)


def _padded(flat: Tensor, multiple: int) -> Tensor:
    """`flat` with zeros up to a multiple, contiguous."""
    missing = -flat.numel() % multiple
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat.contiguous()


def _is_plain_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
