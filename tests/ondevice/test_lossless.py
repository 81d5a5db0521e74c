"""The exact forms on tokens and vectors, and ways to write a network that the forms must not trip over."""

from __future__ import annotations

import copy
import dataclasses
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palmette.ondevice.adapt import adapt
from palmette.ondevice.hosvd import Hosvd
from palmette.ondevice.low_bit import LowBit

TOKENS = {
    "attention": lambda k: [k.Attention(), k.Attention()],
    "attention with dropout": lambda k: [k.Attention(dropout=0.2)],
    "torch's own encoder": lambda k: [nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True)],
    "torch's own encoder, norm first": lambda k: [nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=True)],
    "a linear twice": lambda k: [a := nn.Linear(8, 8), nn.ReLU(), a],
    "rms norm": lambda k: [k.Residual(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)))],
    "a chain that is computed again": lambda k: [
        nn.LayerNorm(8),
        nn.Linear(8, 16),
        nn.GELU(),
        nn.Linear(16, 8),
        nn.LayerNorm(8),
        nn.GELU(),
        nn.Linear(8, 8),
    ],
    "gated": lambda k: [
        k.Fn(
            lambda x, n, a, b, c: x + c(F.silu(a(y := n(x))) * b(y)),
            nn.LayerNorm(8),
            nn.Linear(8, 16),
            nn.Linear(8, 16),
            nn.Linear(16, 8),
        )
    ],
    "an in-place gate": lambda k: [
        k.Fn(lambda x, a, b: b(F.silu(a(x), inplace=True)), nn.Linear(8, 8), nn.Linear(8, 8))
    ],
    "moved and computed again": lambda k: [
        k.Fn(
            lambda x, n, a, b: (
                b(n(x).transpose(0, 1).reshape(-1, 8)).view(x.shape[1], x.shape[0], 8).transpose(0, 1)
                + a(n(x).roll(1, 1))
            ),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
        )
    ],
    "a bilinear form": lambda k: [
        k.Fn(lambda x, a: x + (a(x) @ a(x).transpose(1, 2)).softmax(-1) @ x, nn.Linear(8, 8))
    ],
    "a linear without input dimension two": lambda k: [k.Fn(lambda x, a: x + a(x.mean((0, 1))), nn.Linear(8, 8))],
    "lstm": lambda k: [k.Fn(lambda x, lstm: lstm(x)[0], nn.LSTM(8, 8, batch_first=True))],
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_tokens(kit, name, dtype):
    torch.manual_seed(4)
    net = kit.lively(nn.Sequential(nn.Linear(5, 8), *TOKENS[name](kit), nn.Linear(8, 4)))
    kit.check_exact(net, torch.randn(3, 7, 5, dtype=dtype), torch.randn(3, 7, 4, dtype=dtype), dtype)


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
    "own function": lambda k: k.Fn(lambda x, a, b: b(Swish.apply(a(x))), *linears(2)),
    "own function around a known one": lambda k: k.Fn(lambda x, a, b: b(OwnLinear.apply(a(x), b.weight)), *linears(2)),
    "own function beside a norm": lambda k: k.Fn(
        lambda x, a, n: n(y := a(x)) + Swish.apply(y), *linears(1), nn.BatchNorm1d(8)
    ),
    "no_grad within": lambda k: k.Fn(_no_grad, *linears(2)),
    "a checkpoint within": lambda k: k.Fn(_checkpointed, *linears(1), nn.BatchNorm1d(8), *linears(1)),
    "detached": lambda k: k.Fn(lambda x, a, b: b(a(x).detach()) + a(x), *linears(2)),
    "written into": lambda k: k.Fn(lambda x, a, b: (y := a(x), y.__setitem__(0, 0.0), b(y))[2], *linears(2)),
    "scaled in place behind a smooth one": lambda k: k.Fn(lambda x, a, b: b(F.gelu(a(x)).mul_(2.0)), *linears(2)),
    "scaled in place behind a norm": lambda k: k.Fn(
        lambda x, a, n, b: b(n(a(x)).mul_(2.0)), *linears(1), nn.BatchNorm1d(8), *linears(1)
    ),
    "a norm's sum in place": lambda k: k.Fn(
        lambda x, a, n, b: b(n(y := a(x)).add_(y)), *linears(1), nn.BatchNorm1d(8), *linears(1)
    ),
    "a computed bias": lambda k: k.Fn(lambda x, a, b: F.linear(a(x), b.weight, b.bias.tanh()), *linears(2)),
    "a computed bias before a norm": lambda k: k.Fn(
        lambda x, a, n: n(F.linear(x, a.weight, a.bias.tanh())), *linears(1), nn.BatchNorm1d(8)
    ),
    "addmm": lambda k: k.Fn(lambda x, a, b: b(torch.addmm(a.bias, x, a.weight.t())), *linears(2)),
    "einsum": lambda k: k.Fn(lambda x, a, b: b(torch.einsum("bi,oi->bo", x, a.weight)), *linears(2)),
    "keywords": lambda k: k.Fn(lambda x, a: F.linear(input=F.relu(input=x), weight=a.weight, bias=a.bias), *linears(1)),
    "clamped": lambda k: k.Fn(lambda x, a, b: b(a(x).clamp_(0, 1)), *linears(2)),
}


