"""Rewrite a graph by recorded decisions: merge a run into one, narrow dead channels, absorb a former activation.

A decision is plain JSON and names nodes by their stable paths, so that `load` can repeat it on a fresh copy of the
source network without timing or algebra.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.errors import PlanError
from palmette.graph.affine import Affine
from palmette.graph.ops import BATCH_NORMS, ChannelAffine, module_of, set_module
from palmette.graph.paths import Reader
from palmette.graph.segments import Merged, conv_module


def replay(gm: fx.GraphModule, decisions: list[dict[str, Any]]) -> None:
    """Repeat the structure of recorded decisions in place; the new weights are left uninitialised."""
    for decision in decisions:
        kind = decision["type"]
        if kind == "merge":
            merge(gm, decision, empty_map(decision["map"]))
        elif kind == "widen":
            widen(gm, decision, [empty_map(level["map"]) for level in decision["levels"]])
        elif kind == "narrow":
            narrow(gm, decision)
        elif kind == "absorb":
            absorb(gm, decision)


def node_at(gm: fx.GraphModule, path: str) -> fx.Node:
    """The node of that stable path. Raises PlanError if there is none."""
    node: fx.Node
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output") and node.meta.get("path") == path:
            return node
    raise PlanError(f"The network has no operation '{path}'", fix="Load into the network that the file was made from.")


def describe_map(a: Affine) -> dict[str, Any]:
    """JSON-able geometry of a map."""
    return {
        "shape": list(a.weight.shape),
        "stride": list(a.stride),
        "before": list(a.before),
        "after": list(a.after),
        "dilation": list(a.dilation),
        "groups": a.groups,
        "edge": a.edge,
    }


def empty_map(raw: dict[str, Any]) -> Affine:
    """The map of a description, without weights."""
    weight = torch.empty(raw["shape"], dtype=torch.float64, device="meta")
    stride, before, after, dilation = (tuple(raw[k]) for k in ("stride", "before", "after", "dilation"))
    bias = weight.new_empty(raw["shape"][0])
    return Affine(weight, bias, stride, before, after, dilation, raw["groups"], raw["edge"])


def merge(gm: fx.GraphModule, decision: dict[str, Any], merged: Affine) -> fx.Node:
    """Replace the nodes of a run by one operation, with the addition of an absorbed skip; returns the new output."""
    nodes = [node_at(gm, p) for p in decision["nodes"]]
    source, last, result = nodes[0].args[0], nodes[-1], decision["result"]
    like = _reference(gm, nodes)
    twin = Merged(merged, like=like)
    set_module(gm, result, _trained_like(twin.main, gm))
    with gm.graph.inserting_after(last):
        new = gm.graph.call_module(result, (source,))
    new.meta.update(last.meta, path=result)
    if twin.sizes is not None:
        with gm.graph.inserting_before(new):
            pad = gm.graph.call_function(torch.ops.aten.constant_pad_nd.default, (source, twin.sizes, 0.0))
        pad.meta.update(_padded_meta(source, merged), path=f"{result}.pad")
        new.args = (pad,)
    end = new if twin.edge is None else _add_edge(gm, new, source, twin, result)
    last.replace_all_uses_with(end, delete_user_cb=lambda u: u is not new)
    for node in reversed(nodes):
        gm.graph.erase_node(node)
    if decision.get("skip"):
        add = node_at(gm, decision["skip"])
        add.replace_all_uses_with(end)
        gm.graph.erase_node(add)
    if decision.get("norm"):
        _strip_norm(gm, decision["norm"])
    return end


def widen(gm: fx.GraphModule, decision: dict[str, Any], maps: list[Affine]) -> None:
    """Put a wide branch in the place of the first of its strands and take the others out of the sum, in place."""
    for path in decision["leaves"]:
        leaf = node_at(gm, path)
        add = next(iter(leaf.users))
        add.replace_all_uses_with(next(n for n in add.all_input_nodes if n is not leaf))
        gm.graph.erase_node(add)
    widen_levels(gm, decision, maps)


def widen_levels(gm: fx.GraphModule, decision: dict[str, Any], maps: list[Affine]) -> None:
    """Replace the operations of one strand by wide ones, in place."""
    for level, a in zip(decision["levels"], maps, strict=True):
        merge(gm, level, a)


def _padded_meta(source: Any, merged: Affine) -> dict[str, Any]:
    sizes = zip(source.meta["shape"][2:], merged.before, merged.after, strict=True)
    return {"shape": (*source.meta["shape"][:2], *(n + b + a for n, b, a in sizes)), "dtype": source.meta["dtype"]}


def _add_edge(gm: fx.GraphModule, new: fx.Node, source: Any, twin: Merged, result: str) -> fx.Node:
    """Add conv(ones, edge): what a bias in front of zero padding gives, exact at every resolution."""
    aten, graph = torch.ops.aten, gm.graph
    set_module(gm, result + "_edge", _trained_like(twin.edge, gm))  # type: ignore[arg-type]
    with graph.inserting_after(new):
        end = graph.call_function(aten.add.Tensor, (new, new))
    with graph.inserting_before(end):
        steps = [graph.call_function(aten.slice.Tensor, (source, 0, 0, 1))]
        steps.append(graph.call_function(aten.slice.Tensor, (steps[-1], 1, 0, 1)))
        steps.append(graph.call_function(aten.ones_like.default, (steps[-1],)))
        if twin.sizes is not None:
            steps.append(graph.call_function(aten.constant_pad_nd.default, (steps[-1], twin.sizes, 0.0)))
        edge = graph.call_module(result + "_edge", (steps[-1],))
    end.args = (new, edge)
    end.meta.update(new.meta, path=result + ".with_edge")
    for i, node in enumerate(steps):
        node.meta.update(shape=(1, 1, *source.meta["shape"][2:]), dtype=new.meta["dtype"], path=f"{result}_edge.{i}")
    edge.meta.update(shape=(1, *new.meta["shape"][1:]), dtype=new.meta["dtype"], path=result + "_edge")
    return end


def _strip_norm(gm: fx.GraphModule, path: str) -> None:
    """A layer norm whose scale and offset went into the linear behind it."""
    node = node_at(gm, path)
    old: Any = module_of(gm, node)
    set_module(
        gm,
        str(node.target),
        _trained_like(nn.LayerNorm(old.normalized_shape, eps=old.eps, elementwise_affine=False), gm),
    )


def _reference(gm: fx.GraphModule, nodes: list[fx.Node]) -> Tensor:
    reader = Reader(gm)
    for node in nodes:
        if reader.is_affine(node):
            return reader.parameters(node)[0]
    return next(gm.parameters())


def _trained_like(module: nn.Module, gm: fx.GraphModule) -> nn.Module:
    return module.train(gm.training)


def narrow(gm: fx.GraphModule, decision: dict[str, Any]) -> None:
    """Delete channels that carry a constant: rows of the producer (and its norms), columns of the consumer."""
    producer, consumer = node_at(gm, decision["producer"]), node_at(gm, decision["consumer"])
    reader, keep = Reader(gm), torch.tensor(decision["keep"], dtype=torch.long)
    constant = _dead_constants(gm, decision, keep)
    weight, bias = reader.parameters(consumer)
    sums = weight.detach().double().flatten(2).sum(2) if weight.dim() > 2 else weight.detach().double()
    shift = sums @ constant.to(sums)
    old = None if bias is None else bias.detach().double()
    new_bias = old if old is not None else torch.zeros_like(shift)
    keep = keep.to(weight.device)
    rows, row_bias = reader.parameters(producer)
    _replace_affine(gm, producer, rows.detach()[keep], None if row_bias is None else row_bias.detach()[keep])
    has_shift = bool((constant != 0).any()) or bias is not None
    _replace_affine(gm, consumer, weight.detach()[:, keep], (new_bias + shift).to(weight) if has_shift else None)
    for path in decision["tail"]:
        _narrow_channelwise(gm, node_at(gm, path), keep)


def _dead_constants(gm: fx.GraphModule, decision: dict[str, Any], keep: Tensor) -> Tensor:
    """Value [C] of each channel that goes, zero for those that stay."""
    affine: Any = module_of(gm, node_at(gm, decision["affine"]))
    constant = affine.offset.detach().double().clone()
    constant[keep] = 0.0
    return constant  # type: ignore[no-any-return]


def _replace_affine(gm: fx.GraphModule, node: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
    old: Any = module_of(gm, node)
    a = Affine(
        weight.double(),
        torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device) if bias is None else bias.double(),
    )
    if weight.dim() > 2:
        a = Affine(
            a.weight,
            a.bias,
            tuple(old.stride),
            (0,) * (weight.dim() - 2),
            (0,) * (weight.dim() - 2),
            tuple(old.dilation),
        )
    module: Any = conv_module(a, bias=bias is not None, like=weight)
    if weight.dim() > 2:
        module.padding = old.padding
        module._reversed_padding_repeated_twice = old._reversed_padding_repeated_twice
    set_module(gm, str(node.target), _trained_like(module, gm))


def _narrow_channelwise(gm: fx.GraphModule, node: fx.Node, keep: Tensor) -> None:
    old: Any = module_of(gm, node)
    if isinstance(old, ChannelAffine):
        trainable = isinstance(old.slope, nn.Parameter)
        new: Any = ChannelAffine(old.slope.detach()[keep], old.offset.detach()[keep], old.axis, trainable=trainable)
    else:
        new = type(old)(len(keep), eps=old.eps, momentum=old.momentum, affine=old.affine).to(old.running_mean)
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(old, name)
            if value is not None:
                getattr(new, name).data.copy_(value.detach()[keep])
        new.num_batches_tracked = old.num_batches_tracked
    set_module(gm, str(node.target), _trained_like(new, gm))


def absorb(gm: fx.GraphModule, decision: dict[str, Any]) -> None:
    """Fold a former activation's slope and offset into the operation before it, or spell them out as arithmetic."""
    node = node_at(gm, decision["affine"])
    affine: Any = module_of(gm, node)
    if decision["into"] is None:
        _spell(gm, node, affine)
        return
    target = node_at(gm, decision["into"])
    module: Any = module_of(gm, target)
    slope, offset = affine.slope.detach().double(), affine.offset.detach().double()
    if isinstance(module, BATCH_NORMS):
        if getattr(module, "weight", None) is None:
            fresh = type(module)(module.num_features, eps=module.eps, momentum=module.momentum).to(module.running_mean)
            fresh._buffers.update(module._buffers)
            set_module(gm, str(target.target), _trained_like(fresh, gm))
            module = fresh
        with torch.no_grad():
            module.weight.copy_(module.weight.double() * slope)
            module.bias.copy_(module.bias.double() * slope + offset)
    else:
        weight, bias = Reader(gm).parameters(target)
        new_weight = weight.detach().double() * slope.view(-1, *[1] * (weight.dim() - 1))
        new_bias = offset if bias is None else bias.detach().double() * slope + offset
        with torch.no_grad():
            weight.copy_(new_weight)
            if bias is None:
                module.bias = nn.Parameter(new_bias.to(weight))
            else:
                bias.copy_(new_bias)
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    gm.graph.erase_node(node)


