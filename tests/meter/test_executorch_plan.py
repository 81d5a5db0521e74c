"""The arena that ExecuTorch plans is the peak that is computed, when operators are counted as it takes them apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from palmette.graph.capture import capture
from palmette.meter.executorch_plan import Block, most_alive, offsets, plan_arena
from palmette.meter.memory import peak_bytes
from palmette.meter.runtime_executorch import Program


class Gated(nn.Module):
    """Hardswish, a gate, a shortcut, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.gate, self.back = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 1), nn.Conv2d(24, 8, 1)
        self.act, self.head = nn.Hardswish(), nn.Linear(8, 5)

    def forward(self, x):  # [B, 3, H, W] -> [B, 5]
        x = self.act(self.norm(self.stem(x)))
        y = self.act(self.wide(x))
        y = y * nn.functional.hardsigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return self.head((x + self.back(y)).mean((2, 3)))


def test_the_planned_arena_is_the_computed_peak() -> None:
    pytest.importorskip("executorch", reason="executorch is not installed")
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(1, 3, 12, 12)
    captured = capture(model, torch.randn(2, 3, 12, 12)).eval()
    stock, tight = plan_arena(captured, x, tight=False), plan_arena(captured, x)
    peak = peak_bytes(captured, 1, hold_inputs=False, operators="core")
    assert peak == stock.live_bytes == tight.live_bytes
    assert peak <= tight.arena_bytes <= min(1.02 * peak, stock.arena_bytes)
    got = Program(tight.content).outputs(x)[0]
    assert torch.allclose(got, model(x), atol=1e-5)


def test_operators_taken_apart_need_a_tensor_more() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Hardswish())
    captured = capture(model.eval(), torch.randn(2, 4, 10, 10)).eval()
    tensor = 4 * 8 * 10 * 10
    assert peak_bytes(captured, hold_inputs=False) == 2 * tensor
    assert peak_bytes(captured, hold_inputs=False, operators="core") == 3 * tensor


def test_an_arena_holds_every_block_apart() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        first, length = rng.integers(0, 20, 40), rng.integers(0, 6, 40)
        sizes = 16 * rng.integers(1, 100, 40)
        blocks = [Block(int(s), int(a), int(a + b)) for s, a, b in zip(sizes, first, length, strict=True)]
        at, size = offsets(blocks)
        assert most_alive(blocks) <= size
        for i, one in enumerate(blocks):
            assert at[i] + one.size <= size
            for j in range(i):
                two = blocks[j]
                if one.first <= two.last and two.first <= one.last:
                    assert at[i] + one.size <= at[j] or at[j] + two.size <= at[i]


def test_gaps_between_buckets_are_closed() -> None:
    blocks = [Block(100, 0, 1), Block(60, 2, 3), Block(60, 2, 3), Block(20, 0, 0)]
    assert most_alive(blocks) == offsets(blocks)[1] == 120
    assert offsets([]) == ([], 0)
