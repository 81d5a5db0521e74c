"""The healing loop: what it learns, what it leaves behind, and what it refuses."""

from __future__ import annotations

import copy
import io
import itertools
import math
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import fx, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from palmette.errors import DataError, InputError, TrainingError
from palmette.train import HealConfig, evaluate, heal

FAST = HealConfig(epochs=2, lr=0.05)


@pytest.mark.parametrize("settings", [{"lr": 0.1}, {"lr": 0.02, "optimizer": "adamw"}], ids=["sgd", "adamw"])
def test_it_learns(nets, settings):
    model, loader = nets.net(), nets.loader(300)
    before = evaluate(model, loader).accuracy
    history = heal(model, loader, HealConfig(epochs=15, **settings))
    assert evaluate(model, loader).accuracy > max(0.9, before)
    assert [entry["epoch"] for entry in history] == list(range(15))
    assert history[-1]["loss"] < 0.75 * history[0]["loss"]
    assert all(set(entry) == {"epoch", "loss", "lr"} for entry in history)


def test_it_is_plain_training(nets):
    """Without dropout and shuffling, the same as a loop written out by hand, up to rounding."""
    loader = nets.loader(shuffle=False)
    config = HealConfig(epochs=3, lr=0.1, weight_decay=0.01, momentum=0.8, clip=0.5, warmup=0.3)
    model, twin = nets.net(dropout=0.0), nets.net(dropout=0.0)
    history = heal(model, loader, config)
    decayed, free = [p for p in twin.parameters() if p.dim() > 1], [p for p in twin.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.8, nesterov=True)
    steps, losses = 18, []
    for epoch in range(3):
        for step, (x, y) in enumerate(loader):
            for group in optimizer.param_groups:
                done = (6 * epoch + step + 0.5) / steps
                cosine = 0.5 * (1 + math.cos(math.pi * (done - 0.3) / 0.7))
                group["lr"] = 0.1 * (done / 0.3 if done < 0.3 else cosine)
            loss = F.cross_entropy(twin(x), y)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
    for own, expected in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-7)
    assert [entry["loss"] for entry in history] == pytest.approx([sum(losses[i : i + 6]) / 6 for i in (0, 6, 12)])
    assert history[-1]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])


def test_modes_states_and_teacher_are_left_in_order(nets):
    model, teacher, loader = nets.net(), nets.net(1), nets.loader()
    teacher[3].eval()
    modes, before = [module.training for module in teacher.modules()], nets.weights(teacher)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    heal(model, loader, HealConfig(epochs=1, distill=0.5), teacher=teacher)
    assert not any(module.training for module in model.modules())
    assert [module.training for module in teacher.modules()] == modes
    assert nets.equal(nets.weights(teacher), before)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_a_repeat_is_bit_identical_and_the_seed_and_label_count(nets):
    loader = nets.loader()

    def result(**options):
        model = nets.net()
        heal(model, loader, FAST, **options)
        return nets.weights(model)

    first = result()
    torch.rand(7)
    assert nets.equal(result(), first)
    assert not nets.equal(result(seed=1), first)
    assert not nets.equal(result(label="other"), first)


def test_batches_do_not_depend_on_what_the_model_draws(nets):
    seen = []

    class Watched(nn.Module):
        def __init__(self, dropout):
            super().__init__()
            self.net = nets.net(dropout=dropout)

        def forward(self, x):
            if self.training:
                seen.append(x.clone())
            return self.net(x)

    for dropout in (0.0, 0.5):
        heal(Watched(dropout), nets.loader(), FAST)
    half = len(seen) // 2
    assert half == 12
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert not torch.equal(seen[0], seen[6])


def test_no_epochs_is_a_no_op(nets):
    model = nets.net()
    before = nets.weights(model)
    assert heal(model, nets.loader(), HealConfig(epochs=0)) == []
    assert nets.equal(nets.weights(model), before)
    assert not model.training


def test_a_graph_module_keeps_its_batch_norm_alive(nets):
    model = nets.net()
    graph = fx.symbolic_trace(copy.deepcopy(model))
    plain, traced = heal(model, nets.loader(), FAST), heal(graph, nets.loader(), FAST)
    assert plain == traced
    assert nets.equal(nets.weights(model), nets.weights(graph))
    assert int(model[1].num_batches_tracked) == 12


