"""Convolutions of small weight become identities first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from palmette import shrink
from palmette.depth import conv_identity
from palmette.errors import DataError
from palmette.graph import candidates, capture


def _net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, padding=1, groups=g) for g in (1, 4, 1)]
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        for layer, size in zip(layers, (0.3, 0.1, 0.2), strict=True):
            layer.weight.copy_(size * layer.weight.sign())
    return net.eval()


def test_the_score_is_the_mean_weight_relative_to_all() -> None:
    gm = capture(_net(), torch.randn(2, 3, 6, 6))
    found = candidates(gm, None, kind="convolution")
    scores = conv_identity.score(gm, found, [], conv_identity.ConvIdentityConfig(), seed=0)
    assert scores == pytest.approx({"1": 1.5, "3": 0.5, "5": 1.0})


def test_weights_that_are_not_finite_are_refused() -> None:
    net = _net()
    with torch.no_grad():
        net[3].weight[0, 0, 0, 0] = torch.inf
    gm = capture(net, torch.randn(2, 3, 6, 6))
    with pytest.raises(DataError, match="not finite"):
        conv_identity.score(
            gm, candidates(gm, None, kind="convolution"), [], conv_identity.ConvIdentityConfig(), seed=0
        )


def test_shrink_takes_the_smallest_out(quick: Any) -> None:
    net = nn.Sequential(_net(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(16) % 2), batch_size=8)
    fixed: dict[str, Any] = {"cost": "macs", "controls": False, "max_drop": 100.0, "rounds": 1, "heal": quick}
    found = shrink(net, loader, loader, method="conv_identity", **fixed)
    assert [(e.kind, e.site) for e in found.plan] == [("identity", "0.3")]
    assert "0.3.weight" not in found.model.state_dict()
