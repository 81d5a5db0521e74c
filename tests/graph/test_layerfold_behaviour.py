"""The cases on which a published merging library is wrong or gives up: ours are exact, or refused with a reason.

LayerFold crops the composed kernel, counts biases once per tap, ignores the second stride, and finds sites by names and
positions.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palmette import compat
from palmette.errors import MissingDependency
from palmette.graph import Plan, collapse, find_sites, linearize

BOUND = 1e-10


def _merge(net: nn.Module, x: Tensor, pad: str, *, only: str = "") -> tuple[nn.Module, nn.Module, Any]:
    """Every removable activation made the identity: the edited network, the collapsed one, the record; in float64."""
    net, x = net.double().eval(), x.double()
    sites = [s for s in find_sites(net, x, pad=pad) if s.kind == "activation" and s.removable and only in s.path]
    assert sites, [s.reason for s in find_sites(net, x, pad=pad)]
    plan = Plan([linearize(s.path, fit="identity") for s in sites]).fit(net, [(x, torch.zeros(len(x)))], x)
    edited = plan.apply(net, x, pad=pad).eval()
    small, record = collapse(edited, cost="macs", force=True)
    return edited, small, record


def _error(want: Tensor, got: Tensor) -> float:
    assert want.shape == got.shape
    return float((want - got).abs().max() / want.abs().max())


def _count(net: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in net.modules())


@pytest.mark.parametrize("bias", [False, True])
def test_conv_conv_has_the_full_kernel_and_one_bias(bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1, bias=bias))
    x = torch.randn(2, 3, 16, 16)
    edited, small, _ = _merge(net, x, "repad")
    (conv,) = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert conv.kernel_size == (5, 5)
    with torch.no_grad():
        want, got = net[2](net[0](x.double())), small(x.double())
        assert _error(edited(x.double()), got) <= BOUND
        assert _error(want[:, :, 1:-1, 1:-1], got[:, :, 1:-1, 1:-1]) <= BOUND  # the interior is the original's
        border = (want - got).abs().amax((0, 1)) > BOUND
        assert bool(border[0].all())
        assert not bool(border[1:-1, 1:-1].any())


@pytest.mark.parametrize("bias", [False, True])
def test_conv_conv_is_refused_where_nothing_may_change(bias: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1, bias=bias))
    (site,) = [s for s in find_sites(net.eval(), torch.randn(2, 3, 16, 16), pad="exact") if s.kind == "activation"]
    assert not site.removable
    assert site.reason


@pytest.mark.parametrize("pad", ["exact", "repad", "bias_map"])
def test_stride_of_the_second_convolution_is_kept(pad: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 2, stride=2))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    _, small, _ = _merge(net, x, pad)
    assert _count(small, nn.Conv2d) == 1
    with torch.no_grad():
        want = net[2](net[0](x))
        assert want.shape[-2:] == (8, 8)
        assert _error(want, small(x)) <= BOUND


def test_stride_with_padding_under_repad() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2, padding=1))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    edited, small, _ = _merge(net, x, "repad")
    with torch.no_grad():
        want = net[2](net[0](x))
        assert _error(edited(x), small(x)) <= BOUND
        assert _error(want[:, :, 1:, 1:], small(x)[:, :, 1:, 1:]) <= BOUND


@pytest.mark.parametrize(
    "second",
    [nn.Conv2d(5, 4, 1), nn.Conv2d(5, 4, (1, 3), padding=0), nn.Conv2d(5, 4, (1, 5), padding=(0, 2))],
    ids=["1x1", "1x3", "1x5p2"],
)
def test_unequal_padding_keeps_the_shape(second: nn.Conv2d) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, (5, 1), padding=(2, 0), bias=False), nn.ReLU(), copy.deepcopy(second))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    edited, small, record = _merge(net, x, "repad")
    assert [m.done for m in record.merges] == [True]
    with torch.no_grad():
        assert net(x).shape == small(x).shape
        assert _error(edited(x), small(x)) <= BOUND
        # A column kernel sees no border across: without a bias, nothing changes at all.
        assert _error(net[2](net[0](x)), small(x)) <= BOUND


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)])
def test_linear_linear_with_and_without_biases(biases: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24, bias=biases[0]), nn.GELU(), nn.Linear(24, 5, bias=biases[1]))
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    _, small, _ = _merge(net, x, "exact")
    (linear,) = [m for m in small.modules() if isinstance(m, nn.Linear)]
    assert linear.weight.shape == (5, 6)
    if not any(biases):
        assert linear.bias is None or not linear.bias.any()
    with torch.no_grad():
        assert _error(net[2](net[0](x)), small(x)) <= BOUND


class SwinMLP(nn.Sequential):
    """Linear, GELU, Dropout, Linear, Dropout: the layout of torchvision's MLP."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(0.1, inplace=True),
            nn.Linear(4 * width, width),
            nn.Dropout(0.1),
        )


