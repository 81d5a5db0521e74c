"""Which channels of a captured graph are one and the same from layer to layer, and which of them carry a constant.

Every tensor between convolutions and linears has a list of channel variables. Convolutions and linears read one list
and write another; batch norms, activations, pooling and depthwise convolutions pass theirs on, elementwise operations
join those of their operands. A variable that reaches anything else (the output, attention, a layer norm) is pinned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from palmette.graph.channel_rules import (
    ELEMENTWISE,
    PADDINGS,
    channel_padding,
    dimension,
    fill_value,
    first,
    keeps_constants,
    moved,
    operand_axis,
    size_position,
)
from palmette.graph.ops import (
    BATCH_NORMS,
    ChannelAffine,
    alias_base,
    get_tensor,
    is_mutable,
    is_state,
    is_transparent,
    module_of,
    op_name,
)
from palmette.graph.paths import Reader, channel_axis, norm_map


class Channels:
    """The channel variables of one captured graph.

    `axis` and `variables` [channels]: of every node that carries some. `classes` [variables]: channels of one class can
    only go together; `pinned` [variables]: whether the class must stay. `values` [channels]: the constant that a
    channel carries in eval mode at every position for every input, NaN for one that varies (float64).
    `writers`, `readers`: convolutions and linears whose rows write and whose columns read variables; `channelwise`:
    batch norms, former activations and depthwise convolutions; `states`: parameters and buffers that meet the channels,
    with their axis and the node; `sized`: nodes whose arguments count channels, with the place.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.reader = gm, Reader(gm)
        self.axis: dict[fx.Node, int] = {}
        self.variables: dict[fx.Node, Tensor] = {}
        self.values: dict[fx.Node, Tensor] = {}
        self.writers: list[fx.Node] = []
        self.readers: list[fx.Node] = []
        self.channelwise: list[fx.Node] = []
        self.states: dict[fx.Node, tuple[int, fx.Node]] = {}
        self.sized: dict[fx.Node, int] = {}
        self._parent: list[int] = []
        self._stays: list[Tensor] = []
        self._overwritten = {alias_base(n) for m in gm.graph.nodes if is_mutable(m) for n in (m, *m.all_input_nodes)}
        for node in gm.graph.nodes:
            self._visit(node)
        self.classes = torch.tensor([self._find(i) for i in range(len(self._parent))], dtype=torch.long)
        self.pinned = torch.zeros(len(self._parent), dtype=torch.bool)
        for variables in self._stays:
            self.pinned[self.classes[variables]] = True
        self.pinned = self.pinned[self.classes]

    def of(self, node: fx.Node) -> Tensor:
        """Classes [channels] of a node that carries channels."""
        return self.classes[self.variables[node]]

    # -- variables -----------------------------------------------------------------------------------------------------

    def _fresh(self, n: int) -> Tensor:
        start = len(self._parent)
        self._parent.extend(range(start, start + n))
        return torch.arange(start, start + n)

    def _find(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def _join(self, a: Tensor, b: Tensor) -> None:
        if a is not b:
            for i, j in zip(a.tolist(), b.tolist(), strict=True):
                self._parent[self._find(j)] = self._find(i)

    def _set(self, node: fx.Node, axis: int, variables: Tensor, values: Tensor) -> None:
        if alias_base(node) in self._overwritten:  # what is written over later is no constant
            values = torch.full_like(values, torch.nan)
        self.axis[node], self.variables[node], self.values[node] = axis, variables, values

    def _stop(self, node: fx.Node) -> None:
        """Nothing is known of what the node does with the channels it reads: they stay as they are."""
        self._stays.extend(self.variables[n] for n in node.all_input_nodes if n in self.variables)

    # -- what a node does ----------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            return
        if node.op == "output" or is_mutable(node):
            self._stop(node)
        elif self.reader.is_affine(node):
            self._affine(node)
        elif op_name(node) == "sym_size":
            self._size(node)
        elif node.meta.get("shape") is None or not any(n in self.variables for n in node.all_input_nodes):
            self._stop(node)
        elif is_transparent(self.gm, node):
            source = first(node)
            self._set(node, self.axis[source], self.variables[source], self.values[source])
        elif isinstance(module_of(self.gm, node), (ChannelAffine, *BATCH_NORMS)):
            self._norm(node)
        elif op_name(node) in ELEMENTWISE:
            self._elementwise(node)
        elif op_name(node) in PADDINGS:
            self._pad(node)
        elif op_name(node) == "cat":
            self._cat(node)
        else:
            self._move(node)

    def _size(self, node: fx.Node) -> None:
        """Reading a size is harmless unless it counts the channels."""
        source = first(node)
        if source in self.axis and self.axis[source] == dimension(node, len(source.meta["shape"])):
            self._stop(node)

    def _affine(self, node: fx.Node) -> None:
        module: Any = module_of(self.gm, node)
        kind, source, shape = self.reader.kind(node), first(node), node.meta["shape"]
        if module is None or kind not in ("conv", "linear") or (kind == "conv" and len(shape) != module.weight.dim()):
            self._stop(node)  # shared or computed weights
            return
        axis, groups = (len(shape) - 1, 1) if kind == "linear" else (1, module.groups)
        rows, columns = module.weight.shape[0], module.weight.shape[1] * groups
        follows = self.axis.get(source) == axis
        values = self.values[source] if follows else torch.full((columns,), torch.nan, dtype=torch.float64)
        if groups == 1:
            if follows:
                self.readers.append(node)
            else:
                self._stop(node)
            self.writers.append(node)
            self._set(node, axis, self._fresh(rows), through(module, values))
        elif follows and groups == rows == columns:
            self.channelwise.append(node)
            self._set(node, axis, self.variables[source], through(module, values))
        else:
            self._stop(node)

    def _norm(self, node: fx.Node) -> None:
        module: Any = module_of(self.gm, node)
        source = first(node)
        lone = self.reader.kind(node) != "" and self.reader.weight_reason(node) == ""
        if not lone or source not in self.variables or channel_axis(self.gm, node) != self.axis[source]:
            self._stop(node)
            return
        slope, offset = (module.slope, module.offset) if isinstance(module, ChannelAffine) else norm_map(module)
        slope, offset = slope.detach().double().cpu(), offset.detach().double().cpu()
        values = torch.where(slope == 0, offset, slope * self.values[source] + offset)
        self.channelwise.append(node)
        self._set(node, self.axis[source], self.variables[source], values)

    def _elementwise(self, node: fx.Node) -> None:
        rank = len(node.meta["shape"])
        operands = [n for n in node.all_input_nodes if n.meta.get("shape") is not None]
        tracked = [n for n in operands if n in self.variables]
        places = {self.axis[n] - len(n.meta["shape"]) for n in tracked}
        place = max(places)
        size = node.meta["shape"][place]
        along = {n: operand_axis(node, n, rank + place) for n in operands}
        lengths = {n: 1 if axis is None else n.meta["shape"][axis] for n, axis in along.items()}
        others = {n: axis for n, axis in along.items() if axis is not None and n not in tracked and lengths[n] != 1}
        lost = any(along[n] is None or lengths[n] != size for n in tracked)
        if len(places) > 1 or lost or not all(self._own_state(n) for n in others):
            self._stop(node)
            return
        for n in tracked[1:]:
            self._join(self.variables[tracked[0]], self.variables[n])
        for n, axis in others.items():
            self.states[n] = (axis, node)
        self._set(node, rank + place, self.variables[tracked[0]], self._evaluated(node, tracked, lengths))

    def _own_state(self, node: fx.Node) -> bool:
        """Whether the node reads a parameter or buffer that nothing else reads."""
        if not is_state(node) or len(node.users) > 1 or self.reader.read_twice(node):
            return False
        return id(get_tensor(self.gm, str(node.target))) not in self.reader.shared

    def _evaluated(self, node: fx.Node, tracked: list[fx.Node], lengths: dict[fx.Node, int]) -> Tensor:
        """Constants [channels] behind an elementwise operation, computed by the operation itself.

        lengths: of its operands along the channels. A state that varies along another axis leaves no constant.
        """
        values = [self.values[n] for n in tracked]
        known = ~torch.stack(values).isnan().any(0)
        states = [n for n in node.all_input_nodes if is_state(n)]
        if set(node.all_input_nodes) == {*tracked, *states} and all(
            get_tensor(self.gm, str(n.target)).numel() in (1, lengths.get(n, 1)) for n in states
        ):
            result = self._run(node)
        else:
            result, known = torch.zeros_like(values[0]), torch.zeros_like(known)
        result = torch.where(known, result, torch.nan)
        if op_name(node) == "mul":
            result = torch.where(torch.stack([v == 0 for v in values]).any(0), 0.0, result)
        return result

    def _run(self, node: fx.Node) -> Tensor:
        def constants(n: fx.Node) -> Tensor:
            if is_state(n):
                return get_tensor(self.gm, str(n.target)).detach().double().cpu()
            shape = [1] * len(n.meta["shape"])
            shape[self.axis[n]] = -1
            return self.values[n].nan_to_num().view(shape)

        target: Any = node.target
        result: Tensor = target(*fx.node.map_arg(node.args, constants), **fx.node.map_arg(node.kwargs, constants))
        return result.reshape(-1).double()

    def _pad(self, node: fx.Node) -> None:
        source = first(node)
        axis, values = self.axis[source], self.values[source]
        fill, around = fill_value(node), channel_padding(node, axis)
        if around is None:
            self._stop(node)
            return
        before, after = around
        if fill is not None and sum(map(abs, node.args[1])) > before + after:  # type: ignore[arg-type]
            values = torch.where(values == fill, values, torch.nan)
        edges = [values.new_full((n,), fill or 0.0) for n in around]
        variables = self.variables[source]
        if before or after:
            self.sized[node] = axis
            variables = torch.cat([self._fresh(before), variables, self._fresh(after)])
        self._set(node, axis, variables, torch.cat([edges[0], values, edges[1]]))

    def _cat(self, node: fx.Node) -> None:
        parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        along = dimension(node, len(node.meta["shape"]))
        axes = {self.axis.get(n) for n in parts}
        axis = self.axis[next(n for n in parts if n in self.axis)]
        if axes != {axis} or (along != axis and len({len(self.variables[n]) for n in parts}) > 1):
            self._stop(node)
        elif along == axis:
            self._set(
                node, axis, torch.cat([self.variables[n] for n in parts]), torch.cat([self.values[n] for n in parts])
            )
        else:
            for n in parts[1:]:
                self._join(self.variables[parts[0]], self.variables[n])
            values = torch.stack([self.values[n] for n in parts])
            same = (values == values[0]).all(0)
            self._set(node, axis, self.variables[parts[0]], torch.where(same, values[0], torch.nan))

    def _moved(self, node: fx.Node, axis: int) -> tuple[int, int] | None:
        """Channel axis behind the node and repeats of each channel there; None if that is lost."""
        return moved(node, axis)

    def _move(self, node: fx.Node) -> None:
        source: Any = node.args[0] if node.args else None
        place = self._moved(node, self.axis[source]) if source in self.axis else None
        if place is None or [n for n in node.all_input_nodes if n in self.variables] != [source]:
            self._stop(node)
            return
        axis, repeats = place
        try:
            position = size_position(node, axis)
        except LookupError:
            self._stop(node)
            return
        if position is not None:
            self.sized[node] = position
        values = self.values[source]
        if not keeps_constants(node):
            values = torch.where(values == 0, values, torch.nan)
        self._set(node, axis, self.variables[source].repeat_interleave(repeats), values.repeat_interleave(repeats))


def through(module: Any, values: Tensor) -> Tensor:
    """Constants [outputs] behind a convolution or linear of constants [inputs], float64; NaN for what varies.

    An output varies if it reads an input that varies, or one that zero padding would set off at the border.
    """
    weight, bias = module.weight.detach().cpu(), module.bias
    if padded(module):
        values = torch.where(values == 0, values, torch.nan)
    if getattr(module, "groups", 1) > 1:  # depthwise
        constant = torch.where((weight == 0).flatten(1).all(1), 0.0, weight.double().flatten(1).sum(1) * values)
    else:
        known = values.isfinite()
        varies = (weight[:, ~known] != 0).flatten(1).any(1)
        sums = weight[:, known].double()
        constant = torch.where(varies, torch.nan, (sums.flatten(2).sum(2) if sums.dim() > 2 else sums) @ values[known])
    return constant if bias is None else constant + bias.detach().double().cpu()


def padded(module: Any) -> bool:
    """Whether a convolution pads its input; a linear does not."""
    padding = getattr(module, "padding", 0)
    return padding != "valid" if isinstance(padding, str) else any(padding) if isinstance(padding, tuple) else False
