"""A measured training step leaves nothing behind; its peak is the allocator's, and that of published figures."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from palmette import compat
from palmette.errors import MissingDependency
from palmette.meter.training import TrainingMemory, is_measuring, measure_training

MIB = 2**20


# ---- the step leaves nothing behind ----------------------------------------------------------------------------------


class Changes(nn.Module):
    """Has everything that a step could change: statistics, random numbers, a new buffer, one that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("expanded", torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        self.calls = self.calls + 1
        self.register_buffer("late", x.detach(), persistent=False)
        return self.layers(x * self.expanded)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_isleft_as_found(raises: bool, training: bool) -> None:
    def fails(output: Tensor, y: Any) -> Tensor:
        raise ZeroDivisionError

    model = Changes().train(training)
    model.layers[0].weight.grad = torch.randn(6, 4)
    model.layers[3].requires_grad_(False)
    x = torch.randn(5, 4, requires_grad=True)
    (x * 2).sum().backward()
    grads = [p.grad for p in model.parameters()] + [x.grad]
    values = [None if g is None else g.clone() for g in grads]
    buffers, state = dict(model.named_buffers()), copy.deepcopy(model.state_dict())
    structure = repr([sorted(vars(m)) + [len(m._forward_hooks), len(m._forward_pre_hooks)] for m in model.modules()])
    generators = torch.get_rng_state(), random.getstate()

    if raises:
        with pytest.raises(ZeroDivisionError):
            measure_training(model, x, loss=fails)
    else:
        measure_training(model, x)

    assert not is_measuring()
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    after = [p.grad for p in model.parameters()] + [x.grad]
    assert all(a is b for a, b in zip(after, grads, strict=True))
    assert all(v is None or torch.equal(a, v) for a, v in zip(after, values, strict=True))
    assert {name: id(b) for name, b in model.named_buffers()} == {name: id(b) for name, b in buffers.items()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {m.training for m in model.modules()} == {training}
    assert structure == repr(
        [sorted(vars(m)) + [len(m._forward_hooks), len(m._forward_pre_hooks)] for m in model.modules()]
    )


def test_gradients_that_were_there_and_disabled_gradients_change_nothing() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), torch.randn(5, 4), torch.randint(3, (5,))
    fresh = measure_training(model, x, y)
    F.cross_entropy(model(x), y).backward()
    assert measure_training(model, x, y) == fresh
    with torch.no_grad():
        assert measure_training(model, x, y) == fresh
    with torch.inference_mode():
        assert measure_training(model, x, y) == fresh


def test_hooks_are_removed_after_a_failure_inside_a_module() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(5, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure_training(model, torch.randn(2, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not is_measuring()
    assert all(p.grad is None for p in model.parameters())


# ---- the peak --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.c, self.head = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(self.a(x)), inplace=True)
        x = x + F.max_pool2d(self.c(x), 3, 1, 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10))


def transformer() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Flatten(), nn.Linear(320, 10))


def separable() -> nn.Module:
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU6(inplace=True), nn.Conv2d(16, 16, 3, padding=1, groups=16)]
    second = [nn.BatchNorm2d(16), nn.Hardswish(), nn.MaxPool2d(2), nn.Dropout(0.3), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(16 * 64, 10))


NETWORKS = [
    (perceptron, (256, 64)),
    (Residual, (16, 3, 32, 32)),
    (transformer, (8, 10, 32)),
    (separable, (8, 3, 16, 16)),
]
networks = pytest.mark.parametrize(("build", "shape"), NETWORKS)


def allocated(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """The highest sum of the CPU allocator's events in a plain step, above inputs and target."""

    def step() -> None:
        output = model(x)
        loss = F.cross_entropy(output, y)
        loss.backward()

    step()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    model.zero_grad()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak + x.nbytes + y.nbytes


@networks
def test_the_peak_is_the_allocators_but_for_scratch_space(build: Callable[[], nn.Module], shape: Any) -> None:
    model, x, y = build(), torch.randn(shape), torch.randint(5, shape[:1])
    measured, real = measure_training(model, x, y).peak_bytes, allocated(model, x, y)
    assert measured <= real <= 1.01 * measured


@networks
@pytest.mark.parametrize("training", [True, False])
def test_fake_tensors_give_the_same_bytes(build: Callable[[], nn.Module], shape: Any, training: bool) -> None:
    def measured() -> TrainingMemory:
        return measure_training(build().train(training), torch.randn(shape), torch.randint(5, shape[:1]))

    real = measured()
    with FakeTensorMode():
        assert measured() == real


@pytest.mark.parametrize(
    ("name", "saved", "peak", "first"),
    [("resnet18", 169.2, 196.3, ("batch_norm", 0.448)), ("mobilenet_v2", 596.6, 600.7, ("conv2d", 0.346))],
)
def test_known_networks_need_what_was_measured_elsewhere(name: str, saved: float, peak: float, first: Any) -> None:
    try:
        models = compat.torchvision().models
    except MissingDependency:
        pytest.skip("torchvision is not installed")
    with FakeTensorMode():
        model = getattr(models, name)().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        x = torch.randn(8, 3, 224, 224)
        memory = measure_training(model, x, torch.randint(1000, (8,)))
        inputs = x.untyped_storage().nbytes()
    assert memory.forward_saved_bytes / MIB == pytest.approx(saved, abs=0.1)
    assert (memory.peak_bytes - inputs) / MIB == pytest.approx(peak, abs=0.1)  # that count left the inputs out
    operation, _, share = memory.by_operation()[0]
    assert (operation, share) == (first[0], pytest.approx(first[1], abs=0.001))
