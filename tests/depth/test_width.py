"""Structured width pruning: whose channels go, against Torch-Pruning's own pruner, and what comes out."""

from __future__ import annotations

import copy
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from palmette.depth.width import nearest, prune_width
from palmette.errors import DataError, InputError, MissingDependency
from palmette.graph import Edit, Plan, capture, collapse, find_sites, load, remove_dead_channels, save, verify
from palmette.meter import macs
from palmette.models import TransformerBlock

torch_pruning = pytest.importorskip("torch_pruning", reason="torch-pruning (the extra `width`) is not installed")

IMAGE = torch.randn(2, 3, 8, 8)


def conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out))


class Basic(nn.Module):
    """A residual block whose shortcut is the input, a convolution, or the input with zeros as further channels."""

    def __init__(self, c_in: int, c_out: int, shortcut: str = "same") -> None:
        super().__init__()
        stride = 1 if shortcut == "same" else 2
        self.first, self.second = conv(c_in, c_out, stride=stride), conv(c_out, c_out)
        self.shortcut = conv(c_in, c_out, 1, 2) if shortcut == "conv" else None
        self.pad = (c_out - c_in) // 2 if shortcut == "pad" else 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x)))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Inverted(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv(c, 4 * c, 1), nn.ReLU6(), conv(4 * c, 4 * c, groups=4 * c), nn.ReLU6(), conv(4 * c, c, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def resnet(shortcut: str) -> nn.Module:
    body = [conv(3, 8), nn.ReLU(), Basic(8, 8), Basic(8, 16, shortcut), Basic(16, 16)]
    return seen(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)))


def mobile() -> nn.Module:
    body = [conv(3, 8), nn.ReLU6(), Inverted(8), conv(8, 12, 1), Inverted(12)]
    return seen(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)))


