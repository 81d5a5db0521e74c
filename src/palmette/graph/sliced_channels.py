"""The channels of a graph whose sub-networks need not compute the same: they run on slices of its weights.

Pruning must not change what comes out, so `Channels` pins whatever meets a layer norm: over fewer features it computes
something else. A sub-network may do so; it normalises over the channels that it keeps, sliced before they are
normalised. Here channels therefore also pass norms of exactly their axis, embedding tables write them, projections
whose weights are no module's read them, and they may be averaged away. What they meet may be a view of a state, such as
a class token that is repeated for every sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.graph.channel_rules import ELEMENTWISE, carried, dimension, first, operand_axis, size_position
from palmette.graph.channels import Channels
from palmette.graph.ops import get_tensor, is_mutable, is_state, is_transparent, module_of, op_name, tensor_inputs

_NORMS = {"layer_norm", "rms_norm"}
_STATISTICS = {"mean", "var", "std"}
_RESHAPES = {"view", "reshape", "flatten"}
_FRESH = {"new_zeros", "new_ones", "new_full", "new_empty"}
"""Operations that take no more than a type and a device from a tensor."""

_ELEMENTWISE = ELEMENTWISE | {"addcmul"}


class SlicedChannels(Channels):
    """The channel variables of one captured graph that is run on slices of its weights.

    Layer norms are among `channelwise`, embeddings among `writers`, linears on a state among `readers`; their tables
    and weights are in `states`.
    """

    def weight(self, node: fx.Node) -> Tensor:
        """The weight [rows, columns, ...] of a writer or a reader; an embedding writes its columns."""
        module: Any = module_of(self.gm, node)
        if module is not None:
            found: Tensor = module.weight
            return found
        table = op_name(node) == "embedding"
        tensor = get_tensor(self.gm, str(_argument(node, 0 if table else 1).target))
        return tensor.t() if table else tensor

    def _visit(self, node: fx.Node) -> None:
        name = op_name(node)
        norm = name in _NORMS or isinstance(module_of(self.gm, node), nn.LayerNorm | nn.RMSNorm)
        known = (
            (name == "embedding" and self._embedding(node))
            or (name == "linear" and self._product(node))
            or (norm and self._rescale(node))
            or (name in _STATISTICS and self._averages_channels(node))
            or (name in _RESHAPES and self._interleave(node))
            or name in _FRESH
        )
        if known:
            return
        if (name in _ELEMENTWISE or name == "cat") and not is_mutable(node):
            self._adopt_operands(node)
        if name in _ELEMENTWISE - ELEMENTWISE and any(n in self.variables for n in node.all_input_nodes):
            self._elementwise(node)
        else:
            super()._visit(node)

    def _moved(self, node: fx.Node, axis: int) -> tuple[int, int] | None:
        return carried(node, axis)

    def _lies_last(self, node: Any) -> bool:
        return node in self.axis and self.axis[node] == len(node.meta["shape"]) - 1

    def _pass_on(self, node: fx.Node, source: fx.Node) -> None:
        unknown = torch.full_like(self.values[source], torch.nan)
        self._set(node, self.axis[source], self.variables[source], unknown)

    # -- layers --------------------------------------------------------------------------------------------------------

    def _embedding(self, node: fx.Node) -> bool:
        table = _argument(node, 0)
        if not self._own_state(table):
            return False
        channels = table.meta["shape"][1]
        self.states[table] = 1, node
        self.writers.append(node)
        unknown = torch.full((channels,), torch.nan, dtype=torch.float64)
        self._set(node, len(node.meta["shape"]) - 1, self._fresh(channels), unknown)
        return True

    def _product(self, node: fx.Node) -> bool:
        """A linear whose weight is a state reads the channels; its rows stay."""
        source, weight = first(node), _argument(node, 1)
        if not self._lies_last(source) or not self._own_state(weight) or len(weight.meta["shape"]) != 2:
            return False
        self.states[weight] = 1, source
        self.readers.append(node)
        return True

    def _rescale(self, node: fx.Node) -> bool:
        """A norm over exactly the channels, a module of its own or a function of states of its own."""
        source, module = first(node), module_of(self.gm, node)
        shape: Any = node.args[1] if module is None else module.normalized_shape
        states = [] if module is not None else [n for n in tensor_inputs(node) if n is not source]
        alone = self.reader.weight_reason(node) == "" if module is not None else all(map(self._own_state, states))
        if not self._lies_last(source) or len(shape) != 1 or not isinstance(shape[0], int) or not alone:
            return False
        if module is not None:
            self.channelwise.append(node)
        else:
            self.sized[node] = 0
            self.states |= dict.fromkeys(states, (0, node))
        self._pass_on(node, source)
        return True

    def _averages_channels(self, node: fx.Node) -> bool:
        """Whether the node puts out a statistic over the channels, which is right for those that are there."""
        source = first(node)
        dims: Any = node.args[1] if len(node.args) > 1 else None
        if source not in self.axis or not isinstance(dims, list | tuple):
            return False
        return self.axis[source] in {d % len(source.meta["shape"]) for d in dims}

    def _interleave(self, node: fx.Node) -> bool:
        """A reshape that puts the channels of neighbouring positions one behind another, as patches are merged."""
        source = first(node)
        if node.meta.get("shape") is None or source not in self.axis:
            return False
        place = _tiled(source.meta["shape"], self.axis[source], node.meta["shape"])
        if place is None:
            return False
        axis, copies = place
        try:
            position = size_position(node, axis)
        except LookupError:
            return False
        if position is not None:
            self.sized[node] = position
        self._set(node, axis, self.variables[source].repeat(copies), self.values[source].repeat(copies))
        return True

    # -- states --------------------------------------------------------------------------------------------------------

    def _adopt_operands(self, node: fx.Node) -> None:
        """Let views of states that meet channels carry them, too."""
        tracked = next((n for n in tensor_inputs(node) if n in self.variables), None)
        if tracked is None or node.meta.get("shape") is None:
            return
        rank = len(node.meta["shape"])
        axis = self.axis[tracked] + rank - len(tracked.meta["shape"])
        joins = op_name(node) == "cat"
        if joins and dimension(node, rank) == axis:
            return
        for operand in tensor_inputs(node):
            along = axis if joins else operand_axis(node, operand, axis)
            if operand in self.variables or along is None or (is_state(operand) and not joins):
                continue
            if operand.meta["shape"][along] == len(self.variables[tracked]) > 1:
                self._adopt(operand, along, tracked)

    def _adopt(self, operand: fx.Node, axis: int, tracked: fx.Node) -> None:
        chain: list[tuple[fx.Node, int, int | None]] = []
        node = operand
        while not is_state(node):
            place = _origin(self.gm, node, axis) if len(node.users) == 1 else None
            try:
                position = size_position(node, axis)
            except LookupError:
                return
            if place is None:
                return
            chain.append((node, axis, position))
            node, axis = first(node), place
        if not self._own_state(node):
            return
        unknown = torch.full_like(self.values[tracked], torch.nan)
        self.states[node] = axis, node
        for each, place, position in [*chain, (node, axis, None)]:
            self._set(each, place, self.variables[tracked], unknown)
            if position is not None:
                self.sized[each] = position


def _origin(gm: fx.GraphModule, node: fx.Node, axis: int) -> int | None:
    """The axis of the node's only tensor that lies along `axis` of what it puts out, None for none."""
    sources = tensor_inputs(node)
    if len(sources) != 1 or sources[0] is not node.args[0] or is_mutable(node):
        return None
    shape, size = sources[0].meta["shape"], node.meta["shape"][axis]
    for a, length in enumerate(shape):
        if length == size and (a == axis if is_transparent(gm, node) else carried(node, a) == (axis, 1)):
            return a
    return None


def _tiled(before: Sequence[int], axis: int, after: Sequence[int]) -> tuple[int, int] | None:
    """Where a reshape has put the channels one copy behind another, and how many copies; None where it has not."""
    tail, leads = math.prod(before[axis + 1 :]), {math.prod(before[:k]) for k in range(1, axis)}
    for b, size in enumerate(after):
        copies, rest = divmod(size, before[axis])
        if copies > 1 and not rest and math.prod(after[b + 1 :]) == tail and math.prod(after[:b]) in leads:
            return b, copies
    return None


def _argument(node: fx.Node, place: int) -> fx.Node:
    found: Any = node.args[place]
    return found  # type: ignore[no-any-return]