@pytest.mark.parametrize("name", VECTORS)
def test_odd_ways_to_write_a_network(kit, name):
    net = kit.lively(nn.Sequential(nn.Linear(8, 8), VECTORS[name](kit)))
    kit.check_exact(net, torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64))


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


@pytest.mark.parametrize("method", ["low_bit", "hosvd"])
@pytest.mark.parametrize("shape", [(6, 8), (3, 7, 8), (2, 3, 4, 8)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_a_layer_returns_may_be_written_into(kit, method, shape, bias):
    write = lambda x, a, b: b(F.relu(a(x).mul_(2.0), inplace=True)[..., :8].add_(1.0))
    net = nn.Sequential(nn.Linear(8, 8), kit.Fn(write, nn.Linear(8, 9, bias=bias), nn.Linear(8, 4)))
    x, y = torch.randn(shape), torch.randn(*shape[:-1], 4)
    codec = LowBit() if method == "low_bit" else Hosvd(ranks=(1,) * len(shape))
    plan = adapt(net, (x, y), method="lossless")
    plan.undo()
    everywhere = dataclasses.replace(plan.plan, codecs=dict.fromkeys(plan.plan.codecs, codec), stock=())
    before = net(x)
    adaptation = adapt(net, (x, y), plan=dataclasses.replace(everywhere, predicted_bytes=10**6))
    assert torch.allclose(net(x), before, atol=1e-6)
    kit.step(net, x, y)
    adaptation.undo()


def test_vectors_with_norms(kit):
    layers = [nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(True), nn.Linear(9, 9, bias=False), nn.BatchNorm1d(9)]
    net = kit.lively(nn.Sequential(*layers, nn.Hardtanh(), nn.Linear(9, 4)))
    kit.check_exact(net, torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4)


def test_a_norm_on_tokens_behind_a_linear_is_not_folded_wrongly(kit):
    """BatchNorm1d takes [batch, channels, length]: its channels are not the last axis, where a linear has its own."""
    net = kit.lively(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)))
    kit.check_exact(net, torch.randn(3, 8, 5, dtype=torch.float64), torch.randn(3, 8, 4, dtype=torch.float64))


def test_tied_weights(kit):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.relu(self.mix(self.embed(ids)))).mean(1)

    net = Tied()
    kit.check_exact(net, torch.randint(0, 11, (4, 6)), torch.arange(4))


def test_an_input_that_wants_a_gradient(kit):
    net = kit.images(nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1)).double()
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
    assert all(
        torch.equal(a, b) for a, b in zip(reference.state_dict().values(), net.state_dict().values(), strict=True)
    )
    want, got = kit.step(reference, x, y), kit.step(net, x, y)
    assert kit.apart(want, got) <= 1e-10
    assert all(
        torch.allclose(a, b, rtol=1e-12)
        for a, b in zip(reference.state_dict().values(), net.state_dict().values(), strict=True)
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
