"""What the tests of adapt share: gradients of a step, how far two sets of them lie apart, small networks."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from palmette.graph.inputs import call, map_tensors
from palmette.meter.training import default_loss
from palmette.ondevice.adapt import adapt

Step = tuple[float, dict[str, Tensor | None]]


def step(
    model: nn.Module,
    x: Any,
    y: Any = None,
    loss: Callable[..., Tensor] = default_loss,
    *,
    seed: int = 3,
    **options: Any,
) -> Step:
    """The loss and every gradient of one training step with this seed; gradients are taken off the model again."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    value = loss(call(model, x), y)
    value.backward(**options)
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return float(value.detach()), found


def apart(want: Step, got: Step) -> float:
    """The largest difference of a gradient, relative to that gradient (at least 1e-6 of the largest of all)."""
    assert want[1].keys() == got[1].keys()
    assert {n for n, g in want[1].items() if g is None} == {n for n, g in got[1].items() if g is None}
    pairs = [(g.float().double(), got[1][n].double()) for n, g in want[1].items() if g is not None]
    if any(w.dtype == torch.float64 for w in want[1].values() if w is not None):
        pairs = [(g, got[1][n]) for n, g in want[1].items() if g is not None]
    top = max(float(g.abs().max()) for g, _ in pairs)
    return max(float((a - b).abs().max()) / max(float(a.abs().max()), 1e-6 * top, 1e-30) for a, b in pairs)


def frozen(model: nn.Module) -> nn.Module:
    """A copy whose batch norms use their running statistics: what `freeze_bn` trains."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return copied


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network in train mode with norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -0.5, 0.5, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=generator)
    return net.train()


def smallest(error: Exception) -> int:
    """The smallest budget that a BudgetError names."""
    found = re.search(r"is ([\d,]+) bytes", str(error))
    assert found is not None, error
    return int(found[1].replace(",", ""))


def exactly(model: nn.Module, x: Any, y: Any = None, **options: Any) -> Any:
    """`adapt`, with the plan's bytes held against the measured ones."""
    adaptation = adapt(model, (x, y), **options)
    assert adaptation.measured.saved_bytes == adaptation.plan.predicted_bytes, adaptation.report()
    return adaptation


def check_exact(net: nn.Module, x: Any, y: Any, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """One network: loss, gradients and bytes under the exact forms, and what is left after undo."""
    # torch's own hardsigmoid has its 1/6 in single precision
    rough = any(isinstance(module, nn.Hardsigmoid) for module in net.modules())
    bound = 1e-5 if dtype == torch.float32 else 1e-7 if rough else 1e-10
    net = net.to(dtype)
    reference, before = frozen(net), copy.deepcopy(net)
    want = step(reference, x, y)
    with torch.no_grad():
        torch.manual_seed(0)
        was = copy.deepcopy(before)(x)
    adaptation = exactly(net, x, y, method="lossless", **options)
    got = step(net, x, y)
    assert got[0] == pytest.approx(want[0], rel=1e-12 if dtype == torch.float64 else 1e-6)
    if dtype == torch.float32 and apart(want, got) > bound:  # where torch's own rounding is no smaller
        precise = frozen(before).double()
        torch_is_off = apart(step(precise, map_tensors(lambda t: t.double(), x), y), want)
        assert apart(want, got) <= 2 * torch_is_off < 1e-4
    else:
        assert apart(want, got) <= bound
    assert adaptation.measured.saved_bytes <= adaptation.vanilla_saved
    adaptation.undo()
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), net.state_dict().values(), strict=True))
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(net(x), was)
    return adaptation


# ---- networks --------------------------------------------------------------------------------------------------------


class Fn(nn.Module):
    """A function as a module, with layers of its own."""

    def __init__(self, fn: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.fn, self.layers = fn, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, *self.layers)


class Residual(nn.Module):
    """x + f(x), or with a ReLU on the sum."""

    def __init__(self, inner: nn.Module, *, outer: bool = False) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.inner(x)
        return torch.relu_(y) if self.outer else y


class Mean(nn.Module):
    """Mean over space."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class Swapped(nn.Module):
    """The last two axes swapped."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2)


def conv_bn(
    i: int, o: int, kernel: int = 3, stride: int = 1, groups: int = 1, *, bias: bool = False
) -> list[nn.Module]:
    """A convolution that keeps the size, and its batch norm."""
    return [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=bias), nn.BatchNorm2d(o)]


def images(*blocks: nn.Module, width: int = 6, out: int = 6) -> nn.Module:
    """3 channels in, 4 classes out."""
    stem = [*conv_bn(3, width), nn.ReLU(inplace=True)]
    return lively(nn.Sequential(*stem, *blocks, Mean(), nn.Linear(out, 4)))


def small_cnn() -> nn.Module:
    """A ResNet of two blocks and an inverted residual, 3 channels of 12x12 in, 4 classes out."""
    block = [*conv_bn(6, 6), nn.ReLU(inplace=True), *conv_bn(6, 6)]
    inverted = [*conv_bn(6, 18, 1), nn.ReLU6(inplace=True), *conv_bn(18, 18, 3, 1, 18), nn.ReLU6(inplace=True)]
    inverted += conv_bn(18, 6, 1)
    return images(Residual(nn.Sequential(*block), outer=True), nn.MaxPool2d(2), Residual(nn.Sequential(*inverted)))


class Attention(nn.Module):
    """A pre-norm transformer block over tokens [batch, tokens, width]."""

    def __init__(self, width: int = 8, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        x = x + self.mix(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm_2(x))


def small_transformer(dropout: float = 0.0) -> nn.Module:
    """Tokens of 5 features in, 4 outputs a token."""
    return lively(
        nn.Sequential(nn.Linear(5, 8), Attention(dropout=dropout), Attention(dropout=dropout), nn.Linear(8, 4))
    )


def batch(n: int = 6, size: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Noise images with labels, the same each time."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(n, 3, size, size, generator=generator, dtype=dtype), torch.arange(n) % 4


@pytest.fixture(scope="session")
def kit() -> ModuleType:
    """This module."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def families() -> ModuleType:
    """The module benchmarks/coverage_families.py."""
    name = "coverage_families"
    if name not in sys.modules:
        path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
