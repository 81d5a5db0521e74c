"""The trunk of a transformer is elastic: a slimmer one normalises over the channels that it keeps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import palmette as pm
from palmette.device import DeviceProfile
from palmette.meter.compute import param_bytes
from palmette.meter.memory import peak_bytes
from palmette.supernet.memory import MemoryModel
from palmette.supernet.sites import importance
from palmette.supernet.supernet import Supernet


class HandWritten(nn.Module):
    """The root mean square norm of language models, as they write it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


class Bare(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.shape = (width,)

    def forward(self, x):
        return F.layer_norm(x, self.shape)


class Layer(nn.Module):
    """Attention and MLP, each normalised before or after its shortcut, scaled per channel."""

    def __init__(self, norm, post):
        super().__init__()
        self.post = post
        self.norm1, self.norm2 = norm(32), norm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.scale = nn.Parameter(torch.rand(32))

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 32))

    def mix(self, x):
        return self.down(F.gelu(self.up(x))) * self.scale.view(1, 1, -1)

    def forward(self, x):
        if self.post:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.mix(x))
        x = x + self.attend(self.norm1(x))
        return x + self.mix(self.norm2(x))


class Vision(nn.Module):
    """Patches, a class token, a position embedding, three layers, a head on the class token."""

    def __init__(self, norm=nn.LayerNorm, post=False):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 20, 32))
        self.layers = nn.Sequential(*(Layer(norm, post) for _ in range(3)))
        self.norm, self.head = norm(32), nn.Linear(32, 5)

    def forward(self, x):  # [B, 3, 16, 16] -> [B, 5]
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], 1, 32), x], 1)
        return self.head(self.norm(self.layers(x + self.position[:, :17]))[:, 0])


class Text(nn.Module):
    """Embeddings of words and places, PyTorch's own encoder, a mean over the words."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, ids):  # [B, 9] -> [B, 3]
        x = self.words(ids) + self.places(torch.arange(9))
        return self.head(self.encoder(x).mean(1))


class Merging(nn.Module):
    """Layer norms over channels that lie last, rolled windows, a norm of responses, merged patches."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.gain, self.shift = nn.Parameter(torch.rand(32)), nn.Parameter(torch.rand(32))
        self.merged, self.reduce, self.head = nn.LayerNorm(64), nn.Linear(64, 24, bias=False), nn.Linear(24, 3)

    def forward(self, x):  # [B, 3, 8, 8] -> [B, 3]
        x = self.norm(self.stem(x).permute(0, 2, 3, 1))
        y = F.gelu(self.up(torch.roll(x, (-2, -2), (1, 2))))
        responses = y.norm(dim=(1, 2), keepdim=True)
        scaled = y * (responses / (responses.mean(-1, keepdim=True) + 1e-6))
        y = y + torch.addcmul(self.shift.view(1, 1, 1, -1), self.gain.view(1, 1, 1, -1), scaled)
        x = x + torch.roll(self.down(y), (2, 2), (1, 2)) + x.new_zeros(1)
        x = x.reshape(x.shape[0], 4, 2, 4, 2, 16).permute(0, 1, 3, 2, 4, 5).flatten(3)
        return self.head(F.gelu(self.reduce(self.merged(x))).mean((1, 2)))


IMAGES, IDS = torch.randn(2, 3, 16, 16), torch.randint(50, (2, 9))
NETS = {
    "before": (Vision, IMAGES),
    "after": (lambda: Vision(post=True), IMAGES),
    "rms": (lambda: Vision(nn.RMSNorm), IMAGES),
    "by hand": (lambda: Vision(HandWritten), IMAGES),
    "bare": (lambda: Vision(Bare), IMAGES),
    "text": (Text, IDS),
    "merging": (Merging, torch.randn(2, 3, 8, 8)),
}


