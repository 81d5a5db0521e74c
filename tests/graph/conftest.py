"""Residual blocks of every layout, as small modules for the tests of edits."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """x + B gelu(A norm(x)), the pre-norm block of transformers."""

    def __init__(self, width: int, hidden: int, *, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.first, self.second, self.drop = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.second(self.drop(F.gelu(self.first(self.norm(x))))))


class PostNorm(nn.Module):
    """norm(x + B gelu(A x)), the block of BERT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.norm = (
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.second(F.gelu(self.first(x))))


class Conv(nn.Module):
    """x + B bn relu(A x), or with an outer ReLU; `depthwise`: one more convolution with a ReLU in between."""

    def __init__(
        self, width: int, hidden: int, *, outer: bool = False, depthwise: bool = False, kernel: int = 3
    ) -> None:
        super().__init__()
        self.outer, pad = outer, kernel // 2
        self.first, self.bn = nn.Conv2d(width, hidden, kernel, padding=pad), nn.BatchNorm2d(hidden)
        self.middle = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if depthwise else nn.Identity()
        self.second = nn.Conv2d(hidden, width, kernel, padding=pad)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.first(x)))
        if isinstance(self.middle, nn.Conv2d):
            y = torch.relu(self.middle(y))
        return torch.relu(x + self.second(y)) if self.outer else x + self.second(y)


class Straight(nn.Module):
    """x + A x + b: a block that is linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map(x)


class Masked(nn.Module):
    """Token embeddings, blocks and a mean over the tokens that `attention_mask` marks."""

    def __init__(self, blocks: list[nn.Module], width: int) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(11, width), nn.Sequential(*blocks), nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, mask = self.blocks(self.embed(input_ids)), attention_mask.unsqueeze(-1)
        return self.head((x * mask).sum(1) / mask.sum(1))


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode with norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5, generator=generator)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=generator)  # type: ignore[arg-type]
    return net.eval()


def tokens(*blocks: nn.Module, width: int = 8) -> nn.Module:
    """Blocks of tokens between two linears: 5 features in, 3 out."""
    return lively(nn.Sequential(nn.Linear(5, width), *blocks, nn.Linear(width, 3)))


def images(*blocks: nn.Module, width: int = 6, relu: bool = False) -> nn.Module:
    """Blocks of maps between two convolutions, or behind a ReLU as in a ResNet: 3 channels in, 2 out."""
    stem: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), *([nn.ReLU()] if relu else [])]
    return lively(nn.Sequential(*stem, *blocks, nn.Conv2d(width, 2, 1)))


def batches(*shape: int, count: int = 4, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches of normal noise, the same each time."""
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(*shape, generator=generator, dtype=dtype), torch.zeros(shape[0])) for _ in range(count)]


def relative(want: Tensor, got: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float(((want - got).abs().max() / want.abs().max()).detach())


@pytest.fixture(scope="session")
def nets() -> ModuleType:
    """This module: blocks, networks of them, and data."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def random_nets() -> ModuleType:
    """The module random_nets.py beside this one."""
    spec = importlib.util.spec_from_file_location("random_nets", Path(__file__).with_name("random_nets.py"))
    if spec is None or spec.loader is None:
        pytest.fail("random_nets.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
