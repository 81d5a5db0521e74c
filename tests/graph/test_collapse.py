"""What a collapsed network looks like and computes: inverted residuals, skips, masks, layer norms, dropped blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palmette.errors import PlanError, RefusedEdit
from palmette.graph import Plan, Site, collapse, drop, find_sites, linearize, verify

BOUND = 1e-10


def _activations(net: nn.Module, x: Tensor, pad: str = "repad") -> list[Site]:
    return [s for s in find_sites(net, x, pad=pad) if s.kind == "activation"]


def _edit(net: nn.Module, x: Tensor, edits: Sequence[Any], pad: str = "repad") -> nn.Module:
    plan = Plan(list(edits)).fit(net, [(x, torch.zeros(len(x)))], x)
    return plan.apply(net, x, pad=pad).eval()


def _error(want: Tensor, got: Tensor) -> float:
    assert want.shape == got.shape
    return float(((want - got).abs().max() / want.abs().max()).detach())


def _of(net: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [m for m in net.modules() if isinstance(m, kind)]


def _lively(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return net.double().eval()


class Inverted(nn.Module):
    """1x1 - ReLU6 - depthwise 3x3 - ReLU6 - 1x1, each with batch norm, with or without a skip."""

    def __init__(self, channels: int, *, skip: bool, stride: int = 1) -> None:
        super().__init__()
        wide = 6 * channels
        self.skip = skip
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


def _inverted_net(*, skip: bool, stride: int = 1) -> nn.Module:
    torch.manual_seed(0)
    stem, block = nn.Conv2d(3, 4, 3, padding=1), Inverted(4, skip=skip, stride=stride)
    return _lively(nn.Sequential(stem, nn.ReLU(), block, nn.ReLU(), nn.Conv2d(4, 2, 3)))


@pytest.mark.parametrize("pad", ["repad", "bias_map"])
@pytest.mark.parametrize(("skip", "stride"), [(True, 1), (False, 1), (False, 2)])
def test_inverted_residual_becomes_one_convolution(skip: bool, stride: int, pad: str) -> None:
    net, x = _inverted_net(skip=skip, stride=stride), torch.randn(2, 3, 11, 11, dtype=torch.float64)
    inner = [s for s in _activations(net, x, pad) if s.op in ("relu6", "hardtanh")]
    assert [s.removable for s in inner] == [True, True], [s.reason for s in inner]
    assert set(inner[0].partners) == {s.path for s in inner} == set(inner[1].partners)
    edited = _edit(net, x, [linearize(s, fit="affine") for s in inner], pad)
    small, record = collapse(edited, cost="macs", force=True)
    assert any(m.done for m in record.merges), [m.reason for m in record.merges]
    convs = [c for c in _of(small, nn.Conv2d) if c.in_channels > 1]  # under bias_map another one reads a map of ones
    assert [c.kernel_size for c in convs] == [(3, 3)] * 3
    assert [c.stride[0] for c in convs] == [1, stride, 1]
    assert not _of(small, nn.BatchNorm2d)
    sums = [n for n in small.graph.nodes if n.op == "call_function" and "add" in str(n.target)]  # type: ignore[union-attr]
    assert len(sums) == (pad == "bias_map")  # the skip is in the kernel; bias_map adds its map
    with torch.no_grad():
        for size in (11, 16):
            y = torch.randn(3, 3, size, size, dtype=torch.float64)
            assert _error(edited(y), small(y)) <= BOUND


@pytest.mark.parametrize("skip", [True, False])
def test_bias_map_keeps_the_function_of_an_inverted_residual(skip: bool) -> None:
    net, x = _inverted_net(skip=skip), torch.randn(2, 3, 11, 11, dtype=torch.float64)
    inner = [s for s in _activations(net, x, "bias_map") if s.op in ("relu6", "hardtanh")]
    edited = _edit(net, x, [linearize(s, fit="identity") for s in inner], "bias_map")
    small, _ = collapse(edited, cost="macs", force=True)
    stem, relu, block, outer, head = net  # type: ignore[misc]
    with torch.no_grad():
        h = relu(stem(x))
        for layer in block.body:
            h = h if isinstance(layer, nn.ReLU6) else layer(h)
        want = head(outer(h + relu(stem(x)) if skip else h))
        assert _error(want, edited(x)) <= BOUND
        assert _error(want, small(x)) <= BOUND


def _on_off(width: int, inner: int) -> tuple[nn.Sequential, Tensor]:
    """Linear - ReLU - Linear whose even hidden units are always on and whose odd ones are always off."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)).double().eval()
    with torch.no_grad():
        net[0].bias.copy_(torch.where(torch.arange(inner) % 2 == 0, 50.0, -50.0))
    return net, torch.randn(64, width, dtype=torch.float64)


