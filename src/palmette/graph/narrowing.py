"""Channels that former activations leave constant and that no merge took away: what of them can be deleted."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from palmette.graph.ops import module_of
from palmette.graph.paths import Element, Reader


def narrowings(reader: Reader) -> list[dict[str, Any]]:
    """Dead channels of former activations that were not merged: rows and columns that can go."""
    found = []
    for path in reader.paths():
        for producer, consumer in itertools.pairwise(path):
            affine = producer.links[0] if producer.links else None
            if isinstance(affine, fx.Node) and len(producer.links) == 1 and producer.nodes[-1] is affine:
                decision = _narrowing(reader, producer, consumer, affine)
                if decision is not None:
                    found.append(decision)
    return found


def _narrowing(reader: Reader, producer: Element, consumer: Element, affine: fx.Node) -> dict[str, Any] | None:
    module: Any = module_of(reader.gm, affine)
    dead = module.slope.detach() == 0
    plain = all(
        e.main.op == "call_module" and reader.is_affine(e.main) and reader.shape_of(e).groups == 1
        for e in (producer, consumer)
    )
    if not plain or not bool(dead.any()) or bool(dead.all()) or reader.shape_of(consumer).in_channels != len(dead):
        return None
    if reader.shape_of(consumer).padded and bool((module.offset.detach()[dead] != 0).any()):
        return None
    return {
        "type": "narrow",
        "producer": producer.path,
        "tail": [n.meta["path"] for n in producer.tail],
        "affine": affine.meta["path"],
        "consumer": consumer.path,
        "keep": torch.nonzero(~dead).flatten().tolist(),
        "of": len(dead),
    }
