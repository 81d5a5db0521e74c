"""Small networks with known costs, one per kind of structure that the meter must understand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from palmette.graph.capture import capture


class Residual(nn.Module):
    """An inverted residual block with its skip, between a stem and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """Windows, attention through views of one joint projection, and an MLP; reshapes that must copy."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(3, dim, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class PlainAttention(nn.Module):
    """Attention written out: products of activations, a softmax, a learned bias table."""

    def __init__(self, dim: int = 24, tokens: int = 9) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("bid,bjd->bij", self.q(x), self.k(x)) + self.bias
        return scores.softmax(-1) @ self.v(x)


class Branches(nn.Module):
    """Branches of unequal depth, concatenated; a split; grouped, dilated and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(6, 8, 1)
        self.two = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2)
        self.down = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.cat([self.one(x), self.two(x)], 1).chunk(2, 1)
        return self.down(self.up(left * torch.sigmoid(right)))


class Recurrent(nn.Module):
    """A convolution over time, a stack of two bidirectional LSTMs, a GRU, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 6, 3, padding=1)
        self.lstm = nn.LSTM(6, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(14, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(self.conv(x).transpose(1, 2))
        x, _ = self.gru(x)
        return self.head(x[:, -1])


class Keywords(nn.Module):
    """Token indices and a mask by name; returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.embedding(ids)) * mask.unsqueeze(-1)
        return {"hidden": hidden, "logits": self.head(hidden.mean(1))}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "residual": lambda: (Residual(), torch.randn(2, 3, 16, 16)),
    "transformer": lambda: (Transformer(), torch.randn(2, 3, 16, 16)),
    "attention": lambda: (PlainAttention(), torch.randn(2, 9, 24)),
    "branches": lambda: (Branches(), torch.randn(2, 6, 9, 7)),
    "recurrent": lambda: (Recurrent(), torch.randn(2, 5, 12)),
    "keywords": lambda: (Keywords(), {"ids": torch.arange(14).reshape(2, 7) % 11, "mask": torch.ones(2, 7)}),
}


class Network(NamedTuple):
    """A network in eval mode, example inputs of batch 2, and its captured graph."""

    model: nn.Module
    inputs: Any
    captured: fx.GraphModule


def make(name: str) -> Network:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    return Network(model.eval(), inputs, capture(model, inputs))


@pytest.fixture(scope="session")
def captured_networks() -> Callable[[str], Network]:
    """The network of a given name, captured once for all tests; to be left as it is."""
    return cache(make)


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, captured_networks: Callable[[str], Network]) -> Network:
    """Each of the networks; to be left as it is."""
    return captured_networks(request.param)


@pytest.fixture
def build() -> Callable[[str], Network]:
    """The network of a given name, for this test alone."""
    return make
