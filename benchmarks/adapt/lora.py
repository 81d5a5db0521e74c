"""LoRA for convolutions and linear layers: a frozen weight plus a trained product of rank r; the tables' baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Lora(nn.Module):
    """A frozen layer and its low-rank companion: y = layer(x) + up(down(x))."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int) -> None:
        """Down starts at random, up at zero, as in the paper."""
        super().__init__()
        self.layer = layer
        self.down: nn.Module
        self.up: nn.Module
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            geometry: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **geometry)  # type: ignore[arg-type]
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        result: Tensor = self.layer(x) + self.up(self.down(x))
        return result


def with_lora(model: nn.Module, rank: int, keep: nn.Module) -> nn.Module:
    """The model frozen, each dense layer with a companion; depthwise layers stay frozen, `keep` is trained whole."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in keep.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        for path, module in list(model.named_modules()):
            dense = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
            if dense and module is not keep:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, Lora(module, rank))  # type: ignore[arg-type]
    return model
