"""The exact forms: gradients are autograd's, bytes are as predicted, and undo leaves the model as it was."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from palmette.adapt.adapt import adapt


class Fn(nn.Module):
    """A function as a module, with layers of its own."""

    def __init__(self, fn, *layers):
        super().__init__()
        self.fn, self.layers = fn, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, *self.layers)


def bn(channels: int = 6) -> nn.Module:
    return nn.BatchNorm2d(channels)


def conv(**options) -> nn.Module:
    return nn.Conv2d(6, 6, **{"kernel_size": 3, "padding": 1, **options})


IMAGES = {
    "folded norm": lambda k: [*k.conv_bn(6, 6), nn.ReLU()],
    "folded norm with bias": lambda k: [*k.conv_bn(6, 6, bias=True), nn.ReLU()],
    "norm without affine": lambda k: [conv(), nn.BatchNorm2d(6, affine=False), nn.ReLU()],
    "norm before the activation before the layer": lambda k: [bn(), nn.ReLU(), conv(), bn(), nn.ReLU(inplace=True), conv()],
    "two norms in a row": lambda k: [conv(), bn(), bn(), conv()],
    "a norm's input read twice": lambda k: [Fn(lambda x, c, b: (y := c(x)) + b(y), conv(), bn())],
    "a norm's output and input read": lambda k: [Fn(lambda x, c, b: torch.relu(b(y := c(x))) * y, conv(), bn())],
    "residual": lambda k: [k.Residual(nn.Sequential(*k.conv_bn(6, 6), nn.ReLU(inplace=True), *k.conv_bn(6, 6)), outer=True)],
    "inverted residual": lambda k: [
        k.Residual(nn.Sequential(*k.conv_bn(6, 12, 1), nn.ReLU6(inplace=True), *k.conv_bn(12, 12, 3, 1, 12), nn.ReLU6(), *k.conv_bn(12, 6, 1)))
    ],
    "in-place silu": lambda k: [*k.conv_bn(6, 6), nn.SiLU(inplace=True), conv()],
    "in-place hardswish": lambda k: [*k.conv_bn(6, 6), nn.Hardswish(inplace=True), conv()],
    "in-place mish": lambda k: [*k.conv_bn(6, 6), nn.Mish(inplace=True), conv()],
    "silu": lambda k: [conv(), nn.SiLU(), conv()],
    "gelu": lambda k: [conv(), nn.GELU(), conv(kernel_size=1, padding=0)],
    "tanh gelu": lambda k: [conv(), nn.GELU("tanh"), conv()],
    "elu": lambda k: [conv(), nn.ELU(), conv()],
    "leaky relu": lambda k: [conv(), nn.LeakyReLU(0.1, inplace=True), conv(), nn.LeakyReLU(0.2)],
    "leaky relu that falls": lambda k: [conv(), nn.LeakyReLU(-0.1), conv()],
    "hardtanh": lambda k: [conv(), nn.Hardtanh(-0.5, 0.7), conv(), nn.Hardtanh(inplace=True)],
    "hardsigmoid": lambda k: [k.Residual(nn.Sequential(conv(), nn.Hardsigmoid(inplace=True))), conv(), nn.Hardsigmoid()],
    "prelu": lambda k: [conv(), nn.PReLU(6), conv()],
    "tanh and sigmoid": lambda k: [conv(), nn.Tanh(), conv(), nn.Sigmoid()],
    "squeeze and excite": lambda k: [
        Fn(lambda x, a, b: x * torch.sigmoid(b(F.silu(a(x.mean((2, 3), keepdim=True)), inplace=True))), conv(kernel_size=1, padding=0), conv(kernel_size=1, padding=0))
    ],
    "in-place relu on a view": lambda k: [conv(), Fn(lambda x: F.relu(x[:, :3], inplace=True).repeat(1, 2, 1, 1)), conv()],
    "relu on a chunk": lambda k: [conv(), Fn(lambda x: torch.cat([F.relu(h) for h in x.chunk(2, 1)], 1)), conv()],
    "an activation read twice": lambda k: [Fn(lambda x, c, d, e: d(y := torch.relu(c(x))) + e(y), conv(), conv(), conv())],
    "in-place sum": lambda k: [Fn(lambda x, c: F.relu(c(x).add_(x), inplace=True), conv()), conv()],
    "shuffle": lambda k: [conv(), nn.ReLU(), nn.ChannelShuffle(2), conv(groups=2)],
    "max pool": lambda k: [conv(), nn.ReLU(), nn.MaxPool2d(2), conv()],
    "max pool with padding": lambda k: [conv(), nn.MaxPool2d(3, 2, 1), conv()],
    "max pool with dilation": lambda k: [conv(), nn.MaxPool2d(3, 1, 1, dilation=2), conv()],
    "max pool with ceil": lambda k: [conv(), nn.MaxPool2d((3, 2), (2, 3), ceil_mode=True), conv()],
    "large max pool": lambda k: [conv(), nn.MaxPool2d(5, 1, 2), conv()],
    "max pool of 17 by 17": lambda k: [conv(), nn.MaxPool2d(17, 1, 8), conv()],
    "max pool with indices": lambda k: [conv(), Fn(lambda x: F.max_pool2d(x, 2, return_indices=True)[0])],
    "avg pool": lambda k: [conv(), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), conv()],
    "avg pool by name": lambda k: [conv(), Fn(lambda x: F.avg_pool2d(x, kernel_size=2, divisor_override=3)), conv()],
    "adaptive pools": lambda k: [conv(), nn.AdaptiveAvgPool2d(5), conv(), nn.AdaptiveMaxPool2d(3)],
    "upsampling": lambda k: [conv(), nn.Upsample(scale_factor=2, mode="bilinear"), conv()],
    "padding same": lambda k: [conv(padding="same"), nn.ReLU(), conv(padding="same", dilation=2)],
    "padding same, even kernel": lambda k: [conv(kernel_size=4, padding="same"), nn.ReLU(), conv(kernel_size=(2, 3), padding="same")],
    "padding valid": lambda k: [conv(padding="valid"), nn.ReLU()],
    "circular padding": lambda k: [conv(padding_mode="circular"), nn.ReLU(), conv(padding_mode="reflect")],
    "strides and dilation": lambda k: [conv(stride=2), nn.ReLU(), conv(dilation=(2, 1), padding=(2, 0)), conv(stride=(1, 2))],
    "a stride beyond the kernel": lambda k: [conv(kernel_size=1, stride=3, padding=0), nn.ReLU(), conv()],
    "groups": lambda k: [conv(groups=2), bn(), nn.ReLU(), conv(groups=3), conv(groups=6)],
    "channel multiplier": lambda k: [nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 1)],
    "transposed": lambda k: [nn.ConvTranspose2d(6, 6, 2, 2), bn(), nn.ReLU(), conv()],
    "weight norm": lambda k: [weight_norm(conv()), nn.ReLU(), weight_norm(conv()), bn()],
    "a computed weight": lambda k: [Fn(lambda x, c: F.conv2d(x, c.weight.tanh(), c.bias, padding=1), conv()), nn.ReLU(), conv()],
    "a layer twice": lambda k: (lambda c: [c, nn.ReLU(), c])(conv()),
    "a layer and its norm twice": lambda k: (lambda c, b: [c, b, nn.ReLU(), c, b])(conv(), bn()),
    "a norm twice": lambda k: (lambda b: [conv(), b, nn.ReLU(), conv(), b, nn.ReLU()])(bn()),
    "group norm": lambda k: [conv(), nn.GroupNorm(2, 6), nn.SiLU(), conv(kernel_size=1, padding=0)],
    "instance norm": lambda k: [conv(bias=False), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), conv()],
    "dropout": lambda k: [conv(), nn.Dropout(0.3), conv(), nn.Dropout(0.2, inplace=True), nn.Dropout2d(0.3), conv()],
    "dropout of everything": lambda k: [k.Residual(nn.Sequential(conv(), nn.Dropout(1.0))), conv()],
    "concatenation": lambda k: [Fn(lambda x, c, d: d(torch.cat([x, c(x)], 1)), conv(), nn.Conv2d(12, 6, 1))],
    "branches of one input": lambda k: [Fn(lambda x, b, c, d: c(F.relu(y := b(x))) + d(y), bn(), conv(), conv())],
    "layer norm on channels": lambda k: [
        k.Residual(Fn(lambda x, c, n, a, b: b(F.gelu(a(n(c(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2), conv(groups=6), nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)))
    ],
    "nothing but identity": lambda k: [nn.Identity()],
}  # fmt: skip


def check(k, net: nn.Module, x, y, dtype=torch.float64, **options):
    """One network: loss, gradients and bytes under the exact forms, and what is left after undo."""
    # torch's own hardsigmoid has its 1/6 in single precision
    rough = any(isinstance(module, nn.Hardsigmoid) for module in net.modules())
    bound = 1e-5 if dtype == torch.float32 else 1e-7 if rough else 1e-10
    net = net.to(dtype)
    reference, before = k.frozen(net), copy.deepcopy(net)
    want = k.step(reference, x, y)
    with torch.no_grad():
        torch.manual_seed(0)
        was = copy.deepcopy(before)(x)
    adaptation = k.exactly(net, x, y, method="lossless", **options)
    got = k.step(net, x, y)
    assert got[0] == pytest.approx(want[0], rel=1e-12 if dtype == torch.float64 else 1e-6)
    assert k.apart(want, got) <= bound
    assert adaptation.measured.saved_bytes <= adaptation.vanilla_saved
    adaptation.undo()
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), net.state_dict().values(), strict=True))
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(net(x), was)
    return adaptation


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_images(kit, name, dtype):
    torch.manual_seed(4)
    net = kit.images(*IMAGES[name](kit))
    x, y = kit.batch(dtype=dtype)
    check(kit, net, x, y, dtype)


@pytest.mark.parametrize("name", ["residual", "in-place silu", "max pool", "dropout", "squeeze and excite", "groups"])
def test_channels_last(kit, name):
    net = kit.images(*IMAGES[name](kit)).to(memory_format=torch.channels_last)
    x, y = kit.batch(dtype=torch.float64)
    check(kit, net, x.contiguous(memory_format=torch.channels_last), y)


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes(kit, axes):
    Conv, Norm = (nn.Conv1d, nn.BatchNorm1d) if axes == 1 else (nn.Conv3d, nn.BatchNorm3d)
    layers = [Conv(3, 6, 3, padding=1), Norm(6), nn.ReLU(True), Conv(6, 6, 3, 2, groups=2), Norm(6), nn.SiLU(True)]
    net = kit.lively(nn.Sequential(*layers, Conv(6, 4, 1), kit.Mean()))
    check(kit, net, torch.randn(4, 3, *[9] * axes, dtype=torch.float64), torch.arange(4))


TOKENS = {
    "attention": lambda k: [k.Attention(), k.Attention()],
    "attention with dropout": lambda k: [k.Attention(dropout=0.2)],
    "torch's own encoder": lambda k: [nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True)],
    "torch's own encoder, norm first": lambda k: [nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=True)],
    "a linear twice": lambda k: (lambda a: [a, nn.ReLU(), a])(nn.Linear(8, 8)),
    "rms norm": lambda k: [k.Residual(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)))],
    "a chain that is computed again": lambda k: [nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)],
    "gated": lambda k: [Fn(lambda x, n, a, b, c: x + c(F.silu(a(y := n(x))) * b(y)), nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8))],
    "an in-place gate": lambda k: [Fn(lambda x, a, b: b(F.silu(a(x), inplace=True)), nn.Linear(8, 8), nn.Linear(8, 8))],
    "moved and computed again": lambda k: [Fn(lambda x, n, a, b: b(n(x).transpose(0, 1).reshape(-1, 8)).view(x.shape[1], x.shape[0], 8).transpose(0, 1) + a(n(x).roll(1, 1)), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8))],
    "a bilinear form": lambda k: [Fn(lambda x, a: x + (a(x) @ a(x).transpose(1, 2)).softmax(-1) @ x, nn.Linear(8, 8))],
    "a linear without input dimension two": lambda k: [Fn(lambda x, a: x + a(x.mean((0, 1))), nn.Linear(8, 8))],
    "lstm": lambda k: [Fn(lambda x, l: l(x)[0], nn.LSTM(8, 8, batch_first=True))],
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_tokens(kit, name, dtype):
    torch.manual_seed(4)
    net = kit.lively(nn.Sequential(nn.Linear(5, 8), *TOKENS[name](kit), nn.Linear(8, 4)))
    check(kit, net, torch.randn(3, 7, 5, dtype=dtype), torch.randn(3, 7, 4, dtype=dtype), dtype)


class Swish(torch.autograd.Function):
    """A function of the model's own, unseen by torch's function modes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