def test_mask_of_zero_entropy_channels_is_exact() -> None:
    net, x = _on_off(4, 12)
    (site,) = _activations(net, x)
    edited = _edit(net, x, [linearize(site, fit="mask")])
    small, record = collapse(edited, cost="macs", force=True)
    assert [m.done for m in record.merges] == [True]
    assert [tuple(m.weight.shape) for m in _of(small, nn.Linear)] == [(4, 4)]
    with torch.no_grad():
        y = torch.randn(200, 4, dtype=torch.float64)
        assert _error(net(y), edited(y)) <= BOUND
        assert _error(net(y), small(y)) <= BOUND
        identity = _edit(net, x, [linearize(site, fit="identity")])
        assert _error(net(y), identity(y)) > 0.1  # always off is not the identity


def test_dead_channels_go_where_merging_would_cost_more() -> None:
    net, x = _on_off(64, 8)
    (site,) = _activations(net, x)
    edited = _edit(net, x, [linearize(site, fit="mask")])
    small, record = collapse(edited, cost="macs")
    shapes = [tuple(m.weight.shape) for m in _of(small, nn.Linear)]
    assert shapes == [(4, 64), (64, 4)], [m.reason for m in record.merges]
    assert any(not m.done and m.reason for m in record.merges)
    with torch.no_grad():
        y = torch.randn(50, 64, dtype=torch.float64)
        assert _error(net(y), small(y)) <= BOUND


def test_dead_channels_of_a_convolution_go_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1)).double().eval()
    with torch.no_grad():
        net[0].bias.copy_(torch.where(torch.arange(8) < 5, -50.0, 50.0))
    x = torch.randn(4, 16, 9, 9, dtype=torch.float64)
    (site,) = _activations(net, x, "bias_map")
    edited = _edit(net, x, [linearize(site, fit="mask")], "bias_map")
    small, _ = collapse(edited, cost="macs")
    assert [tuple(m.weight.shape[:2]) for m in _of(small, nn.Conv2d)] == [(3, 16), (16, 3)]
    with torch.no_grad():
        assert _error(net(x), small(x)) <= BOUND


def test_merges_that_cost_more_are_refused_unless_forced() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).double().eval()
    x = torch.randn(2, 8, 12, 12, dtype=torch.float64)
    (site,) = _activations(net, x)
    edited = _edit(net, x, [linearize(site)])
    small, record = collapse(edited, cost="macs")
    (merge,) = record.merges
    assert not merge.done
    assert merge.reason
    assert merge.macs_after > merge.macs_before
    assert len(_of(small, nn.Conv2d)) == 2
    assert len(_of(collapse(edited, cost="macs", force=True)[0], nn.Conv2d)) == 1
    with torch.no_grad():
        assert _error(edited(x), small(x)) <= BOUND


