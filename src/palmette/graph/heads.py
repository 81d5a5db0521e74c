"""Attention heads of a captured graph: which rows and columns of which layers belong to each.

A head is followed by execution, not by names: the rows of a projection are numbered, the numbers take every view,
transposition and split on their way to the attention, and come out where the head's axis is. So fused and separate
projections, in any layout, are the same to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from palmette.graph.ops import Attention, is_state, is_transparent, module_of, op_name, tensor_inputs
from palmette.graph.paths import Reader

_MOVES = frozenset(
    {
        "view", "reshape", "permute", "transpose", "unbind", "getitem", "select", "slice", "squeeze", "unsqueeze",
        "contiguous", "clone", "unflatten", "flatten", "chunk", "split", "split_with_sizes", "t", "alias", "detach",
    }
)  # fmt: skip
"""Operations that only move what they are given."""

_SIZED = {"view": 1, "reshape": 1, "unflatten": 2}
"""Operations with a list of sizes, and its place among the arguments."""


@dataclass(frozen=True)
class HeadSite:
    """One attention whose heads can go.

    `name`: its path. `order` [count]: the heads, the most important first. `layers`: path, side ("rows" or "columns")
    and head [channels] of every layer that is narrowed with them; `states`: the same for weights that are no module's,
    along their first axis. `sizes`: path, argument and list of sizes of the operations that spell out the number of
    heads, with None for a size that does not follow it. `between`: the nodes whose outputs they narrow. `reason`: why
    they must all stay, "" if they need not.
    """

    name: str
    node: fx.Node
    count: int = 0
    order: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    layers: tuple[tuple[str, str, Tensor], ...] = ()
    states: tuple[tuple[str, Tensor], ...] = ()
    sizes: tuple[tuple[str, int, list[int | None]], ...] = ()
    between: tuple[fx.Node, ...] = ()
    reason: str = ""

    @property
    def paths(self) -> list[str]:
        """Of the layers that are narrowed."""
        return [path for path, _, _ in self.layers]


def head_sites(gm: fx.GraphModule) -> list[HeadSite]:
    """Every scaled dot-product attention of the graph."""
    return [_Follower(gm, node).site() for node in gm.graph.nodes if _attends(gm, node)]


def _attends(gm: fx.GraphModule, node: fx.Node) -> bool:
    return op_name(node) == "scaled_dot_product_attention" or isinstance(module_of(gm, node), Attention)


class _Lost(Exception):
    """The heads cannot be followed; the message says why."""


class _Follower:
    """Follows the heads of one attention to the layers that write and read them."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node) -> None:
        self.gm, self.node, self.reader = gm, node, Reader(gm)
        self.layers: dict[tuple[str, str], Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.sizes: dict[str, tuple[str, int, list[int | None]]] = {}
        self.between: dict[fx.Node, None] = {}

    def site(self) -> HeadSite:
        """The site, with the reason where its heads cannot be told apart."""
        name = str(self.node.meta["path"])
        try:
            return self._found(name)
        except _Lost as lost:
            return HeadSite(name, self.node, reason=str(lost))

    def _found(self, name: str) -> HeadSite:
        shapes = [n.meta["shape"] for n in self.node.args[:3]]  # type: ignore[union-attr]
        count = shapes[0][-3] if len(shapes[0]) > 3 else 0
        if count == 0 or any(len(s) < 4 or s[-3] != count for s in shapes):
            raise _Lost("its queries, keys and values have different numbers of heads")
        for operand in self.node.all_input_nodes:  # a mask, or a bias for each head
            if operand in self.node.args[:3]:
                continue
            shape = operand.meta.get("shape")
            if shape is None or (len(shape) > 2 and shape[-3] != 1):
                raise _Lost("a mask or bias is given for each head")
        moved = [self._upwards(operand, count) for operand in self.node.args[:3]]
        for source, values in moved:  # only now are all rows told of a projection that is met thrice
            for node, numbers in values.items():
                self._note_sizes(node, numbers, self._rows(source), count)
        self._downwards(count)
        self._check_alone()
        order = self._importance(count).argsort(descending=True, stable=True)
        return HeadSite(
            name,
            self.node,
            count,
            order,
            tuple((path, side, heads) for (path, side), heads in self.layers.items()),
            tuple(self.states.items()),
            tuple(self.sizes.values()),
            tuple(self.between),
        )

    # -- towards the projections ---------------------------------------------------------------------------------------

    def _upwards(self, operand: Any, count: int) -> tuple[fx.Node, dict[fx.Node, Any]]:
        """The projection of an operand, and its row numbers where each node on the way has taken them."""
        chain: list[fx.Node] = []
        node = operand
        while not self.reader.is_affine(node):
            if not self._moves(node):
                raise _Lost(f"'{node.meta.get('path', node.name)}' lies between its projections and the attention")
            chain.append(node)
            node = node.all_input_nodes[0]
        values = self._numbered(node, chain[::-1])
        heads = self._heads_of(values[operand], node.meta["shape"][-1], count)
        self._note_writer(node, heads)
        self.between |= dict.fromkeys(values)
        return node, values

    def _numbered(self, source: fx.Node, chain: list[fx.Node]) -> dict[fx.Node, Any]:
        shape = source.meta["shape"]
        values: dict[fx.Node, Any] = {source: torch.arange(shape[-1]).expand(shape).contiguous()}
        for node in chain:
            values[node] = self._run(node, values)
        return values

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        def value(n: fx.Node) -> Any:
            return values[n] if n in values else self._size(n)

        if node.op == "call_module":  # a dropout
            return values[node.all_input_nodes[0]]
        target: Any = node.target
        return target(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))

    def _size(self, node: fx.Node) -> Any:
        """The number that a node computes from sizes, at the example's batch."""
        if op_name(node) == "sym_size":
            source: Any = node.args[0]
            return source.meta["shape"][node.args[1]]
        if node.op != "call_function" or node.meta.get("shape") is not None:
            raise _Lost(f"'{node.meta.get('path', node.name)}' takes part in a reshape")
        target: Any = node.target
        return target(*fx.node.map_arg(node.args, self._size), **fx.node.map_arg(node.kwargs, self._size))

    def _moves(self, node: fx.Node) -> bool:
        if node.op == "call_function" and op_name(node) in _MOVES:
            return True
        return bool(node.all_input_nodes) and is_transparent(self.gm, node)

    def _heads_of(self, numbers: Tensor, rows: int, count: int) -> Tensor:
        """The head [rows] of each row of a projection, -1 for one that goes elsewhere."""
        heads = torch.full((rows,), -1)
        for head in range(count):
            own = numbers.select(-3, head).unique()
            if bool((heads[own] >= 0).any()):
                raise _Lost("its heads share rows of a projection")
            heads[own] = head
        return heads

    def _note_writer(self, node: fx.Node, heads: Tensor) -> None:
        if node.op == "call_module" and self.reader.weight_reason(node) == "":
            self._merge(self.layers, (str(node.meta["path"]), "rows"), heads)
            return
        states = [n for n in node.all_input_nodes[1:] if is_state(n)]
        if self.reader.weight_reason(node) or op_name(node) != "linear" or not states:
            raise _Lost(self.reader.weight_reason(node) or "its projections are no layers")
        for state in states:
            self._merge(self.states, str(state.target), heads)

    def _rows(self, node: fx.Node) -> Tensor:
        """The head [rows] of each row of a projection that was noted."""
        known = self.layers.get((str(node.meta["path"]), "rows"))
        if known is not None:
            return known
        return next(self.states[str(n.target)] for n in node.all_input_nodes[1:] if is_state(n))

    @staticmethod
    def _merge(table: dict[Any, Tensor], key: Any, heads: Tensor) -> None:
        """A fused projection is met thrice, for queries, keys and values; each time other rows are told."""
        table[key] = torch.maximum(table[key], heads) if key in table else heads

    def _note_sizes(self, node: fx.Node, numbers: Any, heads: Tensor, count: int) -> None:
        """Note which sizes of a reshape follow the number of heads; -1 stands for one that was computed."""
        place = _SIZED.get(op_name(node))
        if place is None:
            return
        path, args = str(node.meta["path"]), cast(Any, node.args)
        start = int(args[1]) % len(args[0].meta["shape"]) if place == 2 else 0
        of_head = heads[numbers]
        sizes: list[int | None] = []
        for axis, size in enumerate(args[place], start):
            follows = bool((of_head != of_head.narrow(axis, 0, 1)).any())
            if follows and isinstance(size, int) and size > 0 and size % count:
                raise _Lost(f"'{path}' has a size that is no multiple of the heads")
            sizes.append(None if not follows else size if isinstance(size, int) else -1)
        inferred = [old for old, new in zip(args[place], sizes, strict=True) if -1 in (old, new)]
        if len(inferred) > 1:
            raise _Lost(f"'{path}' computes several of its sizes")
        if any(size is not None for size in sizes):
            self.sizes[path] = (path, place, sizes)

    # -- towards the output projection ---------------------------------------------------------------------------------

    def _downwards(self, count: int) -> None:
        shape = self.node.meta["shape"]
        heads = torch.arange(count).view(count, 1, 1).expand(shape).contiguous()
        values: dict[fx.Node, Any] = {self.node: heads}
        node = self.node
        identity = torch.arange(count)
        for node in self._only_users():
            if self.reader.is_affine(node):
                self._note_reader(node, values[tensor_inputs(node)[0]])
                self.between |= dict.fromkeys(values)
                return
            if not self._moves(node):
                break
            values[node] = self._run(node, values)
            self._note_sizes(node, values[node], identity, count)
        raise _Lost(f"what it puts out is read by '{node.meta.get('path', node.name)}' before a projection")

    def _only_users(self) -> Iterator[fx.Node]:
        node = self.node
        while len(node.users) == 1:
            node = next(iter(node.users))
            yield node

    def _check_alone(self) -> None:
        """Nothing else may read what the heads narrow; reading the length of the batch is harmless."""
        readers = {*self.between, self.node}
        paths = {path for path, side in self.layers if side == "columns"}
        for node in self.between:
            for user in node.users:
                size = op_name(user) == "sym_size" and user.args[1] == 0
                if user not in readers and not size and user.meta.get("path") not in paths:
                    raise _Lost(f"'{user.meta.get('path', user.name)}' reads its heads, too")

    def _note_reader(self, node: fx.Node, heads: Tensor) -> None:
        columns = heads.reshape(-1, heads.shape[-1])
        if node.op != "call_module" or self.reader.weight_reason(node):
            raise _Lost("its output projection is no layer of its own")
        if bool((columns != columns[0]).any()):
            raise _Lost("its heads are mixed before the output projection")
        self.layers[str(node.meta["path"]), "columns"] = columns[0]

    def _importance(self, count: int) -> Tensor:
        """L1 norm [count] of the weights of the output projection that read each head."""
        (path, _), heads = next(((k, h) for k, h in self.layers.items() if k[1] == "columns"))
        node = next(n for n in self.gm.graph.nodes if n.op == "call_module" and n.meta["path"] == path)
        weight: Any = module_of(self.gm, node).weight  # type: ignore[union-attr]
        return torch.zeros(count, dtype=torch.float64).index_add_(0, heads, weight.detach().double().cpu().abs().sum(0))
