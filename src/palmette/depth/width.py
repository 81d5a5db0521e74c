"""Structured width pruning: whole channels go, with Torch-Pruning as the judge of which.

Channels that only go together (through residual additions, depthwise convolutions, zero-padded shortcuts) are found in
the captured graph and scored by Torch-Pruning's group importance; of every such set of layers the least important share
goes. Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, with local (uniform) ratios. What
differs: the sets come from our graph instead of from autograd, so that shortcuts that pad channels are followed; the
number of channels that stay is rounded to the nearest multiple; attention keeps its widths, of a transformer only the
hidden units of its MLPs go; the change is a recorded step that can be saved, loaded and collapsed. Cost: one pass over
the weights ("l2"), or one backward pass per batch ("taylor").
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette import compat
from palmette.errors import DataError, InputError
from palmette.graph.capture import capture
from palmette.graph.channel_rules import first
from palmette.graph.channels import Channels
from palmette.graph.groups import nearest, width_groups
from palmette.graph.inputs import call, main_output, split_batch, to_device
from palmette.graph.ops import CONVOLUTIONS, ChannelAffine, module_of
from palmette.graph.resize import decide, resize
from palmette.train.labels import task_loss

IMPORTANCES = ("l2", "taylor")


def prune_width(
    network: nn.Module,
    example_inputs: Any,
    ratio: float,
    *,
    importance: str = "l2",
    loader: Iterable[Any] | None = None,
    protect: Iterable[str] = (),
    round_to: int = 8,
    keep_first: bool = True,
) -> fx.GraphModule:
    """A captured network with about `ratio` of its channels removed; it needs healing. `network` stays untouched.

    network: plain or captured, edited or collapsed. example_inputs: tensors [batch, ...]. ratio: 0 to 1, of every set
    of layers that share channels. round_to: the nearest multiple of it stays (runtimes compute channels in blocks of 8
    or 16, see `palmette.graph.dead.MULTIPLES`). importance: "l2", the norm of all weights of a channel, or "taylor",
    the change of the loss to first order (Molchanov et al., CVPR 2019) on the batches of `loader`. protect: path
    prefixes of layers that keep their outputs. keep_first: so does the first layer.

    The output keeps its shape. Raises InputError (options), DataError (an empty loader), MissingDependency without
    torch-pruning, CaptureError for a network that does not trace.
    """
    _check(ratio, importance, loader, round_to)
    pruning = compat.optional("torch_pruning", package="palmette[width]")
    gm = capture(network, example_inputs)
    if ratio == 0:
        return gm
    channels = Channels(gm)
    scored = gm if importance == "l2" else _with_gradients(gm, loader)
    judge = (
        pruning.importance.GroupMagnitudeImportance(p=2)
        if importance == "l2"
        else pruning.importance.GroupTaylorImportance()
    )
    removed = torch.zeros_like(channels.pinned)
    for group in width_groups(channels, protect, keep_first=keep_first):
        stay = nearest(len(group) * (1 - ratio), round_to, len(group))
        if stay < len(group):
            scores = judge(_described(pruning, channels, group, scored)).nan_to_num()
            removed[group[scores.argsort(stable=True)[: len(group) - stay].cpu()]] = True
    return resize(gm, decide(channels, removed))


def _check(ratio: float, importance: str, loader: Any, round_to: int) -> None:
    if not 0 <= ratio < 1:
        raise InputError(f"ratio = {ratio} is out of bounds", fix="Give the share of channels to remove, 0 to 1.")
    if round_to < 1:
        raise InputError(f"round_to = {round_to} is out of bounds", fix="Give 1 or more.")
    if importance not in IMPORTANCES:
        raise InputError(f"Unknown importance '{importance}'", fix=f"Use one of {', '.join(IMPORTANCES)}.")
    if importance == "taylor" and loader is None:
        raise InputError("importance 'taylor' needs data", fix="Pass a loader of (inputs, target) pairs.")


def _described(pruning: Any, channels: Channels, group: Tensor, scored: fx.GraphModule) -> Any:
    """The set of layers as a group of Torch-Pruning: every layer with its own and the group's indices."""
    place = torch.full((len(channels.classes),), -1)
    place[group] = torch.arange(len(group))
    result = pruning.dependency.Group()

    def add(node: fx.Node, classes: Tensor, side: str) -> None:
        roots = place[classes]
        own = torch.nonzero(roots >= 0).flatten()
        if len(own):
            layer = module_of(scored, node)
            function = _function(pruning, layer, side)
            target = pruning.dependency.Node(layer, None, str(node.meta["path"]))
            result.add_dep(pruning.dependency.Dependency(function, function, target, target), own.tolist())
            result[len(result) - 1].root_idxs = roots[own].tolist()

    for node in channels.writers:
        add(node, channels.of(node), "out")
    for node in channels.channelwise:
        if not isinstance(module_of(scored, node), ChannelAffine):
            add(node, channels.of(node), "channelwise")
    for node in channels.readers:
        add(node, channels.of(first(node)), "in")
    return result


def _function(pruning: Any, layer: nn.Module | None, side: str) -> Any:
    """Torch-Pruning's name for narrowing that side of a layer."""
    if side == "channelwise":
        if isinstance(layer, CONVOLUTIONS):
            return pruning.prune_depthwise_conv_out_channels
        return pruning.prune_batchnorm_out_channels
    kind = "conv" if isinstance(layer, CONVOLUTIONS) else "linear"
    return getattr(pruning, f"prune_{kind}_{side}_channels")


def _with_gradients(gm: fx.GraphModule, loader: Any) -> fx.GraphModule:
    """A copy in eval mode whose parameters hold the gradients of the loss, summed over the batches."""
    twin = copy.deepcopy(gm).eval().requires_grad_(True)
    device = next(twin.parameters()).device
    batches = 0
    for batch in loader:
        inputs, target = split_batch(to_device(batch, device))
        task_loss(main_output(call(twin, inputs)), target, None).backward()
        batches += 1
    if not batches:
        raise DataError("The loader is empty", fix="Give it at least one batch.")
    return twin