@pytest.fixture(autouse=True)
def slow_attention():
    """PyTorch's fused encoder layers round differently."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.fixture(params=NETS)
def case(request):
    make, x = NETS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():  # norms that differ from channel to channel
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.weight.uniform_(0.5, 1.5)
    return model, x


def trunk(net):
    """The width that most layers share."""
    return max(net.sites.widths, key=lambda name: len(net.sites.widths[name][0].writers))


def drawn(net, count):
    rng = np.random.default_rng(0)
    slim = {**net.max(), trunk(net): net.space[trunk(net)].values[0]}
    return [net.max(), net.min(), slim, *(net.sample(rng) for _ in range(count))]


def test_the_trunk_is_one_choice(case):
    model, x = case
    net = Supernet.from_model(model, x)
    writers = [str(n.meta["path"]) for n in net.sites.widths[trunk(net)][0].writers]
    expected = {
        "Vision": ["patches", *(f"layers.{i}.{leaf}" for i in range(3) for leaf in ("proj", "down"))],
        "Merging": ["stem", "down"],
        "Text": [
            "words.embedding", "places.embedding",
            *(f"encoder.layers.{i}.{leaf}" for i in range(2) for leaf in ("self_attn.out_proj", "linear2")),
        ],
    }  # fmt: skip
    assert writers == expected[type(model).__name__]
    assert net.space[trunk(net)].owner is None
    assert set(net.static) == {"head"}


def test_what_is_extracted_computes_what_is_active(case):
    model, x = case
    net = Supernet.from_model(model, x).eval()
    with torch.no_grad():
        assert torch.equal(net(x), model(x))
        for config in drawn(net, 8):
            net.activate(config)
            torch.testing.assert_close(net.extract()(x), net(x), rtol=1e-5, atol=1e-6)


def test_bytes_are_those_of_the_extracted_network(case):
    model, x = case
    net = Supernet.from_model(model, x)
    memory, configs = MemoryModel(net), drawn(net, 8)
    codes, networks = memory.codes.encode(configs), [net.extract(c) for c in configs]
    assert memory.param_bytes(codes).tolist() == [param_bytes(n) for n in networks]
    assert memory.peak_bytes(codes).tolist() == [peak_bytes(n, 1, hold_inputs=False) for n in networks]
    core = MemoryModel(net, DeviceProfile(operators="core")).peak_bytes(codes).tolist()
    assert core == [peak_bytes(n, 1, hold_inputs=False, operators="core") for n in networks]


def test_inactive_slices_have_gradients_of_exactly_zero(case):
    model, x = case
    net = Supernet.from_model(model, x).train()
    for config in drawn(net, 3)[1:]:
        net.zero_grad()
        small = net.extract(config).train()
        with net.running(config):
            torch.manual_seed(0)
            net(x).square().sum().backward()
        live = {name: p.numel() for name, p in small.named_parameters()}
        for name, p in net.network.named_parameters():
            touched = 0 if p.grad is None else int((p.grad != 0).sum())
            assert touched <= live.get(name, 0), name


def test_a_slim_network_is_saved_and_loaded(case, tmp_path):
    model, x = case
    net = Supernet.from_model(model, x)
    small = net.extract(net.min()).eval()
    pm.save(small, tmp_path / "slim.safetensors", source=model)
    again = pm.load(copy.deepcopy(model), tmp_path / "slim.safetensors")
    assert torch.equal(again(x), small(x))


def test_the_channels_that_are_read_most_stay():
    torch.manual_seed(0)
    model = Text().eval()
    with torch.no_grad():
        model.head.weight[:, 5] = 100.0
        model.encoder.layers[0].self_attn.in_proj_weight[:, 7] = 10.0
    net = Supernet.from_model(model, IDS)
    site = net.sites.widths[trunk(net)][0]
    states = {str(n.target): n for n in net.sites.channels.states}
    places = net.sites.channels.of(net.sites.channels.states[states["words.weight"]][1])
    assert site.classes[:2].tolist() == [int(places[7]), int(places[5])]
    assert bool((importance(net.sites.channels, site.classes) > 0).all())


@pytest.mark.parametrize("part", ["words", "encoder.layers.1.linear2"])
def test_one_protected_layer_keeps_the_trunk(part):
    net = Supernet.from_model(Text().eval(), IDS, protect=[part])
    assert sorted(net.sites.widths) == [f"width:encoder.layers.{i}.linear1" for i in range(2)]


def test_widths_and_heads_narrow_the_same_projection():
    model = Vision().eval()
    net = Supernet.from_model(model, IMAGES)
    small = net.extract({**net.max(), trunk(net): 16, "heads:layers.0.scaled_dot_product_attention": 2})
    first = small.layers.get_submodule("0")
    assert tuple(first.qkv.weight.shape) == (48, 16)
    assert tuple(first.proj.weight.shape) == (16, 16)
    assert first.norm1.normalized_shape == (16,)
    assert tuple(small.token.shape) == (1, 1, 16)