@pytest.mark.parametrize("precision", ["auto", "64-true", "bf16-mixed"])
def test_precisions(nets, precision):
    model, dataset = nets.net(), nets.data()
    dtype = torch.float64 if precision != "bf16-mixed" else torch.float32
    x, y = dataset.tensors
    loader = DataLoader(TensorDataset(x.to(dtype), y), batch_size=10)
    history = heal(model.to(dtype), loader, HealConfig(epochs=3, lr=0.1, precision=precision))
    assert history[-1]["loss"] < history[0]["loss"]
    assert model[0].weight.dtype == dtype
    assert torch.get_default_dtype() == torch.float32


def test_frozen_parameters_stay(nets):
    model = nets.net()
    model[0].weight.requires_grad_(False)
    before = nets.weights(model)
    heal(model, nets.loader(), FAST)
    after = nets.weights(model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["4.weight"], after["4.weight"])


def test_inputs_may_be_dicts_tuples_and_labels_narrow(nets):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nets.net()

        def forward(self, a, b):
            return {"logits": self.net(a + b), "other": a}

    x, y = nets.data().tensors
    halves = list(zip(x.split(10), y.split(10), strict=True))
    as_tuples = [((a / 2, a / 2), b.to(torch.uint8)) for a, b in halves]
    as_dicts = [{"a": a / 2, "b": a / 2, "labels": b.int()} for a, b in halves]
    first, second = Two(), Two()
    assert heal(first, as_tuples, FAST) == heal(second, as_dicts, FAST)
    assert nets.equal(nets.weights(first), nets.weights(second))


def test_distillation_follows_the_teacher_not_the_labels(nets):
    teacher, model = nets.net(1), nets.net(2, dropout=0.0)
    heal(teacher, nets.loader(300), HealConfig(epochs=10, lr=0.1))
    x, _ = nets.data(300).tensors
    wrong = DataLoader(TensorDataset(x, torch.zeros(300, dtype=torch.long)), batch_size=20, shuffle=True)
    heal(model, wrong, HealConfig(epochs=15, lr=0.1, distill=1.0), teacher=teacher)
    agreement = (model(x).argmax(1) == teacher.eval()(x).argmax(1)).float().mean()
    assert agreement > 0.9


def test_own_loss_and_extra_terms(nets):
    loader, model, twin = nets.loader(), nets.net(), nets.net()
    seen = []

    def term(network, inputs, output):
        seen.append((network, tuple(inputs.shape), tuple(output.shape)))
        return 0.5 * network[4].weight.square().sum()

    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    heal(model, loader, FAST, loss_fn=smooth, loss_terms=[term])
    heal(twin, loader, FAST, loss_fn=smooth)
    assert model[4].weight.norm() < twin[4].weight.norm()
    assert seen[0] == (model, (10, 5), (10, 3))
    regression = [(torch.ones(4, 5), torch.full((4, 3), 2.0))]
    history = heal(nets.net(dropout=0.0), regression * 5, HealConfig(epochs=10, lr=0.05), loss_fn=nn.MSELoss())
    assert history[-1]["loss"] < 0.1 * history[0]["loss"]


def test_a_caller_s_fabric(nets):
    model, twin = nets.net(), nets.net()
    heal(model, nets.loader(), FAST, fabric=Fabric(accelerator="cpu", devices=1))
    heal(twin, nets.loader(), FAST)
    assert nets.equal(nets.weights(model), nets.weights(twin))
    wanted, single = HealConfig(precision="64-true"), Fabric(accelerator="cpu", devices=1)
    with pytest.raises(InputError, match=r"32-true.*64-true"):
        heal(model, nets.loader(), wanted, fabric=single)


# ---- what it refuses -------------------------------------------------------------------------------------------------


def test_nan_names_epoch_and_step(nets):
    x, y = nets.data().tensors
    x = x.clone()
    x[35] = math.nan
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    model = nets.net()
    with pytest.raises(TrainingError, match=r"loss is nan \(at heal-3, epoch 0, step 3\)"):
        heal(model, loader, FAST, label="heal-3")
    assert all(torch.isfinite(tensor).all() for name, tensor in model.named_parameters())
    assert not model.training


def test_weights_that_break_in_the_last_step_are_told(nets):
    class Cliff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    with pytest.raises(TrainingError, match="not finite after the last step"):
        heal(nets.net(), nets.loader(10), HealConfig(epochs=1), loss_fn=lambda z, y: F.cross_entropy(Cliff.apply(z), y))


