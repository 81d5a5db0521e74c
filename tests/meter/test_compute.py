"""Multiply-adds against closed formulas and against a second, independent count; depth against counting by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from palmette.graph.capture import capture
from palmette.meter import depth, graph_macs, macs, param_bytes, params

Network = tuple[nn.Module, Any, fx.GraphModule]


def test_two_independent_counts_agree(network: Network) -> None:
    model, inputs, captured = network
    assert graph_macs(captured) == macs(model, inputs, batch=None) == macs(captured, inputs, batch=None) > 0


def test_macs_are_of_one_sample_and_grow_with_the_batch(network: Network) -> None:
    model, inputs, _captured = network
    assert macs(model, inputs) * 5 == macs(model, inputs, batch=5)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    # module, input shape, multiply-adds written out: output (transposed: input) values x channels of a group x kernel
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (1, 4, 8, 8), 6 * 64 * 4 * 9),
    "strided": (nn.Conv2d(4, 6, 3, stride=2), (1, 4, 9, 9), 6 * 16 * 4 * 9),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 8, 8), 6 * 36 * 2 * 9),
    "depthwise": (nn.Conv2d(4, 8, (3, 5), groups=4), (1, 4, 8, 8), 8 * 6 * 4 * 15),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=3), (1, 4, 8, 8), 6 * 4 * 4 * 9),
    "one-dimensional": (nn.Conv1d(4, 6, 5, bias=False), (1, 4, 20), 6 * 16 * 4 * 5),
    "three-dimensional": (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 3 * 27 * 2 * 8),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 9),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5), 4 * 25 * 3 * 9),
    "transposed, one-dimensional": (nn.ConvTranspose1d(4, 2, 3), (1, 4, 7), 4 * 7 * 2 * 3),
    "linear": (nn.Linear(7, 5), (1, 3, 7), 3 * 7 * 5),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_layers_against_their_formula_and_torch(name: str) -> None:
    module, shape, expected = CONVOLUTIONS[name]
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert macs(module, x) == expected == counter.get_total_flops() // 2
    captured = capture(module, x)
    assert graph_macs(captured) == expected * 2  # captured at batch 2
    assert depth(captured) == 1


class Function(nn.Module):
    """A function of the input and one parameter."""

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.fn, self.weight = fn, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, self.weight)


# x is [2, 5, 6]; the count is written as (batch, rows, inner, columns)
PRODUCTS: dict[str, tuple[Function, int, int]] = {
    "matmul": (Function(lambda x, w: x @ w, 6, 4), 2 * 5 * 6 * 4, 1),
    "matmul with a transposed weight": (Function(lambda x, w: x @ w.t(), 4, 6), 2 * 5 * 6 * 4, 1),
    "matmul with a vector": (Function(torch.matmul, 6), 2 * 5 * 6, 1),
    "addmv": (Function(lambda x, w: torch.addmv(x[0, :, 0], x[1], w), 6), 5 * 6, 1),
    "dot": (Function(lambda x, w: torch.dot(x[0, 0], w) * x, 6), 6, 1),
    "linear": (Function(F.linear, 4, 6), 2 * 5 * 6 * 4, 1),
    "batched": (Function(lambda x, w: torch.bmm(x, x.transpose(1, 2)) * w, 1), 2 * 5 * 6 * 5, 0),
    "added": (Function(lambda x, w: torch.baddbmm(w, x, x.transpose(1, 2)), 1, 5, 5), 2 * 5 * 6 * 5, 0),
    "addmm": (Function(lambda x, w: torch.addmm(x[0, 0, :4], x.flatten(0, 1), w), 6, 4), 10 * 6 * 4, 1),
    "einsum": (Function(lambda x, w: torch.einsum("bij,jk->bik", x, w), 6, 4), 2 * 5 * 6 * 4, 1),
    "einsum, implicit output": (Function(lambda x, w: torch.einsum("bij,jk", x, w), 6, 4), 2 * 5 * 6 * 4, 1),
    "einsum, ellipsis": (Function(lambda x, w: torch.einsum("...j,jk->...k", x, w), 6, 4), 2 * 5 * 6 * 4, 1),
    "einsum, three factors": (
        Function(lambda x, w: torch.einsum("bij,jk,bik->bi", x, w, x @ w), 6, 4),
        3 * 2 * 5 * 6 * 4 - 2 * 5 * 6 * 4 + 2 * 5 * 4,
        2,
    ),
    "attention": (Function(lambda x, w: F.scaled_dot_product_attention(x, x, x) * w, 1), 2 * 5 * 5 * (6 + 6), 0),
    "attention, learned bias": (
        Function(lambda x, w: F.scaled_dot_product_attention(x, x, x[..., :4], attn_mask=w), 5, 5),
        2 * 5 * 5 * (6 + 4),
        0,
    ),
    "scale": (Function(torch.mul, 6), 0, 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_against_their_formula(name: str) -> None:
    module, expected, operations = PRODUCTS[name]
    x = torch.randn(2, 5, 6)
    captured = capture(module, x)
    assert macs(module, x, batch=None) == expected
    assert graph_macs(captured) == expected
    assert depth(captured) == operations


def test_attention_dropout_is_counted_and_passed_through() -> None:
    module = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True).eval()

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    captured = capture(Self(), torch.randn(2, 5, 8))
    assert graph_macs(captured) == 2 * (5 * 8 * 8 * 4 + 2 * 5 * 5 * 8)
    assert depth(captured) == 2


def test_recurrent_layers_count_every_matrix_at_every_step() -> None:
    model = nn.LSTM(6, 7, num_layers=2, bidirectional=True, batch_first=True)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert macs(model, torch.randn(3, 12, 6)) == 12 * matrices


@pytest.mark.parametrize(
    ("name", "expected"),
    [("residual", 5), ("transformer", 6), ("attention", 1), ("branches", 3), ("recurrent", 5), ("keywords", 5)],
)
def test_depth_is_the_longest_path(captured_networks: Callable[[str], Network], name: str, expected: int) -> None:
    assert depth(captured_networks(name)[2]) == expected


def test_what_is_computed_from_parameters_alone_is_no_depth() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.maker = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.maker(self.table).t()

    assert depth(capture(Weighted(), torch.randn(2, 6))) == 1


def test_counting_leaves_the_model_and_the_settings_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[1].eval()
    before = [m.training for m in model.modules()]
    mean = model[1].running_mean.clone()
    macs(model, torch.randn(2, 3, 8, 8))
    assert [m.training for m in model.modules()] == before
    assert torch.equal(model[1].running_mean, mean)
    assert torch.backends.mha.get_fastpath_enabled()


def test_shared_parameters_count_once_and_dtypes_tell() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert (params(model), param_bytes(model)) == (64, 256)
    model.bfloat16()
    assert param_bytes(model) == 128
    assert params(model) == math.prod(model[0].weight.shape)
