"""Residual blocks and spans of a captured graph: regions with one input and one output, found from additions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from palmette.graph.ops import IDEMPOTENT, is_mutable, is_state, module_of, op_name, skip_transparent


@dataclass(frozen=True)
class Block:
    """`output` = `source` + branch(`source`) (or two branches); `region`: the nodes between.

    An activation or a norm behind the sum belongs to the block where the source came out of the same one, as in
    post-activation and post-norm networks. Dropping it means output := source.
    """

    path: str
    source: fx.Node
    output: fx.Node
    region: frozenset[fx.Node]
    reason: str


def find_blocks(gm: fx.GraphModule) -> list[Block]:
    """Every residual block of the graph in execution order; `reason` says why one cannot be dropped."""
    nodes = list(gm.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    above = _ancestors(nodes)
    found = []
    seen: Counter[str] = Counter()
    for node in nodes:
        found_block = _block_at(gm, node, nodes, order, above)
        if found_block is None:
            continue
        source, output, region, reason = found_block
        base = _common_owner([n for n in region if not is_state(n)]) or str(node.meta["path"])
        path = base if not seen[base] else f"{base}#{seen[base]}"
        path = node.meta.setdefault("block", path)
        seen[base] += 1
        found.append(Block(path, source, output, region, reason))
    return found


def _ancestors(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """For each node a bit set of itself and the nodes it depends on."""
    above: dict[fx.Node, int] = {}
    for i, n in enumerate(nodes):
        bits = 1 << i
        for source in n.all_input_nodes:
            bits |= above[source]
        above[n] = bits
    return above


def _block_at(
    gm: fx.GraphModule, node: fx.Node, nodes: list[fx.Node], order: dict[fx.Node, int], above: dict[fx.Node, int]
) -> tuple[fx.Node, fx.Node, frozenset[fx.Node], str] | None:
    if op_name(node) != "add" or len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1 or node.meta.get("parallel"):
        return None
    left, right = node.args[0], node.args[1]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left.meta.get("shape") is None:
        return None
    if left.meta.get("shape") != right.meta.get("shape") or is_state(left) or is_state(right):
        return None
    common = above[left] & above[right]
    while common:
        i = common.bit_length() - 1
        common ^= 1 << i
        source = nodes[i]
        if is_state(source) or source.meta.get("shape") is None or not source.meta["dtype"].is_floating_point:
            continue
        region = frozenset(
            n for n in nodes[i + 1 : order[node]] if above[n] >> i & 1 and above[node] >> order[n] & 1
        ) | {node}
        if all(u in region for n in region if n is not node for u in n.users):
            if not _has_branch(node, region):
                continue
            return (*_with_follower(gm, source, node, region), _reason(source, node, region))
        if skip_transparent(gm, left) is source or skip_transparent(gm, right) is source:
            return None
    return None


def _has_branch(node: fx.Node, region: frozenset[fx.Node]) -> bool:
    """A block must hold something with weights or a matrix product; x + act(x) is an activation."""
    return any(n.op == "call_module" or any(is_state(i) for i in n.all_input_nodes) for n in region if n is not node)


def _with_follower(
    gm: fx.GraphModule, source: fx.Node, node: fx.Node, region: frozenset[fx.Node]
) -> tuple[fx.Node, fx.Node, frozenset[fx.Node]]:
    """Take in what stands behind the sum if the block's input came out of the same: f(f(x)) = f(x), a norm likewise."""
    if len(node.users) == 1:
        user = next(iter(node.users))
        same = op_name(user) == op_name(source) and op_name(user) in IDEMPOTENT
        if same and user.args[0] is node and user.args[1:] == source.args[1:] and user.kwargs == source.kwargs:
            return source, user, region | {user}
        kind = _norm_kind(gm, user)
        if kind is not None and user.args[0] is node and kind == _norm_kind(gm, skip_transparent(gm, source)):
            return source, user, region | {user}
    return source, node, region


def _norm_kind(gm: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    """What makes two norms of each token alike, their scale and offset aside; None for any other node."""
    module: Any = module_of(gm, node)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return type(module), tuple(module.normalized_shape)
    if op_name(node) in ("layer_norm", "rms_norm"):
        return op_name(node), tuple(node.args[1])  # type: ignore[arg-type]
    return None


def _reason(source: fx.Node, node: fx.Node, region: frozenset[fx.Node]) -> str:
    if source.meta["shape"] != node.meta["shape"]:
        return f"unequal shapes: input {source.meta['shape'][1:]}, output {node.meta['shape'][1:]}"
    if source.op == "placeholder":
        return "its input is the network's input"
    if any(is_mutable(n) and n.all_input_nodes and n.all_input_nodes[0] not in region for n in region):
        return "it writes into a tensor from outside"
    return ""


def _common_owner(nodes: list[fx.Node]) -> str:
    """Longest common module path of the nodes' stable paths."""
    parts = [str(n.meta["path"]).split("#")[0].split(".") for n in nodes]
    common = parts[0]
    for p in parts[1:]:
        k = 0
        while k < min(len(common), len(p)) and common[k] == p[k]:
            k += 1
        common = common[:k]
    return ".".join(common)


def find_spans(gm: fx.GraphModule, blocks: list[Block]) -> list[tuple[Block, ...]]:
    """Maximal runs of at least two consecutive droppable blocks, each reading the one before."""
    spans: list[list[Block]] = []
    free = [b for b in blocks if not b.reason]
    for block in free:
        source = skip_transparent(gm, block.source)
        if spans and spans[-1][-1].output is source:
            spans[-1].append(block)
        else:
            spans.append([block])
    return [tuple(s) for s in spans if len(s) > 1]
