"""Small networks with every kind of elastic layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Mixed(nn.Module):
    """A stem, a depthwise block with a gate, a chain of three residual blocks, a concatenation, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.expand, self.depthwise = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 5, padding=2, groups=32)
        self.norm, self.project = nn.BatchNorm2d(32), nn.Conv2d(32, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 32, 1)
        self.chain = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 1))
            for _ in range(3)
        )
        self.left, self.right = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 24, 7, 2, 3)
        self.head = nn.Linear(40, 5)

    def forward(self, x):  # [B, 3, H, W] -> [B, 5]
        x = F.relu(self.bn(self.stem(x)))
        y = F.hardswish(self.norm(self.depthwise(F.relu(self.expand(x)))))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(y * gate)
        for block in self.chain:
            x = x + block(x)
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.head(x.mean((2, 3)))


class Tiny(nn.Module):
    """Few enough choices that all configurations can be listed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 5, padding=2, groups=32)
        self.c, self.d = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 4)

    def forward(self, x):  # [B, 3, H, W] -> [B, 4]
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.c(F.relu(self.b(F.relu(self.a(x)))))
        return self.head(F.relu(self.d(x)).mean((2, 3)))


class Layer(nn.Module):
    """A transformer's layer, its projections fused or apart, its heads laid out in one of two ways."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv = nn.Linear(24, 72) if fused else None
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.proj = nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 24)

    def forward(self, x):  # [B, N, 24] -> [B, N, 24]
        h = self.norm1(x)
        b, n, _ = h.shape
        if self.fused:
            q, k, v = self.qkv(h).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (f(h).view(b, n, 4, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 24)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Four layers and a head."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 24)
        self.layers = nn.ModuleList(Layer(fused) for _ in range(4))
        self.head = nn.Linear(24, 3)

    def forward(self, x):  # [B, N, 8] -> [B, 3]
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def trained_like(model: nn.Module) -> nn.Module:
    """Statistics and scales that differ from channel to channel, in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()
