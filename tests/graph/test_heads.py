"""Attention heads are told apart by execution; what cannot be is left with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from palmette.graph.capture import capture
from palmette.graph.heads import head_sites


class Attention(nn.Module):
    """Four heads of six, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x):  # [B, N, 24] -> [B, N, 24]
        b, n, _ = x.shape
        if self.way == "interleaved":
            q, k, v = self.qkv(x).view(b, n, 4, 6, 3).permute(4, 0, 2, 1, 3).unbind(0)
        else:
            q, k, v = self.qkv(x).view(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.bias.expand(4, n, n)[None] if self.way == "bias" else None
        y = F.scaled_dot_product_attention(q, k, v, mask)
        y = y.permute(0, 2, 3, 1) if self.way == "turned" else y.transpose(1, 2)
        out = self.proj(y.reshape(b, n, 24))
        return out + q.mean((1, 2, 3))[:, None, None] if self.way == "elsewhere" else out


def site_of(way):
    torch.manual_seed(0)
    model = Attention(way).eval()
    (site,) = head_sites(capture(model, torch.randn(2, 5, 24)))
    return model, site


@pytest.mark.parametrize("way", ["fused", "interleaved", "turned"])
def test_every_row_and_column_belongs_to_a_head(way):
    model, site = site_of(way)
    assert site.reason == ""
    assert site.count == 4
    layers = {(path, side): heads for path, side, heads in site.layers}
    rows, columns = layers["qkv", "rows"], layers["proj", "columns"]
    assert [int((rows == head).sum()) for head in range(4)] == [18] * 4
    assert [int((columns == head).sum()) for head in range(4)] == [6] * 4
    if way == "fused":
        assert rows.tolist() == [head for _ in range(3) for head in range(4) for _ in range(6)]
    norms = [float(model.proj.weight[:, columns == head].detach().abs().sum()) for head in range(4)]
    assert site.order.tolist() == sorted(range(4), key=lambda head: -norms[head])


@pytest.mark.parametrize(
    ("way", "said"), [("bias", "a mask or bias is given for each head"), ("elsewhere", "reads its heads, too")]
)
def test_what_cannot_be_cut_is_left_with_the_reason(way, said):
    assert said in site_of(way)[1].reason