class OwnLinear(torch.autograd.Function):
    """One that calls a known operation inside."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


def _no_grad(x, a, b):
    with torch.no_grad():
        gate = F.relu(a(x))
    return x * gate + b(x)


def _checkpointed(x, a, n, b):
    return checkpoint(nn.Sequential(a, n, nn.ReLU(), b), x, use_reentrant=False)


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(8, 8) for _ in range(count)]


VECTORS = {
    "own function": Fn(lambda x, a, b: b(Swish.apply(a(x))), *linears(2)),
    "own function around a known one": Fn(lambda x, a, b: b(OwnLinear.apply(a(x), b.weight)), *linears(2)),
    "own function beside a norm": Fn(lambda x, a, n: n(y := a(x)) + Swish.apply(y), *linears(1), nn.BatchNorm1d(8)),
    "no_grad within": Fn(_no_grad, *linears(2)),
    "a checkpoint within": Fn(_checkpointed, *linears(1), nn.BatchNorm1d(8), *linears(1)),
    "detached": Fn(lambda x, a, b: b(a(x).detach()) + a(x), *linears(2)),
    "written into": Fn(lambda x, a, b: (y := a(x), y.__setitem__(0, 0.0), b(y))[2], *linears(2)),
    "scaled in place behind a smooth one": Fn(lambda x, a, b: b(F.gelu(a(x)).mul_(2.0)), *linears(2)),
    "scaled in place behind a norm": Fn(lambda x, a, n, b: b(n(a(x)).mul_(2.0)), *linears(1), nn.BatchNorm1d(8), *linears(1)),
    "a norm's sum in place": Fn(lambda x, a, n, b: b(n(y := a(x)).add_(y)), *linears(1), nn.BatchNorm1d(8), *linears(1)),
    "addmm": Fn(lambda x, a, b: b(torch.addmm(a.bias, x, a.weight.t())), *linears(2)),
    "einsum": Fn(lambda x, a, b: b(torch.einsum("bi,oi->bo", x, a.weight)), *linears(2)),
    "keywords": Fn(lambda x, a: F.linear(input=F.relu(input=x), weight=a.weight, bias=a.bias), *linears(1)),
    "clamped": Fn(lambda x, a, b: b(a(x).clamp_(0, 1)), *linears(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_odd_ways_to_write_a_network(kit, name):
    net = kit.lively(nn.Sequential(nn.Linear(8, 8), copy.deepcopy(VECTORS[name])))
    check(kit, net, torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64))


def test_nothing_is_left_behind(kit):
    """Planning keeps no tensor alive: neither while it looks nor afterwards."""
    net, (x, y) = kit.small_cnn(), kit.batch()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(3):
        for options in ({"method": "lossless"}, {"budget": 30_000}, {"budget": 30_000, "method": "asi"}):
            adaptation = adapt(net, (x, y), **options)
            kit.step(net, x, y)
            adaptation.undo()
            del adaptation
        counts.append(alive())
    assert counts[1] == counts[2]


def test_vectors_with_norms(kit):
    layers = [nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(True), nn.Linear(9, 9, bias=False), nn.BatchNorm1d(9)]
    net = kit.lively(nn.Sequential(*layers, nn.Hardtanh(), nn.Linear(9, 4)))
    check(kit, net, torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4)


def test_a_norm_on_tokens_behind_a_linear_is_not_folded_wrongly(kit):
    """BatchNorm1d takes [batch, channels, length]: its channels are not the last axis, where a linear has its own."""
    net = kit.lively(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)))
    check(kit, net, torch.randn(3, 8, 5, dtype=torch.float64), torch.randn(3, 8, 4, dtype=torch.float64))


def test_tied_weights(kit):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.relu(self.mix(self.embed(ids)))).mean(1)

    net = Tied()
    check(kit, net, torch.randint(0, 11, (4, 6)), torch.arange(4))


def test_an_input_that_wants_a_gradient(kit):
    net = kit.images(nn.MaxPool2d(2), conv()).double()
    x, y = kit.batch(dtype=torch.float64)
    wanted = x.clone().requires_grad_()
    reference = x.clone().requires_grad_()
    F.cross_entropy(kit.frozen(net)(reference), y).backward()
    kit.exactly(net, wanted, y, method="lossless")
    F.cross_entropy(net(wanted), y).backward()
    assert torch.allclose(wanted.grad, reference.grad, rtol=1e-10, atol=1e-14)


def test_batch_norms_in_train_mode(kit):
    net = kit.small_cnn().double()
    reference = copy.deepcopy(net)
    x, y = kit.batch(dtype=torch.float64)
    adaptation = kit.exactly(net, x, y, method="lossless", freeze_bn=False)
    assert all(torch.equal(a, b) for a, b in zip(reference.state_dict().values(), net.state_dict().values(), strict=True))
    want, got = kit.step(reference, x, y), kit.step(net, x, y)
    assert kit.apart(want, got) <= 1e-10
    assert all(
        torch.allclose(a, b, rtol=1e-12) for a, b in zip(reference.state_dict().values(), net.state_dict().values(), strict=True)
    )
    assert adaptation.measured.saved_bytes < adaptation.vanilla_saved


def test_random_numbers_are_those_of_torch(kit):
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.Linear(8, 8), nn.Dropout(0.1, inplace=True))
    x = torch.randn(6, 5)
    outputs, states = [], []
    for adapted in (False, True):
        if adapted:
            adapt(net, (x, None), method="lossless")
        torch.manual_seed(9)
        outputs.append(net(x).detach())
        states.append(torch.get_rng_state())
    assert torch.equal(*outputs)
    assert torch.equal(*states)


def test_the_exact_forms_keep_a_fraction(kit):
    x, y = kit.batch()
    adaptation = kit.exactly(kit.small_cnn(), x, y, method="lossless")
    assert adaptation.measured.saved_bytes * 1.8 < adaptation.vanilla_saved


@pytest.mark.slow
def test_random_networks(kit):
    """Held by test_budget for bytes; here: gradients of networks with everything switched on at once."""
    torch.manual_seed(0)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        names = [list(IMAGES)[int(i)] for i in torch.randint(0, len(IMAGES), (4,), generator=generator)]
        net = kit.images(*(layer for name in names for layer in IMAGES[name](kit)))
        x, y = kit.batch(3, 24, dtype=torch.float64)
        try:
            kit.frozen(net).double()(x)
        except RuntimeError:
            continue  # too small for its pools
        check(kit, net, x, y)
