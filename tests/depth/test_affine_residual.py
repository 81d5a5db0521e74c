"""The affine residual: zero for what is linear where the data lies, by definition elsewhere, in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from palmette.depth import affine_residual
from palmette.errors import DataError
from palmette.graph import Candidate, capture, find_sites


def _all(net: nn.Module, x: torch.Tensor) -> tuple[Any, list[Candidate]]:
    gm = capture(net.eval(), x)
    sites = [s for s in find_sites(gm, x) if s.kind == "activation"]
    return gm, [Candidate(s.path, (s,), 0, None, True, "") for s in sites]


def _score(gm: Any, found: list[Candidate], loader: list[Any]) -> dict[str, float]:
    return affine_residual.score(gm, found, loader, affine_residual.AffineResidualConfig(), seed=0)


def _by_hand(z: torch.Tensor, y: torch.Tensor) -> float:
    """Squared error of the least-squares line per column over the squares of y."""
    error = 0.0
    for i in range(z.shape[1]):
        ones = torch.stack([z[:, i], torch.ones(len(z))], 1).double()
        line = torch.linalg.lstsq(ones, y[:, i : i + 1].double()).solution
        error += float((y[:, i : i + 1].double() - ones @ line).square().sum())
    return error / float(y.double().square().sum())


def test_it_is_the_error_of_a_line_per_channel() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    batches = [torch.randn(n, 4) for n in (9, 14)]
    gm, found = _all(net, batches[0][:2])
    scores = _score(gm, found, [(x, torch.zeros(len(x))) for x in batches])
    with torch.no_grad():
        z = net[0](torch.cat(batches))
        z2 = net[2](net[1](z))
        expected = [_by_hand(z, net[1](z)), _by_hand(z2, net[3](z2))]
    assert list(scores.values()) == pytest.approx(expected)
    pair = Candidate("pair", (found[0].sites[0], found[1].sites[0]), 0, None, True, "")
    assert _score(gm, [pair], [(x, torch.zeros(len(x))) for x in batches])["pair"] == pytest.approx(sum(expected))


def test_always_on_off_and_saturated_cost_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU6(), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        net[0].weight.fill_(0.1)
        net[0].bias.copy_(torch.tensor([3.0, -9.0, 9.0]))  # on, off, saturated
    x = torch.rand(8, 1, 3, 3)
    gm, found = _all(net, x[:2])
    assert list(_score(gm, found, [(x, torch.zeros(8))]).values()) == pytest.approx([0.0], abs=1e-12)


def test_padding_is_left_out() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            y = self.down(torch.relu(self.up(self.embed(input_ids))))
            return (y * attention_mask.unsqueeze(-1)).sum(1)

    net, mask, scores = Tokens(), torch.tensor([[1.0, 1, 1, 0, 0]] * 4), []
    for pad in (0, 5):
        batch = {"input_ids": torch.tensor([[3, 1, 4, pad, pad], [2, 7, 1, pad, pad]] * 2), "attention_mask": mask}
        gm = capture(net.eval(), batch)
        sites = [s for s in find_sites(gm, batch) if s.kind == "activation"]
        found = [Candidate(s.path, (s,), 0, None, True, "") for s in sites]
        scores.append(_score(gm, found, [(batch, torch.zeros(4))]))
    assert scores[0] == scores[1]
    assert all(v > 0 for v in scores[0].values())


def test_what_is_not_finite_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    gm, found = _all(net, torch.randn(2, 2))
    with pytest.raises(DataError, match="not finite"):
        _score(gm, found, [(torch.full((2, 2), torch.nan), torch.zeros(2))])
    with pytest.raises(DataError, match="empty"):
        _score(gm, found, [])
