"""Equal networks are exported once, and networks that differ in anything are exported each."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from palmette.graph import capture
from palmette.meter import onnx_memory
from palmette.meter.onnx_memory import KEPT, remembered


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(onnx_memory, "_kept", type(onnx_memory._kept)())


def exports(*calls: tuple[nn.Module, object]) -> int:
    """How many of the calls exported."""
    made = []
    for number, (model, inputs) in enumerate(calls):
        remembered(model, inputs, lambda number=number: made.append(number) or bytes([number]))
    return len(made)


def network(**options: object) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4), nn.Dropout(0.1), nn.Flatten())
    return capture(net.eval(), torch.randn(2, 3, 8, 8)).eval()


X = torch.zeros(1, 3, 8, 8)


def test_copies_are_exported_once():
    net = network()
    assert exports((net, X), (copy.deepcopy(net), X), (network(), torch.ones(1, 3, 8, 8))) == 1


def other_weight(net: nn.Module) -> None:
    next(net.parameters()).data.view(-1)[-1] += 1e-7


def other_statistics(net: nn.Module) -> None:
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).running_mean += 1


def other_epsilon(net: nn.Module) -> None:
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eps = 0.1


def other_padding(net: nn.Module) -> None:
    next(m for m in net.modules() if isinstance(m, nn.Conv2d)).padding = (1, 1)


@pytest.mark.parametrize("change", [other_weight, other_statistics, other_epsilon, other_padding])
def test_a_difference_is_seen(change: Callable[[nn.Module], None]):
    net, other = network(), network()
    change(other)
    assert exports((net, X), (other, X)) == 2


def test_other_inputs_are_exported_anew():
    net = network()
    assert exports((net, X), (net, torch.zeros(2, 3, 8, 8)), (net, X.double()), (net, {"input": X})) == 4


def test_what_cannot_be_compared_is_not_kept():
    net = network()
    next(m for m in net.modules() if isinstance(m, nn.Conv2d)).note = torch.zeros(3)
    assert exports((net, X), (net, X)) == 2
    plain = nn.Linear(2, 2)
    assert exports((plain, X), (plain, X)) == 2


def test_few_are_kept():
    nets = [network(dilation=1 + i % 2, bias=bool(i // 2 % 2), groups=1) for i in range(4)]
    nets.append(network(padding=1))
    assert exports(*[(net, X) for net in nets]) == len(nets) == KEPT + 1
    assert len(onnx_memory._kept) == KEPT
    assert exports((nets[0], X), (nets[-1], X)) == 1
