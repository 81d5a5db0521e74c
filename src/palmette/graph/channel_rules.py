"""Where the channels of a tensor are after an operation that moves, pools or reshapes it, judged by shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from palmette.graph.ops import ACTIVATIONS, ARITHMETIC, NONLINEAR_PARTS, op_name

ELEMENTWISE = ACTIVATIONS | NONLINEAR_PARTS | ARITHMETIC | {"maximum", "minimum"}
"""Operations on one position at a time, with broadcasting."""

_MAXIMA = {f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3)}
_AVERAGES = {f"avg_pool{d}d" for d in (1, 2, 3)}
_WHOLE = {f"adaptive_avg_pool{d}d" for d in (1, 2, 3)} | {"upsample_nearest2d", "upsample_bilinear2d"}
_SPATIAL = _MAXIMA | _AVERAGES | _WHOLE
_REDUCTIONS = {"mean", "amax", "amin", "sum"}
PADDINGS = {"pad", "constant_pad_nd"}
"""Operations that put values around a tensor."""

_RESHAPES = {"view", "reshape", "flatten", "squeeze", "unsqueeze"}
_LITERAL = {"view", "reshape", "expand"}
_SWAPS = {"transpose", "swapaxes", "swapdims"}


def moved(node: fx.Node, axis: int) -> tuple[int, int] | None:
    """Channel axis behind the node, and how many neighbouring entries each channel has there; None if that is lost.

    axis: the channel axis of its first argument.
    """
    name, source = op_name(node), first(node)
    before, after = source.meta["shape"], node.meta["shape"]
    if name in _SPATIAL:
        return (axis, 1) if axis == 1 and len(before) == len(after) else None
    if name in _REDUCTIONS:
        return _reduced(axis, len(before), _argument(node, 1, "dim"), bool(_argument(node, 2, "keepdim")))
    if name in _RESHAPES:
        return _reshaped(before, axis, after)
    if name in ("permute", "transpose"):
        return _permuted(node, axis, len(before)), 1
    if name in ("slice", "select") and dimension(node, len(before)) != axis:
        return axis - (name == "select" and dimension(node, len(before)) < axis), 1
    return None


def carried(node: fx.Node, axis: int) -> tuple[int, int] | None:
    """As `moved`, and behind what repeats, rotates or takes the norm along other axes than the channels."""
    name, source = op_name(node), first(node)
    before, after = source.meta["shape"], node.meta["shape"]
    if name in ("expand", "repeat"):
        place = axis + len(after) - len(before)
        return (place, 1) if after[place] == before[axis] else None
    if name == "roll":
        dims: Any = _argument(node, 2, "dims")
        return (axis, 1) if dims and axis not in {d % len(before) for d in dims} else None
    if name in _SWAPS:
        return _permuted(node, axis, len(before)), 1
    if name == "linalg_vector_norm":
        return _reduced(axis, len(before), _argument(node, 2, "dim"), bool(_argument(node, 3, "keepdim")))
    return moved(node, axis)


def operand_axis(node: fx.Node, operand: fx.Node, axis: int) -> int | None:
    """The axis of an elementwise operation's operand that lies along `axis` of what it puts out, None for none.

    Shapes are lined up at their ends, but for the weight of a PReLU, which lies along the second axis.
    """
    rank, own = len(node.meta["shape"]), len(operand.meta["shape"])
    if op_name(node) == "prelu" and operand is not first(node):
        return 0 if own == 1 and axis == min(1, rank - 1) else None
    return axis - rank + own if axis - rank + own >= 0 else None


def keeps_constants(node: fx.Node) -> bool:
    """Whether a channel that has one value everywhere keeps it; zero stays zero behind all that `moved` knows."""
    name = op_name(node)
    if name in _AVERAGES:  # beyond the border an average counts zeros
        return not any(_numbers([_argument(node, 3, "padding"), _argument(node, 4, "ceil_mode"), node.args[6:]]))
    return name != "sum"


def size_position(node: fx.Node, axis: int) -> int | None:
    """Where the node's list of sizes spells out the length of the axis, None where nothing needs to change.

    Raises LookupError where that length is computed.
    """
    sizes: Any = node.args[1] if op_name(node) in _LITERAL and len(node.args) > 1 else None
    if sizes is None or (isinstance(sizes, list | tuple) and sizes[axis] == -1):
        return None
    if not isinstance(sizes, list | tuple) or not isinstance(sizes[axis], int):
        raise LookupError(str(node.meta["path"]))
    return axis


def first(node: fx.Node) -> fx.Node:
    """The node's first argument."""
    source: Any = node.args[0]
    found: fx.Node = source
    return found


def dimension(node: fx.Node, rank: int) -> int:
    """The axis that a slice, selection or concatenation works along."""
    return int(_argument(node, 1, "dim") or 0) % rank


def channel_padding(node: fx.Node, axis: int) -> tuple[int, int] | None:
    """Channels of a constant that a padding puts before and after those of `axis`; None if it does something else."""
    sizes: Any = node.args[1]
    if not all(isinstance(s, int) for s in sizes):
        return None
    place = 2 * (len(node.meta["shape"]) - 1 - axis)
    before, after = (*sizes[place : place + 2], 0, 0)[:2]
    if (before or after) and (fill_value(node) is None or min(before, after) < 0):
        return None
    return before, after


def fill_value(node: fx.Node) -> float | None:
    """The number that a padding puts around a tensor, None for one that repeats what is inside."""
    if op_name(node) == "constant_pad_nd":
        value = _argument(node, 2, "value")
    else:
        value = _argument(node, 3, "value")
        if _argument(node, 2, "mode") not in (None, "constant"):
            return None
    return 0.0 if value is None else float(value)


def _reduced(axis: int, rank: int, dims: Any, keep: bool) -> tuple[int, int] | None:
    if not isinstance(dims, list | tuple) or not dims:
        return None
    gone = {d % rank for d in dims}
    return None if axis in gone else (axis if keep else axis - sum(d < axis for d in gone), 1)


def _reshaped(before: Sequence[int], axis: int, after: Sequence[int]) -> tuple[int, int] | None:
    lead, size = math.prod(before[:axis]), before[axis]
    merged = {math.prod(before[axis + 1 : k]) for k in range(axis + 1, len(before) + 1)}
    for b in range(len(after)):
        if math.prod(after[:b]) == lead and after[b] % size == 0 and after[b] // size in merged:
            repeats = after[b] // size
            if repeats == 1 or size > 1:
                return b, repeats
    return None


def _permuted(node: fx.Node, axis: int, rank: int) -> int:
    args: Any = node.args
    if op_name(node) in _SWAPS:
        a, b = args[1] % rank, args[2] % rank
        return int({a: b, b: a}.get(axis, axis))
    order: list[int] = [d % rank for d in args[1]]
    return order.index(axis)


def _argument(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _numbers(values: Any) -> list[float]:
    if isinstance(values, list | tuple):
        return [x for v in values for x in _numbers(v)]
    return [float(values)] if isinstance(values, bool | int | float) else []
