"""Padding tokens: a loader that remembers the attention mask of its batch, so that watchers can leave them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from palmette.graph.inputs import inputs_of


class MaskTap:
    """A loader that hands batches through and remembers the last attention mask, so that padding is not counted."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.mask: Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            inputs = inputs_of(batch)
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            yield batch

    def for_tokens(self, z: Tensor, channel_axis: int) -> Tensor | None:
        """The mask when `z` is [batch, tokens, channels] and matches it, else None."""
        tokens = z.dim() == 3 and channel_axis in (2, -1)
        return self.mask if self.mask is not None and tokens and self.mask.shape == z.shape[:2] else None


def mask_node(gm: fx.GraphModule, node: fx.Node, channel_axis: int) -> fx.Node | None:
    """The attention mask among the network's inputs, when `node` is [batch, tokens, channels] and matches it."""
    shape = node.meta["shape"]
    if len(shape) != 3 or channel_axis not in (2, -1):
        return None
    inputs = (n for n in gm.graph.nodes if n.op == "placeholder" and n.target == "attention_mask")
    return next((n for n in inputs if n.meta.get("shape") == tuple(shape[:2])), None)
