"""Evaluation: what it counts, in which order, and what it leaves as it was."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from palmette.errors import DataError, InputError
from palmette.stats import mean_interval, wilson_interval
from palmette.train import Evaluation, evaluate


def test_against_a_plain_count(nets):
    model, dataset = nets.net(), nets.data(57)
    x, y = dataset.tensors
    found = evaluate(model, DataLoader(dataset, batch_size=10))
    with torch.no_grad():
        logits = model.eval()(x)
    right = logits.argmax(1) == y
    assert found.n == 57
    assert "correct" not in repr(found)  # one value per sample would bury the rest
    assert found.correct.tolist() == right.tolist()
    assert found.correct.dtype == np.bool_
    assert found.accuracy == pytest.approx(right.double().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert found.interval == wilson_interval(int(right.sum()), 57)


def test_a_shuffling_loader_shows_every_network_the_same_order(nets):
    loader = nets.loader(60, generator=torch.Generator())
    torch.rand(3)
    first = evaluate(nets.net(), loader)
    list(loader)
    assert evaluate(nets.net(), loader).correct.tolist() == first.correct.tolist()
    straight = evaluate(nets.net(), nets.loader(60, shuffle=False)).correct.tolist()
    assert first.correct.tolist() != straight
    assert sum(first.correct) == sum(straight)


def test_nothing_is_changed(nets):
    model, loader = nets.net().train(), nets.loader()
    model[1].eval()
    before, state = nets.weights(model), torch.get_rng_state()
    evaluate(model, loader)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert nets.equal(nets.weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_own_metric_and_loss(nets):
    x = torch.randn(20, 5)
    loader = DataLoader(TensorDataset(x, torch.randn(20, 3)), batch_size=8)
    closeness = lambda z, y: torch.exp(-(z - y).square().mean(1))
    found = evaluate(nets.net(), loader, loss_fn=nn.MSELoss(), metric=closeness)
    assert found.correct.shape == (20,)
    assert found.correct.dtype == np.float64
    assert found.interval == mean_interval(found.correct)
    assert 0 < found.accuracy < 1
    with pytest.raises(InputError, match="a float for a batch of 8"):
        evaluate(nets.net(), loader, loss_fn=nn.MSELoss(), metric=lambda z, y: 0.5)
    with pytest.raises(InputError, match=r"Targets.*Pass metric"):
        evaluate(nets.net(), DataLoader(TensorDataset(x, torch.randn(20, 4))), loss_fn=lambda z, y: z.sum())


def test_dense_predictions_count_per_image():
    logits = torch.zeros(2, 3, 2, 2)
    logits[:, 1] = 1.0
    target = torch.tensor([[[1, 1], [0, -100]], [[1, 1], [1, 1]]])
    found = evaluate(nn.Identity(), [(logits, target)])
    assert found.correct.tolist() == pytest.approx([2 / 3, 1.0])
    assert found.n == 2


def test_class_probabilities_as_targets(nets):
    x, y = nets.data().tensors
    hard = evaluate(nets.net(), [(x, y)])
    soft = evaluate(nets.net(), [(x, F.one_hot(y, 3).float())])
    assert hard.correct.tolist() == soft.correct.tolist()
    assert hard.loss == pytest.approx(soft.loss)


def test_logits_that_are_not_finite_are_wrong():
    logits = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [math.inf, 0.0]])
    assert evaluate(nn.Identity(), [(logits, torch.zeros(3, dtype=torch.long))]).correct.tolist() == [
        True,
        False,
        False,
    ]


def test_a_part_of_the_batches(nets):
    loader = nets.loader(60, shuffle=False)
    assert evaluate(nets.net(), loader, max_batches=2).n == 20
    assert evaluate(nets.net(), iter(loader), max_batches=2).n == 20  # one pass is enough here
    with pytest.raises(InputError, match="max_batches"):
        evaluate(nets.net(), loader, max_batches=0)


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        (torch.tensor([0, 3]), "Label 3 is out of range .*batch 0.*3 classes"),
        (torch.tensor([[0], [1]]), r"shape \(2, 1\)"),
        (torch.tensor([0.0, 1.0]), "float32"),
        ([0, 1], "Labels cannot be used: list"),
    ],
)
def test_labels_that_do_not_fit(nets, target, fault):
    with pytest.raises(DataError, match=fault):
        evaluate(nets.net(), [(torch.zeros(2, 5), target)])


@pytest.mark.parametrize("metric", [None, lambda z, y: torch.rand(z.shape[0])])
def test_packing_keeps_everything(nets, metric):
    found = evaluate(nets.net(), nets.loader(57), metric=metric)
    again = Evaluation.unpack(json.loads(json.dumps(found.pack())))
    assert again.correct.dtype == found.correct.dtype
    assert again.correct.tolist() == found.correct.tolist()
    assert again.to_dict() == found.to_dict()
    assert again.interval == found.interval