class Mixer(nn.Module):
    """x + MLP(LayerNorm(x)), then a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU()
        self.down, self.head = nn.Linear(4 * width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(self.act(self.up(self.norm(x)))))


def test_layer_norm_s_affine_goes_into_the_linear() -> None:
    torch.manual_seed(0)
    net, x = _lively(Mixer(6)), torch.randn(2, 5, 6, dtype=torch.float64)
    (site,) = _activations(net, x)
    edited = _edit(net, x, [linearize(site)])
    small, record = collapse(edited, cost="macs", force=True)
    assert any(m.done for m in record.merges)
    (norm,) = _of(small, nn.LayerNorm)
    assert norm.weight is None
    assert norm.bias is None
    assert sorted(tuple(m.weight.shape) for m in _of(small, nn.Linear)) == [(3, 6), (6, 6)]
    with torch.no_grad():
        assert _error(edited(x), small(x)) <= BOUND


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_edited_network_may_be_cast_before_it_is_collapsed(dtype: torch.dtype) -> None:
    """Healing may happen on another device or in another precision than the capture."""
    torch.manual_seed(0)
    net, x = _lively(Mixer(6)).float(), torch.randn(2, 5, 6)
    (site,) = _activations(net, x)
    edited = _edit(net, x, [linearize(site)]).to(dtype)
    small, record = collapse(edited, cost="macs", force=True)
    assert [m.done for m in record.merges] == [True]
    assert {p.dtype for p in small.parameters()} == {dtype}
    with torch.no_grad():
        assert _error(edited(x.to(dtype)), small(x.to(dtype))) <= (BOUND if dtype is torch.float64 else 0.05)


class Basic(nn.Module):
    """A residual block; with a stride, its shortcut is a convolution."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(out), nn.BatchNorm2d(out), nn.ReLU()
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class Residual(nn.Module):
    """Stem, three residual blocks (the second of another shape), head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.two, self.three = Basic(4, 4), Basic(4, 8, 2), Basic(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.one(self.stem(x).relu()))).mean((2, 3)))


def test_dropped_block_is_gone() -> None:
    torch.manual_seed(0)
    net, x = _lively(Residual()), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    blocks = [s for s in find_sites(net, x) if s.kind == "block"]
    last = next(s for s in blocks if s.path == "three" or s.path.startswith("three"))
    assert last.removable
    assert last.macs_saved == 2 * 8 * 8 * 9 * 36
    edited = _edit(net, x, [drop(last)])
    small, _ = collapse(edited, cost="macs")
    assert not [n for n, _ in small.named_parameters() if n.startswith("three.")]
    with torch.no_grad():
        h = net.two(net.one(net.stem(x).relu()))  # type: ignore[operator]
        want = net.head(h.mean((2, 3)))  # type: ignore[operator]
        assert _error(want, edited(x)) <= BOUND
        assert _error(want, small(x)) <= BOUND


def test_blocks_of_unequal_shapes_are_refused() -> None:
    torch.manual_seed(0)
    net, x = _lively(Residual()), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    removable = [s.path for s in find_sites(net, x) if s.kind == "block" and s.removable]
    assert not any(p == "two" for p in removable)
    with pytest.raises(RefusedEdit, match="two"):
        _edit(net, x, [drop("two")])


def test_outer_activation_of_a_residual_block_has_nothing_to_merge() -> None:
    torch.manual_seed(0)
    net, x = _lively(Residual()), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    sites = _activations(net, x)
    outer = [s for s in sites if s.path.startswith(("one", "three")) and not s.removable]
    inner = [s for s in sites if s.path.startswith(("one", "three")) and s.removable]
    assert len(outer) == 2
    assert len(inner) == 2
    assert all(s.reason for s in outer)
    with pytest.raises(RefusedEdit, match="one"):
        _edit(net, x, [linearize(outer[0].path)])


@pytest.mark.parametrize("twice", [False, True])
def test_tied_weights_are_refused(twice: bool) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    net = nn.Sequential(first, nn.ReLU(), first if twice else second, nn.ReLU(), nn.Linear(4, 2)).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    sites = _activations(net, x)
    assert len(sites) == 2
    assert not sites[0].removable
    assert "tied" in sites[0].reason or "several times" in sites[0].reason
    with pytest.raises(RefusedEdit, match=r"tied|several times"):
        _edit(net, x, [linearize(sites[0].path)])


def test_a_mask_that_cuts_the_network_is_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    nn.init.constant_(net[0].bias, -100.0)
    x = torch.randn(16, 4, dtype=torch.float64)
    (site,) = _activations(net, x)
    with pytest.raises(RefusedEdit, match=r"cut|disconnect|constant"):
        _edit(net, x, [linearize(site, fit="mask")])


def test_transposed_convolutions_are_named() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 1)
    ).eval()
    sites = _activations(net, torch.randn(2, 3, 8, 8))
    assert len(sites) == 2
    for site in sites:
        assert not site.removable
        assert "transpose" in site.reason


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_are_named(mode: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1, padding_mode=mode)).eval()
    (site,) = _activations(net, torch.randn(2, 3, 8, 8))
    assert site.removable or mode in site.reason or "pad" in site.reason


def test_unknown_places_are_refused_by_name() -> None:
    net, x = _on_off(4, 6)
    with pytest.raises(PlanError, match=r"no\.such\.place"):
        _edit(net, x, [linearize("no.such.place")])
    with pytest.raises(PlanError, match=r"no\.such\.block"):
        _edit(net, x, [drop("no.such.block")])


class Aliased(nn.Module):
    """A view of the pre-activation is read after an in-place ReLU has written through it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        halves = y.view(-1, 2, 4)
        y.relu_()
        return self.b(y) + halves.sum((1, 2), keepdim=False)[:, None]


def test_writes_through_a_view_are_seen() -> None:
    torch.manual_seed(0)
    net, x = Aliased().double().eval(), torch.randn(5, 4, dtype=torch.float64)
    (site,) = _activations(net, x)
    assert not site.removable
    assert site.reason


def test_verify_reports_both_precisions_and_two_resolutions() -> None:
    torch.manual_seed(0)
    net, x = _lively(Residual()).float(), torch.randn(2, 3, 12, 12)
    inner = [s for s in _activations(net, x) if s.removable]
    edited = _edit(net, x, [linearize(s) for s in inner])
    small, record = collapse(edited, cost="macs", force=True)
    proof = verify(edited, small, [torch.randn(3, 3, 12, 12)], example_inputs=x)
    assert proof.exact
    assert proof.max_relative_error_float64 <= 1e-10
    assert proof.max_relative_error <= 1e-4
    assert proof.top1_agreement == 1.0
    assert len(proof.resolutions) >= 2
    assert record.to_dict()
    assert proof.to_dict()
    spoilt = collapse(edited, cost="macs", force=True)[0]
    with torch.no_grad():
        next(spoilt.parameters()).add_(0.1)
    assert not verify(edited, spoilt, [torch.randn(3, 3, 12, 12)], example_inputs=x).exact


def test_a_conv1d_network_is_verified_at_two_lengths() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)).eval()
    edited = Plan([linearize("1", fit="identity")]).apply(model, torch.randn(2, 3, 20)).eval()
    small, _ = collapse(edited, cost="macs", force=True)
    seen = verify(edited, small, example_inputs=torch.randn(2, 3, 20))
    assert seen.exact
    assert seen.resolutions == ["3x20", "3x29"]