def _spell(gm: fx.GraphModule, node: fx.Node, affine: Any) -> None:
    shape = [1] * len(node.meta["shape"])
    shape[affine.axis] = -1
    base = "linearized_" + str(node.target).rpartition(".")[2]
    for name in ("slope", "offset"):
        value = getattr(affine, name).detach().view(shape).clone()
        gm.register_parameter(f"{base}_{name}", nn.Parameter(value))
    with gm.graph.inserting_before(node):
        slope, offset = gm.graph.get_attr(f"{base}_slope"), gm.graph.get_attr(f"{base}_offset")
        slope.meta["path"], offset.meta["path"] = f"{base}_slope", f"{base}_offset"
        y = gm.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], slope))
        y.meta.update(node.meta, path=f"{base}.mul")
        z = gm.graph.call_function(torch.ops.aten.add.Tensor, (y, offset))
        z.meta.update(node.meta, path=f"{base}.add")
    node.replace_all_uses_with(z)
    gm.graph.erase_node(node)


def absorb_target(reader: Reader, node: fx.Node) -> str | None:
    """Path of what can take in the ChannelAffine at `node`: the batch norm, convolution or linear only it reads."""
    source: Any = node.args[0]
    if (
        len(source.users) != 1
        or reader.kind(source) not in ("norm", "conv", "linear")
        or not reader.same_axis(source, node)
    ):
        return None
    if reader.kind(source) == "norm" and reader.calls[str(source.target)] > 1:
        return None
    if source.op != "call_module" and reader.parameters(source)[1] is None:
        return None
    return str(source.meta["path"])
