"""Weights of an ONNX graph that lie on a grid of 8-bit integers become integers with a DequantizeLinear behind them.

They are known by their values: the exporter folds batch norms into convolutions, which scales a whole row, and
transposes the weights of products, which turns rows into columns. Neither takes a row off its grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from palmette.compat import optional
from palmette.graph.int8 import LARGEST

_Array = np.ndarray[Any, np.dtype[Any]]

_ROUNDING = 8 * float(np.finfo(np.float32).eps)
"""How far a value may lie from its grid, by the largest of its row."""


def store_as_int8(model: Any) -> None:
    """Store every initializer of an onnx_ir model as int8 that loses nothing by it, in place."""
    ir = optional("onnx_ir", package="palmette[onnx]")
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or value.dtype != ir.DataType.FLOAT or len(value.const_value.shape) < 2:
            continue
        found = _on_grid(value.const_value.numpy())
        if found is None:
            continue
        integers, scales, axis = found
        stored = [
            ir.Value(name=f"{name}_{what}", const_value=ir.tensor(array, name=f"{name}_{what}"))
            for what, array in (("int8", integers), ("scales", scales))
        ]
        for each in stored:
            each.shape, each.type = each.const_value.shape, ir.TensorType(each.const_value.dtype)
            graph.register_initializer(each)
        node = ir.node("DequantizeLinear", stored, attributes={"axis": axis})
        node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        del graph.initializers[name]
        node.outputs[0].name = name
        graph.insert_before(graph[0], node)


def _on_grid(weight: _Array) -> tuple[_Array, _Array, int] | None:
    """Integers [like weight] and scales [length of the axis] of a weight on a grid, and the axis; None off any."""
    for axis in (0, weight.ndim - 1):
        largest = np.abs(weight).max(tuple(i for i in range(weight.ndim) if i != axis), keepdims=True)
        scales = np.where(largest > 0, largest / LARGEST, 1.0).astype(np.float32)
        integers = np.rint(weight / scales)
        if bool((np.abs(integers * scales - weight) <= _ROUNDING * largest).all()):
            return integers.astype(np.int8), scales.reshape(-1), axis
    return None
