"""Parallel blocks as a method: spans whose branches hardly notice come first and become wide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from palmette import shrink
from palmette.depth import parallel
from palmette.graph import candidates, capture, cross_term


class Scaled(nn.Module):
    """x + size * MLP(x): the larger its size, the more the next block notices."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size, self.first, self.second = size, nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * self.second(torch.relu(self.first(x)))


def _captured(*sizes: float) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), *(Plain(s) for s in sizes), nn.Linear(6, 3)).eval()
    return capture(net, torch.randn(2, 4))


class Plain(Scaled):
    """The same with the size in the weights, so that the branch can become wide."""

    def __init__(self, size: float) -> None:
        super().__init__(1.0)
        with torch.no_grad():
            self.second.weight.mul_(size)
            self.second.bias.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def test_spans_that_begin_with_a_small_branch_come_first() -> None:
    gm = _captured(0.01, 1.0, 3.0, 1.0)
    generator = torch.Generator().manual_seed(1)
    loader = [(torch.randn(20, 4, generator=generator), torch.zeros(20)) for _ in range(3)]
    found = candidates(gm, None, kind="span", edit="parallelize")
    scores = parallel.score(gm, found, loader, parallel.ParallelConfig(), seed=0)
    assert sorted(scores, key=scores.__getitem__) == ["1..2", "2..3", "3..4"]
    assert scores == {c.name: cross_term(gm, c.name, loader) for c in found}


def test_a_branch_with_a_factor_has_no_wide_form_and_is_no_candidate() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), Scaled(0.5), Scaled(0.5), nn.Linear(6, 3)).eval()
    found = candidates(capture(net, torch.randn(2, 4)), None, kind="span", edit="parallelize")
    assert [(c.pays, c.reason) for c in found] == [(False, "its branches have no common wide form")]


def test_shrink_makes_one_wide_block(blobs: Any, trained: nn.Module, quick: Any) -> None:
    fixed: dict[str, Any] = {"cost": "macs", "controls": False, "max_drop": 50.0, "rounds": 1, "heal": quick}
    found = shrink(trained, blobs.train, blobs.val, method="parallel", **fixed)
    assert [e.kind for e in found.plan] == ["parallelize"]
    sizes = [m.out_features for m in found.model.modules() if isinstance(m, nn.Linear)]
    assert sorted(sizes) == [4, 8, 8, 8, 48, 96]
