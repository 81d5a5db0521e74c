"""TOAST: nearly linear spans come first, and what it plans is their least-squares map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palmette import shrink
from palmette.depth import toast
from palmette.graph import LinearFit, Plan, candidates, capture, edits_of
from palmette.graph.linear_fit import Gram
from palmette.registry import get_method


class Bent(nn.Module):
    """x + A tanh(gain B x): the more gain, the less linear."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain, self.first, self.second = gain, nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.gain * self.first(x)))


def _net(*gains: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *(Bent(g) for g in gains), nn.Linear(6, 3)).eval()


def _loader() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(40, 4, generator=generator), torch.zeros(40, dtype=torch.long)) for _ in range(4)]


def test_the_more_linear_span_comes_first() -> None:
    gm = capture(_net(0.05, 0.1, 4.0, 5.0), torch.randn(2, 4))
    found = candidates(gm, None, kind="span", edit="fit_linear")
    scores = toast.score(gm, found, _loader(), toast.ToastConfig(), seed=0)
    assert sorted(scores, key=scores.__getitem__) == ["1..2", "2..3", "3..4"]
    assert scores["1..2"] < 1e-4


def test_the_score_is_the_held_out_error_of_the_planned_map() -> None:
    net, loader = _net(2.0, 3.0), _loader()
    gm = capture(net, torch.randn(2, 4))
    (candidate,) = candidates(gm, None, kind="span", edit="fit_linear")
    fit = LinearFit(Gram(1, held=True))
    with torch.no_grad():
        for x, _ in loader:
            h = net[0](x)
            fit(h, net[2](net[1](h)))
    assert toast.score(gm, [candidate], loader, toast.ToastConfig(), seed=0) == {"1..2": pytest.approx(fit.residual())}
    edit = Plan(edits_of(candidate)).fit(gm, loader).edits[0]
    assert torch.allclose(edit.values().double(), fit.matrix(), atol=1e-6)


def test_blocks_or_spans() -> None:
    method = get_method("toast")
    assert method.kind(method.make_config()) == "span"
    assert method.kind(method.make_config(sites="block")) == "block"


@pytest.mark.parametrize("sites", ["span", "block"])
def test_shrink_with_it(blobs: Any, trained: nn.Module, quick: Any, sites: str) -> None:
    config, fixed = toast.ToastConfig(sites=sites), {"cost": "macs", "controls": False, "max_drop": 50.0}
    found = shrink(trained, blobs.train, blobs.val, method="toast", config=config, rounds=1, heal=quick, **fixed)
    assert [e.kind for e in found.plan] == ["fit_linear"]
    assert (".." in found.plan.edits[0].site) == (sites == "span")