def seen(net: nn.Module) -> nn.Module:
    """The network with norms that have seen data, so that scales differ."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.2, 2.0)
            nn.init.normal_(m.running_mean)
    return net.eval()


@cache
def captured(name: str) -> fx.GraphModule:
    """A network traced once for all tests; it is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return capture({"mobile": mobile, "vit": lambda: Vit().eval()}.get(name, lambda: resnet(name))(), IMAGE)


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(*[TransformerBlock(16, 2, 0.0) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


def kept(network: fx.GraphModule, side: str) -> dict[str, list[int]]:
    """Indices that stay per layer, of one side."""
    layers = network.meta["palmette"]["steps"][-1]["resize"]["layers"]
    return {e["path"]: [i for a, b in e[side]["keep"] for i in range(a, b)] for e in layers if side in e}


def torch_pruning_keeps(net: nn.Module, ratio: float) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Rows and columns that Torch-Pruning's pruner keeps, per layer; it leaves the classifier's outputs alone."""
    names = {m: n for n, m in net.named_modules()}
    gone: dict[tuple[str, bool], set[int]] = {}
    pruner = torch_pruning.pruner.MetaPruner(
        net,
        IMAGE,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[m for m in net.modules() if isinstance(m, nn.Linear)],
    )
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            layer = dependency.target.module
            if isinstance(layer, nn.Conv2d | nn.Linear):
                columns = "in_channels" in dependency.handler.__name__
                gone.setdefault((names[layer], columns), set()).update(indices)
    both: tuple[dict[str, list[int]], dict[str, list[int]]] = {}, {}
    for (name, columns), indices in gone.items():
        layer = net.get_submodule(name)
        if getattr(layer, "groups", 1) == 1:
            both[columns][name] = sorted(set(range(layer.weight.shape[1 if columns else 0])) - indices)
    return both


@pytest.mark.parametrize("name", ["conv", "mobile"])
def test_the_channels_that_stay_are_torch_prunings(name):
    net = copy.deepcopy(captured(name))
    small = prune_width(net, IMAGE, 0.5, round_to=1, keep_first=False)
    rows, columns = torch_pruning_keeps(net, 0.5)
    assert kept(small, "rows") == rows
    assert kept(small, "columns") == columns


@pytest.mark.parametrize(("shortcut", "importance"), [("conv", "taylor"), ("pad", "l2"), ("pad", "taylor")])
def test_residual_networks_become_narrower(shortcut, importance, tmp_path):
    net = captured(shortcut)
    loader = [(torch.randn(4, 3, 8, 8), torch.randint(5, (4,))) for _ in range(2)]
    small = prune_width(net, IMAGE, 0.5, importance=importance, loader=loader, round_to=4, keep_first=False)
    y = small(IMAGE)
    assert y.shape == (2, 5)
    assert bool(y.isfinite().all())
    assert 0.2 < macs(small, IMAGE) / macs(net, IMAGE) < 0.35
    assert all(m.weight.shape[0] % 4 == 0 for m in small.modules() if isinstance(m, nn.Conv2d))
    assert all(p.requires_grad and p.grad is None for p in small.parameters())
    save(small, tmp_path / "small.safetensors", source=net)
    assert torch.equal(load(net, tmp_path / "small.safetensors")(IMAGE), y)


def test_zeros_in_place_of_the_channels_would_compute_the_same():
    """With zero shifts in all norms a removed channel is one whose rows and columns are zero."""
    net = copy.deepcopy(captured("pad"))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.zeros_(m.running_mean)
    small = prune_width(net, IMAGE, 0.5, round_to=1)
    with torch.no_grad():
        for path, rows in kept(small, "rows").items():
            layer = net.get_submodule(path)
            layer.weight[[i for i in range(len(layer.weight)) if i not in rows]] = 0.0
    assert torch.allclose(small(IMAGE), net(IMAGE), atol=1e-5)


def test_a_transformer_loses_hidden_units_only():
    net = captured("vit")
    small = prune_width(net, IMAGE, 0.25)
    assert {p: len(r) for p, r in kept(small, "rows").items()} == {"blocks.0.mlp.0": 48, "blocks.1.mlp.0": 48}
    norms = net.get_submodule("blocks.0.mlp.0").weight.square().sum(1)
    norms = norms + net.get_submodule("blocks.0.mlp.3").weight.square().sum(0)
    assert kept(small, "rows")["blocks.0.mlp.0"] == sorted(norms.argsort()[16:].tolist())
    assert small(IMAGE).shape == (2, 5)


def test_nothing_goes_at_ratio_zero_or_below_the_multiple():
    net = captured("mobile")
    for small in (prune_width(net, IMAGE, 0.0), prune_width(net, IMAGE, 0.02)):
        assert torch.equal(small(IMAGE), net(IMAGE))
        assert "steps" not in small.meta["palmette"]


@pytest.mark.parametrize(
    ("wanted", "multiple", "most", "stays"),
    [
        (12.8, 8, 16, 16),
        (11.9, 8, 16, 8),
        (11.8, 8, 12, 12),
        (9.9, 8, 12, 8),
        (2.0, 8, 16, 8),
        (3.0, 8, 5, 5),
        (7.5, 1, 9, 8),
    ],
)
def test_what_stays_is_rounded_to_the_nearest_multiple(wanted, multiple, most, stays):
    assert nearest(wanted, multiple, most) == stays


def test_protected_and_first_layers_keep_their_outputs():
    net = captured("conv")
    rows = kept(prune_width(net, IMAGE, 0.5, round_to=1, protect=["3", "4.first.0"]), "rows")
    assert set(rows) == {"2.first.0"}
    assert "0.0" in kept(prune_width(net, IMAGE, 0.5, round_to=1, keep_first=False), "rows")


def test_narrowed_networks_are_edited_and_collapsed_like_any_other(tmp_path):
    net = mobile()
    small = prune_width(net, IMAGE, 0.5, round_to=2, keep_first=False)
    sites = [s.path for s in find_sites(small, IMAGE) if s.removable][:2]
    edited = Plan([Edit("linearize", path, fit="identity") for path in sites]).apply(small, IMAGE)
    merged, record = collapse(edited, cost="macs", force=True)
    assert record.done
    assert verify(edited, merged, example_inputs=IMAGE).exact
    twice = prune_width(merged, IMAGE, 0.3, round_to=1)
    dead, _ = remove_dead_channels(twice)
    save(dead, tmp_path / "small.safetensors", source=net)
    assert torch.equal(load(mobile(), tmp_path / "small.safetensors")(IMAGE), dead(IMAGE))


class Leaking(nn.Module):
    """PReLU with a slope per channel, inside a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.head = nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Linear(16, 4)
        self.inner, self.outer = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head((x + self.outer(self.act(self.inner(x)))).mean((2, 3)))


def test_slopes_of_a_prelu_go_with_their_channels(tmp_path):
    net = Leaking().eval()
    nn.init.uniform_(net.act.weight)
    small = prune_width(net, IMAGE, 0.5)
    rows = kept(small, "rows")["inner"]
    assert len(rows) == 8
    assert torch.equal(small.get_parameter("act.weight"), net.act.weight[rows])
    save(small, tmp_path / "small.safetensors", source=net)
    assert torch.equal(load(net, tmp_path / "small.safetensors")(IMAGE), small(IMAGE))


def test_what_is_given_stays_as_it_was():
    gm = captured("mobile")
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    prune_width(gm, IMAGE, 0.5, importance="taylor", loader=[(IMAGE, torch.tensor([0, 1]))])
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    assert all(p.grad is None for p in gm.parameters())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"ratio": 1.0}, InputError, "ratio = 1.0"),
        ({"ratio": -0.1}, InputError, "ratio = -0.1"),
        ({"round_to": 0}, InputError, "round_to = 0"),
        ({"importance": "l3"}, InputError, "Unknown importance 'l3'"),
        ({"importance": "taylor"}, InputError, "needs data"),
        ({"importance": "taylor", "loader": []}, DataError, "empty"),
    ],
)
def test_options_that_cannot_be(options, kind, message):
    with pytest.raises(kind, match=message):
        prune_width(captured("mobile"), IMAGE, **{"ratio": 0.5, **options})


def test_without_torch_pruning_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingDependency, match=r"palmette\[width\]"):
        prune_width(captured("mobile"), IMAGE, 0.5)
