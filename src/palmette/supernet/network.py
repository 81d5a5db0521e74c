"""A configuration of a staged space as a plain network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palmette.supernet.terms import round8

if TYPE_CHECKING:
    from palmette.supernet.staged import StagedSpace

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "hard_swish": nn.Hardswish}


class StagedNetwork(nn.Module):
    """One configuration of a space: kernel, expand [stages * blocks] and depth [stages]; He initialisation, fan-out."""

    def __init__(
        self, space: StagedSpace, kernel: Sequence[int], expand: Sequence[float], depth: Sequence[int]
    ) -> None:
        super().__init__()
        self.stem = convolution(3, space.stem, 3, 2, activation="hard_swish")
        self.first = MobileBlock(space.stem, space.first, None, 3, 1, "relu", se=False)
        inputs, stages = space.first, []
        for stage, width in enumerate(space.widths):
            blocks = []
            for number in range(depth[stage]):
                place = stage * space.blocks + number
                hidden, stride = round8(inputs * expand[place]), space.strides[stage] if number == 0 else 1
                how = space.activations[stage]
                blocks.append(MobileBlock(inputs, width, hidden, kernel[place], stride, how, se=space.se[stage]))
                inputs = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.final = convolution(inputs, space.final, 1, activation="hard_swish")
        self.mix = nn.Linear(space.final, space.last, bias=False)
        self.classifier = nn.Linear(space.last, space.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, classes]."""
        x = self.final(self.stages(self.first(self.stem(x))))
        return self.classifier(F.hardswish(self.mix(x.mean((2, 3)))))  # type: ignore[no-any-return]


class MobileBlock(nn.Module):
    """Expand 1x1 to `hidden` channels (None: no such layer), depthwise, squeeze and excite, project 1x1.

    Added to the input where the shapes allow.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int | None, kernel: int, stride: int, activation: str, *, se: bool
    ) -> None:
        super().__init__()
        wide = inputs if hidden is None else hidden
        self.expansion = nn.Identity() if hidden is None else convolution(inputs, wide, 1, activation=activation)
        self.depthwise = convolution(wide, wide, kernel, stride, groups=wide, activation=activation)
        self.se = SqueezeExcite(wide) if se else nn.Identity()
        self.projection = convolution(wide, outputs, 1)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride], rounded up."""
        y: Tensor = self.projection(self.se(self.depthwise(self.expansion(x))))
        return x + y if self.shortcut else y


class SqueezeExcite(nn.Module):
    """Each channel scaled by a gate that the means of all channels decide; [N, C, H, W] (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = round8(channels // 4)
        self.reduce, self.expand = nn.Conv2d(channels, narrow, 1), nn.Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`x` times its gate."""
        return x * F.hardsigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1, activation: str | None = None
) -> nn.Sequential:
    """Convolution without bias that keeps the size at stride 1, batch norm, activation."""
    layers = nn.Sequential()
    layers.append(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
    layers.append(nn.BatchNorm2d(outputs))
    if activation is not None:
        layers.append(_ACTIVATIONS[activation]())
    return layers
