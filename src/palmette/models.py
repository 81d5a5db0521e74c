"""A small zoo of plain PyTorch networks for the demo, the tests and first steps: `palmette:NAME`.

They are ordinary modules with random weights; nothing here knows of sites or merges. Widths are such that each family
shows one thing: inverted residuals that pay when merged whole, MLP blocks that shrink to an eighth, residual blocks
that pay when dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palmette.errors import InputError

Shape = tuple[int, int, int]  # channels, height, width
Builder = Callable[[int, Shape], nn.Module]


@dataclass(frozen=True)
class ZooEntry:
    """One network: name, a line on it, shape of one input, and how to build it for (classes, shape)."""

    name: str
    summary: str
    shape: Shape
    build: Builder


_ZOO: dict[str, ZooEntry] = {}


def register(name: str, summary: str, shape: Shape) -> Callable[[Builder], Builder]:
    """Add a builder (classes, input shape) -> module to the zoo under `name`."""

    def add(build: Builder) -> Builder:
        _ZOO[name] = ZooEntry(name, summary, shape, build)
        return build

    return add


def zoo() -> list[ZooEntry]:
    """All networks of the zoo, by name."""
    return [_ZOO[name] for name in sorted(_ZOO)]


def entry(name: str) -> ZooEntry:
    """The network called `name`. Raises InputError, suggesting the nearest, when there is none."""
    if name not in _ZOO:
        near = get_close_matches(name, _ZOO, n=1)
        fix = f"Did you mean palmette:{near[0]}?" if near else f"Known: {', '.join(sorted(_ZOO))}"
        raise InputError(f"no network named {name!r} in palmette's zoo", fix=fix)
    return _ZOO[name]


def build(name: str, *, num_classes: int = 10, shape: Shape | None = None) -> nn.Module:
    """A fresh network of the zoo. `shape` is (channels, height, width) of its input.

    Raises InputError for an unknown name.
    """
    found = entry(name)
    return found.build(num_classes, shape or found.shape)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1, each with batch norm, ReLU6 after the first two.

    Added to its input where shapes allow.
    """

    def __init__(self, c_in: int, c_out: int, *, expand: int, stride: int = 1) -> None:
        super().__init__()
        wide = c_in * expand
        self.layers = nn.Sequential(
            nn.Conv2d(c_in, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H/stride, W/stride]."""
        y: Tensor = self.layers(x)
        return x + y if self.skip else y


class Mobile(nn.Module):
    """Stem, stages of inverted residuals at half the size each, mean over positions, linear classifier."""

    def __init__(self, classes: int, channels: int, *, widths: tuple[int, ...] = (16, 32), repeats: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU6()
        )
        blocks: list[nn.Module] = [InvertedResidual(widths[0], widths[0], expand=6) for _ in range(repeats)]
        for c_in, c_out in pairwise(widths):
            blocks.append(InvertedResidual(c_in, c_out, expand=6, stride=2))
            blocks += [InvertedResidual(c_out, c_out, expand=6) for _ in range(repeats)]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, classes]."""
        x = self.blocks(self.stem(x))
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


class TokenBlock(nn.Module):
    """Two residual branches, each after a layer norm: a linear mix of the tokens, an MLP d-4d-d with GELU."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.mix = nn.LayerNorm(width), nn.Linear(tokens, tokens)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, tokens, width] -> the same."""
        x = x + self.mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TokenMlp(nn.Module):
    """Patches as tokens, blocks of token mixing and MLP, layer norm, mean over tokens, linear classifier."""

    def __init__(self, classes: int, shape: Shape, *, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(shape[0], width, patch, patch)
        tokens = _tokens(shape, patch)
        self.blocks = nn.Sequential(*[TokenBlock(tokens, width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        x = self.patches(x).flatten(2).transpose(1, 2)  # [B, tokens, width]
        return self.head(self.norm(self.blocks(x)).mean(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the same."""
        q, k, v = (
            self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each [B, heads, T, width / heads]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP d-4d-d with GELU, both residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Patches, learned positions, transformer blocks, mean over tokens, linear classifier."""

    def __init__(
        self, classes: int, shape: Shape, *, patch: int, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(shape[0], width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, _tokens(shape, patch), width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads, dropout) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """conv-bn-relu-conv-bn plus its input (through a 1x1 convolution where the shape changes), then ReLU."""

    def __init__(self, c_in: int, c_out: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H/stride, W/stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of residual blocks at half the size each, mean over positions, linear classifier."""

    def __init__(self, classes: int, channels: int, *, widths: tuple[int, ...], repeats: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks = []
        c_in = widths[0]
        for stage, c_out in enumerate(widths):
            for index in range(repeats):
                blocks.append(ResidualBlock(c_in, c_out, stride=2 if stage and not index else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, classes]."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def _tokens(shape: Shape, patch: int) -> int:
    if shape[1] % patch or shape[2] % patch:
        raise InputError(
            f"images of {shape[1]}x{shape[2]} cannot be cut into patches of {patch}x{patch}",
            fix=f"Give the data an option such as ?size={8 * patch}",
        )
    return (shape[1] // patch) * (shape[2] // patch)


@register("digits-mobile", "inverted residuals with ReLU6: 7 blocks, 16 and 32 channels", (1, 16, 16))
def digits_mobile(classes: int, shape: Shape) -> nn.Module:
    """Inverted residuals whose three convolutions cost less as one dense 3x3."""
    return Mobile(classes, shape[0])


@register("digits-mlp", "residual MLP blocks 64-256-64 with GELU over 4x4 patch tokens", (1, 8, 8))
def digits_mlp(classes: int, shape: Shape) -> nn.Module:
    """MLP blocks that cost an eighth when their activation is linear."""
    return TokenMlp(classes, shape, patch=2, width=64, depth=4)


@register("digits-resnet", "residual network: 9 basic blocks, 16, 32 and 64 channels", (1, 16, 16))
def digits_resnet(classes: int, shape: Shape) -> nn.Module:
    """Basic residual blocks that can be dropped one by one."""
    return ResNet(classes, shape[0], widths=(16, 32, 64), repeats=3)


@register("cifar-vit", "small vision transformer: 6 blocks of width 128, 4x4 patches", (3, 32, 32))
def cifar_vit(classes: int, shape: Shape) -> nn.Module:
    """A vision transformer for 32x32 images."""
    return VisionTransformer(classes, shape, patch=4, width=128, depth=6, heads=4, dropout=0.1)


@register("mlp", "three hidden layers of 256 with ReLU", (1, 8, 8))
def mlp(classes: int, shape: Shape) -> nn.Module:
    """The plainest network: linear layers and ReLU."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = shape[0] * shape[1] * shape[2]
    for _ in range(3):
        layers += [nn.Linear(width, 256), nn.ReLU()]
        width = 256
    return nn.Sequential(*layers, nn.Linear(width, classes))
