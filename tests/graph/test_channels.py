"""Which channels are one from layer to layer: through additions and shortcuts, and where that cannot be followed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from palmette.graph import capture, remove_dead_channels
from palmette.graph.channels import Channels
from palmette.graph.sliced_channels import SlicedChannels


class Sum(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class WiderShortcut(nn.Module):
    """The parameter-free shortcut of CIFAR ResNets: zeros for the channels that are new."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.sizes = (0, 0, 0, 0, before, after)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], self.sizes)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def removed(net: nn.Module, x: Tensor) -> tuple[fx.GraphModule, dict[str, int]]:
    """The network without dead channels, which computes the same in float64, and what its layers kept."""
    small, record = remove_dead_channels(capture(net.double(), x.double()))
    noise = torch.randn(3, *x.shape[1:]).double()
    with torch.no_grad():
        assert torch.allclose(small(noise), net(noise), rtol=0, atol=1e-12)
    return small, {entry["producer"]: entry["kept"] for entry in record.narrowed}


def residual(dead_in_stem: bool, dead_in_branch: bool) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        Sum(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)), nn.Identity()),
        nn.ReLU(),
        head(4),
    )
    with torch.no_grad():
        for layer, dead, constant in ((net[0], dead_in_stem, 0.0), (net[1].left[2], dead_in_branch, -0.25)):
            if dead:
                layer.weight[2], layer.bias[2] = 0.0, constant
    return net


def test_a_residual_stream_loses_what_is_dead_in_all_summands():
    x = torch.randn(2, 3, 8, 8)
    assert removed(residual(True, True), x)[1] == {"0": 3, "1.left.2": 3}
    assert removed(residual(True, False), x)[1] == {}
    assert removed(residual(False, True), x)[1] == {}


def test_a_padded_shortcut_counts_its_zeros_anew():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        Sum(nn.Conv2d(4, 7, 3, 2, 1), WiderShortcut(1, 2)),
        nn.Conv2d(7, 3, 1),
        head(3),
    )
    with torch.no_grad():
        net[2].weight[:, [0, 3]] = 0.0  # one that the shortcut pads, one of the stem
        net[1].left.weight[:, 2] = 0.0
    small, kept = removed(net, torch.randn(2, 3, 8, 8))
    assert kept == {"0": 3, "1.left": 5}
    pad = next(n for n in small.graph.nodes if "pad" in str(n.target))
    assert pad.args[1] == [0, 0, 0, 0, 0, 2]


class Attending(nn.Module):
    """A transformer's halves: an MLP with a free hidden width, and a stream that a layer norm and attention read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(*[self.norm(x)] * 3, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm(x))).mean(1))


def test_layer_norm_and_attention_are_left_alone():
    net = Attending().eval()
    with torch.no_grad():
        for layer in (net.embed, net.attention.out_proj, net.mlp[2]):
            layer.weight[3], layer.bias[3] = 0.0, 0.0
        net.attention.in_proj_weight[5] = 0.0
        net.mlp[0].weight[7] = 0.0
        net.mlp[2].weight[:, 9] = 0.0
    assert removed(net, torch.randn(2, 5, 4))[1] == {"mlp.0": 10}


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.tied, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.other = nn.Linear(4, 4)
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(x)))
        return self.last(self.other(F.relu(self.tied(x))))


def test_shared_weights_keep_their_shape():
    net = Shared()
    with torch.no_grad():
        for layer in (net.twice, net.tied):
            layer.weight[1], layer.bias[1] = 0.0, 0.0
        net.last.weight[:, 2] = 0.0
    assert removed(net, torch.randn(2, 4))[1] == {}


class Overwriting(nn.Module):
    """A channel that is zero when it is written, and one when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x.view(-1, 4).exp_()
        return self.last(x)


def test_what_is_written_over_is_no_constant():
    net = Overwriting()
    with torch.no_grad():
        net.first.weight[1], net.first.bias[1] = 0.0, 0.0
    assert removed(net, torch.randn(2, 4))[1] == {}


