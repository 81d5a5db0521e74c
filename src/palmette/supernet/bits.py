"""How many bits a layer's weight is stored in, as a choice: 8, integers with one scale per output channel, or 32.

Weights alone: activations stay in floating point, and so do biases. 32 is the weight as it is. What is alive at a step
does not depend on it, for kernels that dequantise a weight as they read it; a kernel that first writes the weight out
in floating point needs that much more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from palmette.errors import InputError
from palmette.graph.candidates import is_protected
from palmette.graph.int8 import SCALE_BYTES, SHORTEST
from palmette.graph.ops import get_tensor
from palmette.graph.paths import Reader

if TYPE_CHECKING:
    from palmette.supernet.codes import Codes, Floats

INT8, WHOLE = 8, 32


@dataclass(frozen=True)
class BitsSite:
    """A layer whose weight may be stored in 8 bits. `state`: the name of the weight in the network's state."""

    path: str
    state: str
    node: fx.Node


def checked_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """The values of the choices, ascending, 32 among them; () for none. Raises InputError for others than 8 and 32."""
    if not set(bits) <= {INT8, WHOLE}:
        raise InputError(
            f"bits = {list(bits)} is not possible",
            why="weights are stored as 8-bit integers, or as they are",
            fix=f"Give ({INT8}, {WHOLE}), or () for no such choices.",
        )
    return (INT8, WHOLE) if INT8 in bits else ()


def bits_sites(reader: Reader, protect: Iterable[str], narrowest: Iterable[Mapping[str, Any]]) -> list[BitsSite]:
    """Convolutions and linears with a weight of their own whose rows stay long enough for a scale each, in order.

    narrowest: what the smallest network leaves of layers, entries of a decision of `resize`.
    """
    cuts, protect = {entry["path"]: entry for entry in narrowest}, tuple(protect)
    found = []
    for node in reader.gm.graph.nodes:
        path, state = str(node.meta.get("path")), _own_weight(reader, node)
        if state and not is_protected(path, protect):
            shape = tuple(get_tensor(reader.gm, state).shape)
            if _row(shape, cuts.get(path, {})) >= SHORTEST:
                found.append(BitsSite(path, state, node))
    return found


def _own_weight(reader: Reader, node: fx.Node) -> str:
    """The name of an affine node's weight, "" if the weight is shared, computed or read twice."""
    if not reader.is_affine(node):
        return ""
    state = f"{node.target}.weight"
    if node.op != "call_module":
        weight = node.args[1] if len(node.args) > 1 else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) > 1:
            return ""
        node, state = weight, str(weight.target)
    elif reader.calls[state]:  # the module is called, and its weight is read beside it
        return ""
    tensor = get_tensor(reader.gm, state)
    alone = reader.calls[str(node.target)] == 1 and id(tensor) not in reader.shared
    return state if alone and isinstance(tensor, nn.Parameter) else ""


def _row(shape: Sequence[int], cut: Mapping[str, Any]) -> int:
    """Elements of a row of a weight of that shape after a cut."""
    columns = sum(stop - start for start, stop in cut["columns"]["keep"]) if "columns" in cut else shape[1]
    kernel = [cut["kernel"]] * len(shape[2:]) if "kernel" in cut else shape[2:]
    return columns * math.prod(kernel)


def element_bytes(codes: Codes, choice: str | None, item: int) -> Floats:
    """Bytes by code of one element of a weight that takes `item` bytes unless its choice says 8 bits."""
    vector = codes.constant(item)
    if choice is not None:
        vector[codes.first[choice]] = min(item, 1) - item
    return vector


def scale_bytes(codes: Codes, choice: str, item: int) -> Floats:
    """Bytes by code of the scale of one row; none on a device that stores 8 bits anyway, whatever is chosen."""
    vector = codes.constant(0.0)
    vector[codes.first[choice]] = SCALE_BYTES if item > 1 else 0.0
    return vector
