"""Weights of an ONNX graph that lie on a grid of 8-bit integers become integers with a DequantizeLinear behind them.

They are known by their values: the exporter folds batch norms into convolutions, which scales a whole row, and
transposes the weights of products, which turns rows into columns. Neither takes a row off its grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from palmette.compat import optional
from palmette.graph.int8 import LARGEST, SHORTEST

_Array = np.ndarray[Any, np.dtype[Any]]

_ROUNDING = 8 * float(np.finfo(np.float32).eps)
"""How far a value may lie from its grid, by the largest of its row."""


def store_as_int8(model: Any) -> None:
    """Store every initializer of an onnx_ir model as int8 that loses nothing by it, in place.

    Rows come first, and columns are turned back behind: with scales along the last axis, ONNX Runtime would compute the
    product in 8 bits, activations included.
    """
    ir = optional("onnx_ir", package="palmette[onnx]")
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is None or value.dtype != ir.DataType.FLOAT:
            continue
        weight = value.const_value.numpy()
        for turned in (False, True):
            stored = _on_grid(weight.T if turned else weight) if weight.ndim == 2 or not turned else None
            if stored is not None:
                _put(ir, model.graph, name, stored, turned)
                break


def _on_grid(weight: _Array) -> tuple[_Array, _Array] | None:
    """Integers [rows, ...] and scales [rows] of a weight on a grid, None for one off it, or with short rows."""
    if weight.ndim < 2 or weight[:1].size < SHORTEST or not np.isfinite(weight).all():
        return None
    largest = np.abs(weight).max(tuple(range(1, weight.ndim)), keepdims=True)
    steps = (largest / LARGEST).astype(np.float32)
    scales = np.where(steps > 0, steps, np.float32(1))
    integers = np.rint(weight / scales)
    if not bool((np.abs(integers * scales - weight) <= _ROUNDING * largest).all()):
        return None
    return np.ascontiguousarray(integers, np.int8), scales.reshape(-1)


def _put(ir: Any, graph: Any, name: str, stored: tuple[_Array, _Array], turned: bool) -> None:
    """Put integers and scales in place of the initializer of that name, turned for a matrix of columns."""
    inputs = []
    for what, array in zip(("int8", "scales"), stored, strict=True):
        tensor = ir.tensor(array, name=f"{name}_{what}")
        inputs.append(ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype)))
        inputs[-1].const_value = tensor
        graph.register_initializer(inputs[-1])
    nodes = [ir.node("DequantizeLinear", inputs, attributes={"axis": 0})]
    if turned:
        nodes.append(ir.node("Transpose", nodes[0].outputs, attributes={"perm": [1, 0]}))
    old, new = graph.initializers.pop(name), nodes[-1].outputs[0]
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)
    graph.insert_before(graph[0], nodes)
