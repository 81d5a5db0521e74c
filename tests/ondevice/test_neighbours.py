"""An adapted model among what surrounds training: one test for each neighbour."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from palmette.errors import BudgetError, InputError, PalmetteError
from palmette.ondevice.adapt import adapt
from palmette.ondevice.install import is_adapted

JOB = Path(__file__).with_name("ddp_job.py")


@pytest.fixture
def net(kit):
    return kit.small_cnn()


@pytest.fixture
def sample(kit):
    return kit.batch(8)


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_gradient_accumulation(kit, net, sample):
    x, y = sample
    reference = kit.frozen(net)
    adapt(net, sample, method="lossless")
    for model in (net, reference):
        for half in (slice(0, 4), slice(4, 8)):
            F.cross_entropy(model(x[half]), y[half]).backward()
    assert kit.apart((0.0, gradients(reference)), (0.0, gradients(net))) < 1e-5


def test_clipping(kit, net, sample):
    x, y = sample
    reference = kit.frozen(net)
    adapt(net, sample, method="lossless")
    norms = []
    for model in (net, reference):
        F.cross_entropy(model(x), y).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert kit.apart((0.0, gradients(reference)), (0.0, gradients(net))) < 1e-5


@pytest.mark.parametrize(
    "options", [{"method": "lossless"}, {"budget": 40_000}, {"budget": 40_000, "method": "low_bit"}]
)
def test_autocast(kit, net, sample, options):
    x, y = sample
    reference = kit.frozen(net)
    full = kit.step(reference, x, y)

    def loss(output, target):
        return F.cross_entropy(output.float(), target)

    with torch.autocast("cpu", torch.bfloat16):
        want = kit.step(reference, x, y, loss)
    adaptation = kit.exactly(net, x, y, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = kit.step(net, x, y, loss)
        kept = adaptation.measure().saved_bytes
    assert kept <= adaptation.plan.predicted_bytes
    for name, gradient in want[1].items():
        if got[1][name] is not None:
            assert got[1][name].dtype == gradient.dtype
    if options == {"method": "lossless"}:
        distance = lambda a, b: sum(float((a[1][n] - b[1][n]).norm() / a[1][n].norm()) for n in a[1])
        assert distance(full, got) < 2 * distance(full, want) + 1e-3


def test_autocast_of_a_transformer(kit):
    net, x, y = kit.small_transformer(), torch.randn(4, 6, 5), torch.randn(4, 6, 4)
    reference = copy.deepcopy(net)
    adaptation = kit.exactly(net, x, y, method="lossless")
    with torch.autocast("cpu", torch.bfloat16):
        want, got = kit.step(reference, x, y), kit.step(net, x, y)
        assert adaptation.measure().saved_bytes <= adaptation.plan.predicted_bytes
    assert got[0] == pytest.approx(want[0], rel=1e-2)
    assert all(float((got[1][n] - g).norm()) <= 0.05 * float(g.norm()) + 1e-4 for n, g in want[1].items())


def test_half_precision_weights(kit):
    net = kit.small_transformer().bfloat16()
    x, y = torch.randn(4, 6, 5).bfloat16(), torch.randn(4, 6, 4).bfloat16()
    want = kit.step(net, x, y)
    exact = kit.exactly(net, x, y, method="lossless")
    got = kit.step(net, x, y)
    assert all(float((got[1][n] - g).norm()) <= 0.02 * float(g.norm()) + 1e-4 for n, g in want[1].items())
    budget = exact.measured.saved_bytes * 9 // 10
    exact.undo()
    for method in ("auto", "low_bit", "asi"):
        try:
            adaptation = kit.exactly(net, x, y, budget=budget, method=method)
        except BudgetError as error:
            adaptation = kit.exactly(net, x, y, budget=kit.smallest(error), method=method)
        assert all(g is None or g.dtype == torch.bfloat16 for g in kit.step(net, x, y)[1].values())
        adaptation.undo()


@pytest.mark.parametrize("budget", [None, 30_000])
def test_a_copy_trains_by_itself(kit, net, sample, budget):
    x, y = sample
    adaptation = adapt(net, sample, budget=budget)
    copied = copy.deepcopy(net)
    assert is_adapted(copied)
    want = kit.step(net, x, y)
    assert kit.apart(want, kit.step(copied, x, y)) == 0.0
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], 0.5)
    F.cross_entropy(copied(x), y).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before.values(), copied.state_dict().values(), strict=True))
    assert all(p.grad is None for p in net.parameters())
    adaptation.undo()
    assert is_adapted(copied)
    F.cross_entropy(copied(x), y).backward()


def test_state_dict(kit, net, sample):
    plain = kit.small_cnn()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    adapt(net, sample, budget=30_000)
    assert list(net.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    net.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.allclose(kit.frozen(plain)(sample[0]), net(sample[0]), atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("budget", [None, 30_000])
def test_checkpoint_around_the_model(kit, net, sample, reentrant, budget):
    x, y = sample
    adapt(net, sample, budget=budget)
    want = kit.step(net, x, y)
    F.cross_entropy(checkpoint(net, x.clone().requires_grad_(), use_reentrant=reentrant), y).backward()
    assert kit.apart(want, (0.0, gradients(net) | {n: None for n, g in want[1].items() if g is None})) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_adapted_part_of_a_model_under_checkpoint(kit, sample, reentrant):
    x, y = sample
    inner = kit.lively(nn.Sequential(*kit.conv_bn(6, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.SiLU()))
    stem, head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
    whole = nn.ModuleList([stem, inner, head])

    def forward(way):
        return head(way(stem(x)).mean((2, 3)))

    adapt(inner, (stem(x).detach().requires_grad_(), None), method="lossless")
    F.cross_entropy(forward(inner), y).backward()
    want = gradients(whole)
    whole.zero_grad()
    F.cross_entropy(forward(lambda z: checkpoint(inner, z, use_reentrant=reentrant)), y).backward()
    assert kit.apart((0.0, want), (0.0, gradients(whole))) < 1e-6


def test_a_model_that_checkpoints_within(kit, sample):
    class Within(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(*kit.conv_bn(3, 6), nn.ReLU(inplace=True))
            self.body = nn.Sequential(*kit.conv_bn(6, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.SiLU())
            self.head = nn.Sequential(nn.Conv2d(6, 4, 1), kit.Mean())

        def forward(self, x):
            return self.head(checkpoint(self.body, self.stem(x), use_reentrant=False))

    x, y = sample
    net = kit.lively(Within())
    want = kit.step(kit.frozen(net), x, y)
    adaptation = kit.exactly(net, x, y, method="lossless")
    assert kit.apart(want, kit.step(net, x, y)) < 1e-5
    adaptation.undo()
    kit.exactly(net, x, y, budget=adaptation.plan.predicted_bytes * 3 // 4)
    kit.step(net, x, y)


def test_double_backward_is_refused(kit, net, sample):
    x, y = sample
    adapt(net, sample, method="lossless")
    weight = net[0].weight
    with pytest.raises(PalmetteError, match="differentiated twice"):
        torch.autograd.grad(F.cross_entropy(net(x), y), weight, create_graph=True)


def test_functional_transforms_are_refused(net, sample):
    x, y = sample
    adapt(net, sample, method="lossless")
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights, inputs, target):
        return F.cross_entropy(torch.func.functional_call(net, weights, (inputs,)), target)

    with pytest.raises(InputError, match=r"torch\.func"):
        torch.func.grad(loss)(parameters, x, y)
    with pytest.raises(InputError, match=r"torch\.func"):
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x[:, None], y[:, None])


def test_another_type(kit, net, sample):
    x, y = sample
    adapt(net, sample, budget=30_000)
    single = kit.step(net, x, y)
    net.to(torch.float64)
    double = kit.step(net, x.double(), y)
    assert all(g is None or g.dtype == torch.float64 for g in double[1].values())
    assert double[0] == pytest.approx(single[0], rel=1e-5)
    net.to(torch.float32)
    kit.step(net, x, y)


def test_train_and_eval_leave_frozen_norms_alone(kit, net, sample):
    x, _ = sample
    adaptation = adapt(net, sample, method="lossless")
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    statistics = [n.running_mean.clone() for n in norms]
    net.train()
    assert not any(n.training for n in norms)
    net(x)
    net.eval()
    net.train()
    net(x)
    assert all(torch.equal(a, n.running_mean) for a, n in zip(statistics, norms, strict=True))
    adaptation.undo()
    assert all(n.training for n in norms)
    net.eval()
    assert not any(n.training for n in norms)


def test_norms_stay_in_training_where_asked(net, sample):
    x, _ = sample
    adapt(net, sample, method="lossless", freeze_bn=False)
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    net(x)
    assert not torch.equal(before, norm.running_mean)


def test_evaluation(kit, net, sample):
    x, _ = sample
    plain = kit.frozen(net)
    adapt(net, sample, budget=30_000)
    with torch.no_grad():
        assert torch.equal(net(x), plain(x))
    with torch.inference_mode():
        assert torch.equal(net(x), plain(x))


@pytest.mark.parametrize("options", [{"method": "lossless"}, {"budget": 40_000}, {"budget": 40_000, "method": "hosvd"}])
def test_training_goes_on(kit, net, sample, options):
    x, y = sample
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    adaptation = adapt(net, sample, **options)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert adaptation.measure().saved_bytes <= adaptation.plan.predicted_bytes


def test_a_frozen_prefix(kit, net, sample):
    x, y = sample
    for p in list(net.parameters())[:12]:
        p.requires_grad_(False)
    want = kit.step(kit.frozen(net), x, y)
    whole = adapt(kit.small_cnn(), sample, method="lossless")
    adaptation = kit.exactly(net, x, y, method="lossless")
    assert kit.apart(want, kit.step(net, x, y)) < 1e-5
    assert adaptation.measured.saved_bytes < whole.measured.saved_bytes
    adaptation.undo()
    assert sum(not p.requires_grad for p in net.parameters()) == 12


def test_only_the_biases(kit, net, sample):
    x, y = sample
    for name, p in net.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    want = kit.step(kit.frozen(net), x, y)
    adaptation = kit.exactly(net, x, y, method="lossless")
    assert kit.apart(want, kit.step(net, x, y)) < 1e-5
    assert adaptation.measured.saved_bytes < 0.2 * adaptation.vanilla_saved


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_two_processes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(JOB), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, mean in found[0]["mean"].items():
        assert torch.equal(found[0]["ddp"][name], found[1]["ddp"][name])
        assert torch.allclose(found[0]["ddp"][name], mean, rtol=1e-4, atol=1e-7)
    assert found[0]["kept"] == found[0]["predicted"]
