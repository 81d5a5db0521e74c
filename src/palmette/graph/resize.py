"""Narrow a captured graph: some channels of its tensors stay, the others go from every layer that writes or reads them.

A decision is plain JSON. It names layers and nodes by their stable paths and lists what stays as ranges [start, stop),
so that `load` can repeat it on a fresh copy of the source network without algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.errors import PlanError
from palmette.graph.capture import example_of, set_shapes
from palmette.graph.channel_rules import PADDINGS, channel_padding, first
from palmette.graph.channels import Channels
from palmette.graph.ops import ChannelAffine, get_tensor, module_of, op_name
from palmette.graph.rewrite import node_at

_FOREIGN = "Load into the network that the file was made from."


def resize(gm: fx.GraphModule, decision: dict[str, Any]) -> fx.GraphModule:
    """Narrow `gm` in place as `decision` says, note that step in its metadata, and return it.

    A decision that narrows nothing leaves no trace. Raises PlanError if the decision is of another network.
    """
    if not decision["layers"]:
        return gm
    for path in decision["folded"]:
        give_bias(_layer(gm, path))
    for entry in decision["layers"]:
        narrow(_layer(gm, entry["path"]), entry, _cut)
    for entry in decision["states"]:
        _narrow_state(gm, entry)
    for entry in decision["sizes"]:
        node = node_at(gm, entry["path"])
        node.args = resized_args(node, entry)
    info = gm.meta["palmette"]
    info["steps"] = [*info.get("steps", []), {"resize": decision}]
    gm.recompile()
    set_shapes(gm, example_of(gm))
    return gm


def decide(channels: Channels, removed: Tensor, folded: Iterable[str] = ()) -> dict[str, Any]:
    """The decision that takes out whole classes of channels.

    removed: [variables], whether the class of that number goes. folded: layers whose bias takes in constants, and that
    get a bias where they have none.
    """
    layers: dict[str, dict[str, Any]] = {}

    def note(node: fx.Node, side: str, classes: Tensor) -> None:
        keep = ~removed[classes]
        if not bool(keep.all()):
            entry = layers.setdefault(str(node.meta["path"]), {"path": node.meta["path"]})
            entry[side] = {"keep": ranges(keep), "of": len(keep)}

    for node in channels.writers:
        if node.op == "call_module":  # the weights of others are states
            note(node, "rows", channels.of(node))
    for node in channels.readers:
        if node.op == "call_module":
            note(node, "columns", channels.of(first(node)))
    for node in channels.channelwise:
        note(node, "channels", channels.of(node))
    states = []
    for state, (axis, user) in channels.states.items():
        keep = ~removed[channels.of(user)]
        if not bool(keep.all()):
            states.append({"state": str(state.target), "axis": axis, "keep": ranges(keep), "of": len(keep)})
    sizes = [_sizes(channels, node, removed) for node in channels.sized]
    return {
        "type": "resize",
        "layers": list(layers.values()),
        "states": states,
        "sizes": [s for s in sizes if s is not None],
        "folded": list(folded),
    }


def _sizes(channels: Channels, node: fx.Node, removed: Tensor) -> dict[str, Any] | None:
    """The node's list of sizes, or of paddings, for the channels that stay; None if all do."""
    written: Any = node.args[1]
    sizes: list[Any] = [size if isinstance(size, int) else None for size in written]  # None: as it stands
    place, keep = channels.sized[node], ~removed[channels.of(node)]
    if bool(keep.all()):
        return None
    around = channel_padding(node, place) if op_name(node) in PADDINGS else None
    if around is None:
        sizes[place] = int(keep.sum())
    else:
        last = 2 * (len(node.meta["shape"]) - 1 - place)
        sizes[last : last + 2] = int(keep[: around[0]].sum()), int(keep[len(keep) - around[1] :].sum())
    return {"path": node.meta["path"], "sizes": sizes}


def ranges(keep: Tensor) -> list[list[int]]:
    """Maximal ranges [start, stop) of what is True."""
    zero = torch.zeros(1, dtype=torch.int)
    edges = torch.diff(keep.int().cpu(), prepend=zero, append=zero)
    starts, stops = torch.nonzero(edges == 1).flatten(), torch.nonzero(edges == -1).flatten()
    return [[int(a), int(b)] for a, b in zip(starts, stops, strict=True)]