class SwinBlock(nn.Module):
    """LayerNorm and MLP with a skip."""

    def __init__(self, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.mlp, self.head = nn.LayerNorm(width), mlp, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.mlp(self.norm(x))).mean(1).relu())


def _check_mlp(mlp: nn.Sequential) -> None:
    torch.manual_seed(0)
    net = SwinBlock(mlp, 8).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    edited, small, _ = _merge(net, x, "exact", only="mlp")
    sizes = sorted(tuple(m.weight.shape) for m in small.modules() if isinstance(m, nn.Linear))
    assert sizes == [(3, 8), (8, 8)]
    with torch.no_grad():
        linear = x + mlp[3](mlp[0](net.norm(x)))
        assert _error(net.head(linear.mean(1).relu()), small(x)) <= BOUND
        assert _error(edited(x), small(x)) <= BOUND


def test_swin_mlp_with_dropouts() -> None:
    torch.manual_seed(0)
    _check_mlp(SwinMLP(8))


def test_swin_mlp_of_torchvision() -> None:
    try:
        torchvision = compat.torchvision()
    except MissingDependency as missing:
        pytest.skip(str(missing))
    torch.manual_seed(0)
    _check_mlp(torchvision.ops.MLP(8, [32, 8], activation_layer=nn.GELU, inplace=None, dropout=0.1))


class Basic(nn.Module):
    """A residual block with one ReLU for both calls, as torchvision writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def _lively(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return net.eval()


def test_residual_net_with_one_shared_relu() -> None:
    torch.manual_seed(0)
    net = _lively(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Basic(4), Basic(4), nn.Conv2d(4, 2, 1)))
    x = torch.randn(2, 3, 9, 9)
    sites = [s for s in find_sites(net, x) if s.kind == "activation"]
    assert len(sites) == 4
    assert len({s.path for s in sites}) == 4
    edited, small, record = _merge(net, x, "repad")
    assert any(m.done for m in record.merges)
    assert _count(small, nn.Conv2d) < _count(net, nn.Conv2d)
    with torch.no_grad():
        assert _error(edited(x.double()), small(x.double())) <= BOUND


@pytest.mark.parametrize(
    ("width", "kernels"),
    [(8, [(8, 3, 5, 5)]), (16, [(16, 3, 5, 5)]), (2, [(2, 3, 3, 3), (2, 2, 3, 3)])],
    ids=["pays", "pays more", "would not pay"],
)
def test_an_identity_of_the_network_itself_is_seen_through(width: int, kernels: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.Identity(),
        nn.Conv2d(width, width, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144 * width, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )
    x = torch.randn(2, 3, 16, 16)
    (path,) = [s.path for s in find_sites(net.eval(), x) if s.kind == "activation" and s.removable]
    edited, small, record = _merge(net, x, "exact", only=path)
    assert [m.done for m in record.merges if path in m.members or "7" in m.members] == [True]
    assert _count(small, nn.Linear) == 1
    assert [tuple(m.weight.shape) for m in small.modules() if isinstance(m, nn.Conv2d)] == kernels
    with torch.no_grad():
        assert _error(edited(x.double()), small(x.double())) <= BOUND


@pytest.mark.parametrize(("groups", "dilation"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_conv_bn_with_groups_and_dilation(groups: int, dilation: int) -> None:
    torch.manual_seed(0)
    net = _lively(
        nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=dilation, dilation=dilation, groups=groups, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1, groups=groups),
            nn.BatchNorm2d(8),
        )
    )
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    _, small, _ = _merge(net, x, "exact")
    assert _count(small, nn.Conv2d) == 1
    assert _count(small, nn.BatchNorm2d) == 0
    with torch.no_grad():
        assert _error(net[4](net[3](net[1](net[0](x)))), small(x)) <= BOUND