class Leaking(nn.Module):
    """PReLU with a slope per channel, inside a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.head = nn.Conv2d(3, 16, 3), nn.PReLU(16), head(16)
        self.inner, self.outer = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(x + self.outer(self.act(self.inner(x))))


def test_slopes_of_a_prelu_go_with_their_channels():
    net = Leaking()
    with torch.no_grad():
        net.act.weight.copy_(torch.rand(16))
        net.outer.weight[:, [1, 4]] = 0.0
        net.inner.weight[9], net.inner.bias[9] = 0.0, 0.0
    small, kept = removed(net, torch.randn(2, 3, 8, 8))
    assert kept == {"inner": 13}
    stays = [i for i in range(16) if i not in (1, 4, 9)]
    assert torch.equal(small.get_parameter("act.weight"), net.act.weight[stays])


class PerToken(nn.Module):
    """What has a number per token or column, as many as there are channels: a PReLU's slopes, or an added parameter."""

    def __init__(self, net: nn.Module, first: nn.Module, last: nn.Module, shift: bool) -> None:
        super().__init__()
        self.first, self.act, self.last = first, net, last
        self.shift = nn.Parameter(torch.randn(4)) if shift else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)) + self.shift)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (PerToken(nn.PReLU(4), nn.Linear(3, 4), nn.Linear(4, 2), False), torch.randn(2, 4, 3)),
        (PerToken(nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), True), torch.randn(2, 3, 5, 4)),
    ],
)
def test_what_lies_along_another_axis_than_the_channels_stays(net: PerToken, x: Tensor):
    with torch.no_grad():
        net.last.weight[:, 2] = 0.0
        net.first.weight[1], net.first.bias[1] = 0.0, -1.0
    small, kept = removed(net, x)
    assert kept == {"first": 3}
    assert small(x.double()).shape == net(x.double()).shape


def test_variables_classes_and_constants():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Sum(nn.Conv2d(4, 4, 1), nn.Identity()), nn.Flatten())
    with torch.no_grad():
        net[0].weight[[0, 2]], net[0].bias[[0, 2]] = 0.0, torch.tensor([-1.0, 0.5])
    channels = Channels(capture(net.eval(), torch.randn(2, 3, 2, 2)))
    by_path = {n.meta["path"]: n for n in channels.variables}
    assert torch.equal(channels.of(by_path["0"]), channels.of(by_path["2.left"]))
    assert channels.values[by_path["0"]][[0, 2]].tolist() == [-1.0, 0.5]
    assert channels.values[by_path["1"]][[0, 2]].tolist() == [0.0, 0.5]
    assert channels.values[by_path["1"]][[1, 3]].isnan().all()
    assert channels.values[by_path["2.add"]].isnan().all()
    assert channels.of(by_path["3"]).tolist() == channels.of(by_path["0"]).repeat_interleave(4).tolist()
    assert channels.pinned.all()  # all of them are the output


class Normalised(nn.Module):
    """An embedding and a state, a layer norm, a root mean square norm of PyTorch and one written out, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(9, 8), nn.Parameter(torch.randn(8))
        self.first, self.second, self.last = nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 2)
        self.groups = nn.GroupNorm(2, 8)
        self.inner = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(self.first(self.table(ids) + self.place.view(1, 1, -1)))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.last(self.groups(self.inner(x).transpose(1, 2)).mean(2))


def test_channels_pass_norms_where_slices_are_run_and_nowhere_else():
    gm = capture(Normalised().eval(), torch.randint(9, (2, 5)))
    pruned, sliced = Channels(gm), SlicedChannels(gm)
    by_path = {n.meta["path"]: n for n in sliced.variables}
    assert [str(n.meta["path"]) for n in pruned.writers] == ["inner", "last"]
    assert pruned.states == {}
    assert pruned.pinned.all()
    assert [str(n.meta["path"]) for n in sliced.writers] == ["table.embedding", "inner", "last"]
    assert {str(n.target): axis for n, (axis, _) in sliced.states.items()} == {
        "table.weight": 1, "place": 0, "second.weight": 0,
    }  # fmt: skip
    assert [str(n.meta["path"]) for n in sliced.channelwise] == ["first"]
    assert [str(n.meta["path"]) for n in sliced.sized] == ["second.rms_norm"]
    assert not sliced.pinned[sliced.of(by_path["mul"])].any()
    assert torch.equal(sliced.of(by_path["mul"]), sliced.of(by_path["table.embedding"]))
    assert sliced.pinned[sliced.of(by_path["inner"])].all()  # groups of channels are normalised there


@pytest.mark.parametrize("shape", [(5, 8), (8,)])
def test_a_norm_over_more_than_the_channels_keeps_them(shape: tuple[int, ...]):
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(shape), nn.Linear(8, 2))
    sliced = SlicedChannels(capture(net.eval(), torch.randn(2, 5, 4)))
    assert bool(sliced.pinned[sliced.of(sliced.writers[0])].all()) == (len(shape) > 1)