def give_bias(layer: Any) -> Tensor:
    """The bias of a convolution or linear, made of zeros where there was none."""
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.detach().new_zeros(len(layer.weight)))
    bias: Tensor = layer.bias
    return bias


def _layer(gm: fx.GraphModule, path: str) -> nn.Module:
    layer = module_of(gm, node_at(gm, path))
    if layer is None:
        raise PlanError(f"'{path}' is no layer of the network", fix=_FOREIGN)
    return layer


def resized_args(node: fx.Node, entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """The node's arguments with the sizes of an entry; None in their place leaves one as it is."""
    place = entry.get("argument", 1)
    own: Any = node.args[place]
    sizes = [old if new is None else new for old, new in zip(own, entry["sizes"], strict=True)]
    return (*node.args[:place], sizes, *node.args[place + 1 :])


Cutter = Callable[[Tensor, int, Mapping[str, Any], str], Tensor]
"""What stays of a tensor along an axis, given what an entry says of that side, and the layer's path."""


def narrow(layer: Any, entry: Mapping[str, Any], cut: Cutter) -> None:
    """Cut the tensors of one layer, in place; its counts of channels and the edge of its kernel follow."""
    path = entry["path"]
    if "kernel" in entry:
        _crop(layer, entry["kernel"], cut, path)
    if "columns" in entry:
        layer.weight = cut(layer.weight, 1, entry["columns"], path)
    side = entry.get("rows") or entry.get("channels")
    if side is not None:
        for name in ("weight", "bias", "running_mean", "running_var", "slope", "offset"):
            value = getattr(layer, name, None)
            if value is not None:
                setattr(layer, name, cut(value, 0, side, path))
    if hasattr(layer, "normalized_shape"):
        layer.normalized_shape = (sum(stop - start for start, stop in entry["channels"]["keep"]),)
    elif hasattr(layer, "num_features"):
        layer.num_features = len(layer.running_mean)
    elif hasattr(layer, "in_features"):
        layer.out_features, layer.in_features = layer.weight.shape
    elif not isinstance(layer, ChannelAffine):
        layer.out_channels = len(layer.weight)
        if "channels" in entry:
            layer.groups = layer.out_channels
        layer.in_channels = layer.weight.shape[1] * layer.groups


def _crop(layer: Any, size: int, cut: Cutter, path: str) -> None:
    """Keep the centre of a convolution's kernel; its padding shrinks alike, so that the output keeps its shape."""
    off = [(k - size) // 2 for k in layer.kernel_size]
    for axis, (o, k) in enumerate(zip(off, layer.kernel_size, strict=True), start=2):
        layer.weight = cut(layer.weight, axis, {"keep": [[o, o + size]], "of": k}, path)
    layer.kernel_size = (size,) * len(off)
    layer.padding = tuple(p - o * d for p, o, d in zip(layer.padding, off, layer.dilation, strict=True))
    layer._reversed_padding_repeated_twice = [p for p in reversed(layer.padding) for _ in range(2)]


def _narrow_state(gm: fx.GraphModule, entry: dict[str, Any]) -> None:
    path, _, leaf = entry["state"].rpartition(".")
    value = get_tensor(gm, entry["state"])
    setattr(gm.get_submodule(path), leaf, _cut(value, entry["axis"], entry, entry["state"]))


def _cut(value: Tensor, axis: int, side: Mapping[str, Any], path: str) -> Tensor:
    """What stays of a parameter or buffer along an axis."""
    keep = [i for start, stop in side["keep"] for i in range(start, stop)]
    if value.shape[axis] != side["of"] or not keep or keep[-1] >= side["of"]:
        raise PlanError(f"'{path}' has {value.shape[axis]} channels where the plan narrows {side['of']}", fix=_FOREIGN)
    cut = value.detach().index_select(axis, torch.tensor(keep, device=value.device))
    return nn.Parameter(cut, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else cut
