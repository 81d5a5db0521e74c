"""The handle that `adapt` gives back, what it refuses, and that nothing is left behind."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from palmette.errors import InputError, PalmetteError, PlanError
from palmette.ondevice.adapt import adapt
from palmette.ondevice.install import is_adapted
from palmette.ondevice.plan import MemoryPlan


@pytest.fixture
def net(kit):
    return kit.small_cnn()


@pytest.fixture
def sample(kit):
    return kit.batch(8)


def test_what_is_refused(net, sample):
    with pytest.raises(InputError, match="pair"):
        adapt(net, sample[0])
    with pytest.raises(InputError, match="scope"):
        adapt(net, sample, scope="everything")
    with pytest.raises(PalmetteError, match="nothing"):
        adapt(net, sample, method="nothing")
    with pytest.raises(InputError, match="options"):
        adapt(net, sample, config={"rank": 1})
    adaptation = adapt(net, sample)
    with pytest.raises(InputError, match="already"):
        adapt(net, sample)
    adaptation.undo()
    with pytest.raises(InputError, match="undone already"):
        adaptation.undo()
    net.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        adapt(net, sample)
    assert not is_adapted(net)


def test_a_failed_adaptation_leaves_nothing(net, sample):
    with pytest.raises(PalmetteError):
        adapt(net, sample, budget=1, method="lossless")
    assert not is_adapted(net)
    assert "forward" not in net.__dict__
    assert all(m.training for m in net.modules())
    assert not any("train" in m.__dict__ for m in net.modules())
    adapt(net, sample)


def test_an_exception_in_forward_leaves_no_mode(net, sample):
    x, _ = sample
    adapt(net, sample)
    handle = net[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x)
    handle.remove()
    assert torch.overrides._get_current_function_mode_stack() == []
    layer = nn.Linear(4, 4)
    assert type(layer(torch.ones(2, 4)).grad_fn).__name__ == "AddmmBackward0"


def test_a_plan_made_before(kit, net, sample, tmp_path):
    x, y = sample
    first = kit.exactly(net, x, y, budget=30_000)
    first.save(tmp_path / "plan.json")
    want = kit.step(net, x, y)
    first.undo()
    text = (tmp_path / "plan.json").read_text()
    again = kit.exactly(net, x, y, plan=text)
    assert again.plan == first.plan == MemoryPlan.from_json(text)
    assert kit.apart(want, kit.step(net, x, y)) < 1e-6
    again.undo()
    with pytest.raises(PlanError):
        adapt(nn.Sequential(nn.Conv2d(3, 4, 3), kit.Mean()), sample, plan=text)
    with pytest.raises(PlanError, match="larger"):
        adapt(net, (torch.cat([x, x]), torch.cat([y, y])), plan=text)
    assert not is_adapted(net)


def test_a_way_that_the_sample_did_not_take(kit):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.turn = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x):
            return self.right(x) if self.turn else self.left(x)

    net, x = Two(), torch.randn(3, 4)
    adapt(net, (x, x), method="lossless")
    net.turn = True
    with pytest.raises(PlanError, match="does not know"):
        net(x)


def test_the_report(net, sample):
    adaptation = adapt(net, sample, budget=30_000)
    text = adaptation.report()
    assert f"{adaptation.measured.saved_bytes:,} bytes" in text
    assert "Who holds what" in text
    figures = json.loads(json.dumps(adaptation.to_dict()))
    assert figures["predicted_bytes"] == figures["measured_saved_bytes"] <= 30_000


def test_other_losses_and_inputs(kit):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, left, right=None):
            return {"logits": self.b(torch.relu(self.a(left)) + right), "other": right}

    net, x = Two(), {"left": torch.randn(5, 4), "right": torch.randn(5, 4)}
    reference, y = copy.deepcopy(net), torch.arange(5) % 3
    smooth = lambda output, target: F.cross_entropy(output["logits"], target, label_smoothing=0.1)
    want = kit.step(reference, x, y, smooth)
    adaptation = kit.exactly(net, x, y, loss_fn=smooth, method="lossless")
    assert kit.apart(want, kit.step(net, x, y, smooth)) < 1e-5
    adaptation.undo()
    pair = (x["left"], x["right"])
    kit.exactly(net, pair, y, loss_fn=smooth, method="lossless")
    assert kit.apart(want, kit.step(net, pair, y, smooth)) < 1e-5
    with pytest.raises(InputError, match="larger"):
        net(torch.zeros(6, 4), right=torch.zeros(6, 4))


def test_a_reentrant_checkpoint_inside_the_model_is_refused_where_it_would_break_the_budget():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
            self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

        def forward(self, x):
            return self.last(checkpoint(self.body, torch.relu(self.first(x)), use_reentrant=True))

    with pytest.raises(InputError, match="use_reentrant=False"):
        adapt(Inside(), (torch.randn(8, 8), torch.arange(8) % 4), budget=600)


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def batch():
    return torch.randn(8, 3, 8, 8), torch.arange(8) % 4


def test_a_hook_that_comes_between_a_layer_and_its_norm_is_refused_not_ignored():
    model, (x, y) = normed(), batch()
    adapt(model, (x, y))
    model[0].register_forward_hook(lambda module, given, output: output.clone())
    with pytest.raises(PlanError, match="batch norm"):
        model(x)


def test_norms_follow_the_last_wish_when_the_plan_is_taken_off():
    model, (x, y) = normed().train(), batch()
    adaptation = adapt(model, (x, y))
    model.eval()
    adaptation.undo()
    assert not any(module.training for module in model.modules())


def test_a_plan_given_back_is_held_against_the_model_and_the_budget():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.l = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 4)
            self.both = False

        def forward(self, x):
            y = self.a(x)
            z = self.b(y)
            return self.l(torch.relu(z + y if self.both else z).flatten(1))

    (x, y), first, second = batch(), Other(), Other()
    second.both = True
    adaptation = adapt(first, (x, y))
    plan = adaptation.plan
    with pytest.raises(PlanError, match="another model"):
        adapt(second, (x, y), plan=plan)
    adaptation.undo()
    with pytest.raises(PalmetteError, match="the budget is 100"):
        adapt(first, (x, y), budget=100, plan=plan)
    with pytest.raises(PlanError, match="no plan"):
        adapt(first, (x, y), plan={})


@pytest.mark.parametrize("loss", [lambda out, y: out, lambda out, y: out.mean().detach(), lambda out, y: None])
def test_a_loss_that_is_none_is_named(loss):
    with pytest.raises(InputError):
        adapt(normed(), batch(), loss, budget="4KiB")


def test_more_arguments_than_the_sample_had_do_not_let_a_larger_batch_in():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6, 4)

        def forward(self, x, scale=None):
            return self.l(x) if scale is None else self.l(x) * scale

    model = Two()
    adapt(model, (torch.randn(8, 6), torch.arange(8) % 4))
    with pytest.raises(InputError, match="larger"):
        model(torch.randn(64, 6), torch.ones(()))