@pytest.mark.parametrize("label", [3, 77, -1])
@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy, nn.CrossEntropyLoss()], ids=["own", "function", "module"])
def test_labels_out_of_range(nets, label, loss_fn):
    x, y = nets.data().tensors
    y = y.clone()
    y[15] = label
    with pytest.raises(DataError, match=rf"Label {label} is out of range .*epoch 0, step 1.*3 classes"):
        heal(nets.net(), DataLoader(TensorDataset(x, y), batch_size=10), FAST, loss_fn=loss_fn)


class Stream(IterableDataset):
    def __init__(self, tensors):
        self.tensors = tensors

    def __iter__(self):
        return zip(*self.tensors, strict=True)


def test_a_loader_of_unknown_length(nets):
    stream = DataLoader(Stream(nets.data().tensors), batch_size=10)
    assert len(heal(nets.net(), stream, FAST)) == 2


class Unseedable(TensorDataset):
    count = itertools.count()

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + next(self.count), y


def empty_loaders(nets):
    return [[], DataLoader(TensorDataset(torch.zeros(0, 5), torch.zeros(0).long())), nets.loader(5, drop_last=True)]


@pytest.mark.parametrize("index", range(3))
def test_an_empty_loader(nets, index):
    for action in (lambda loader: heal(nets.net(), loader, FAST), lambda loader: evaluate(nets.net(), loader)):
        with pytest.raises(DataError, match="loader is empty"):
            action(empty_loaders(nets)[index])


def test_an_empty_stream(nets):
    with pytest.raises(DataError, match="loader is empty"):
        heal(nets.net(), DataLoader(Stream((torch.zeros(0, 5), torch.zeros(0)))), FAST)


def test_loaders_that_cannot_be_repeated(nets):
    model = nets.net()
    before = nets.weights(model)
    with pytest.raises(DataError, match="its own iterator"):
        heal(model, iter(nets.loader()), FAST)
    with pytest.raises(DataError, match="cannot be seeded"):
        heal(model, DataLoader(Unseedable(*nets.data().tensors), batch_size=10), FAST)
    with pytest.raises(DataError, match="in_order"):
        heal(model, nets.loader(num_workers=1, in_order=False), FAST)
    with pytest.raises(DataError, match="no loader"):
        heal(model, 3, FAST)
    with pytest.raises(DataError, match="not understood"):
        heal(model, [torch.zeros(3, 5)], FAST)
    assert nets.equal(nets.weights(model), before)


def test_models_that_cannot_be_trained(nets):
    model = nets.net()
    with pytest.raises(InputError, match="no parameter to train"):
        heal(nn.ReLU(), nets.loader(), FAST)
    with pytest.raises(InputError, match="needs a teacher"):
        heal(model, nets.loader(), HealConfig(distill=0.5))
    with pytest.raises(InputError, match="teacher is the model itself"):
        heal(model, nets.loader(), HealConfig(distill=0.5), teacher=model)
    with pytest.raises(InputError, match="differ in shape"):
        heal(model, nets.loader(), HealConfig(distill=0.5), teacher=nn.Linear(5, 4))


def test_batches_of_one_sample_are_left_out_with_a_warning(nets):
    model = nets.net()
    with pytest.warns(UserWarning, match="2 batches of one sample were left out"):
        heal(model, nets.loader(21), FAST)
    assert int(model[1].num_batches_tracked) == 4
    with pytest.raises(DataError, match="empty"):
        heal(nets.net(), nets.loader(5, batch_size=1), FAST)
    heal(nn.Linear(5, 3), nets.loader(5, batch_size=1), FAST)  # no batch norm, no objection


# ---- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("forced", "bars"), [("1", True), ("0", False), (None, False)])
def test_progress_only_on_a_terminal_or_when_forced(nets, monkeypatch, capsys, forced, bars):
    monkeypatch.delenv("PALMETTE_PROGRESS", raising=False)
    if forced is not None:
        monkeypatch.setenv("PALMETTE_PROGRESS", forced)
    heal(nets.net(), nets.loader(), FAST, label="round-7")
    out, err = capsys.readouterr()
    assert out == ""
    assert ("round-7" in err) == bars
    assert bars or err == ""


def test_progress_on_a_terminal(nets, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("PALMETTE_PROGRESS", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    heal(nets.net(), nets.loader(), FAST, label="round-8")
    assert "round-8" in sys.stderr.getvalue()
