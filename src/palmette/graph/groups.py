"""Sets of layers that share their channels: what can only be narrowed together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from palmette.graph.candidates import is_protected
from palmette.graph.channels import Channels


def width_groups(channels: Channels, protect: Iterable[str] = (), *, keep_first: bool = False) -> list[Tensor]:
    """Classes [n] of channels that the same layers write and that may go, a list per set of layers, in order.

    protect: path prefixes of layers that keep their outputs. keep_first: so does the first layer.
    """
    writers, protect = channels.writers, tuple(protect)
    free = ~channels.pinned
    for index, node in enumerate(writers):
        if is_protected(str(node.meta["path"]), protect) or (keep_first and index == 0):
            free[channels.of(node)] = False
    members: dict[int, list[int]] = {}
    for index, node in enumerate(writers):
        for c in channels.of(node).tolist():
            members.setdefault(c, []).append(index)
    sets: dict[tuple[int, ...], list[int]] = {}
    for c, indices in members.items():
        if bool(free[c]):
            sets.setdefault(tuple(indices), []).append(c)
    return [torch.tensor(classes) for classes in sets.values()]


def nearest(wanted: float, multiple: int, most: int) -> int:
    """The nearest of `most` and the multiples below it, at least one multiple."""
    low = min(max(1, int(wanted / multiple)) * multiple, most)
    high = min(low + multiple, most)
    return high if high - wanted <= wanted - low else low
