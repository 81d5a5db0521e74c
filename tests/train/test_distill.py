"""What an edited network learns from the dense one: class scores along the class axis, other outputs as they are."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from palmette.errors import InputError
from palmette.graph import capture
from palmette.train.distill import distillation_loss, imitation_loss
from palmette.train.loop import HealConfig, heal

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    """Scores [batch, tokens, vocabulary], as language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 30)

    def forward(self, x):
        return self.layer(x).reshape(len(x), 6, 5)


class Single(nn.Module):
    """One number per sample, with or without an axis of its own."""

    def __init__(self, axis: bool) -> None:
        super().__init__()
        self.layer, self.axis = nn.Linear(4, 1), axis

    def forward(self, x):
        return self.layer(x) if self.axis else self.layer(x).squeeze(1)


def nothing(output, _):
    return output.sum() * 0


@pytest.mark.parametrize("make", [Tagger, lambda: Single(True), lambda: Single(False)], ids=["tokens", "[B,1]", "[B]"])
def test_with_a_loss_of_the_users_own_any_output_is_learnt(make):
    torch.manual_seed(0)
    student, teacher = make(), make()
    loader = [(X, torch.zeros(len(X)))]
    with torch.no_grad():
        before = float(imitation_loss(student(X), teacher(X)))
    heal(
        student,
        loader,
        HealConfig(epochs=60, lr=0.05, distill=1.0, optimizer="adamw"),
        teacher=teacher,
        loss_fn=nothing,
    )
    with torch.no_grad():
        assert float(imitation_loss(student(X), teacher(X))) < before / 20


def test_imitation_is_the_relative_squared_error():
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    assert float(imitation_loss(s, t)) == pytest.approx(float((s - t).norm() ** 2 / t.norm() ** 2))
    assert float(imitation_loss(t, t)) == 0
    assert torch.isfinite(imitation_loss(s, torch.zeros_like(s)))


@pytest.mark.parametrize("loss", [distillation_loss, imitation_loss])
def test_other_shapes_are_refused(loss):
    with pytest.raises(InputError, match="differ in shape"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_without_a_common_place_the_answers_are_learnt_and_it_is_said(nets):
    example = torch.randn(2, 3, 6, 6)
    student = capture(nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), example)
    teacher = capture(nets.residual().eval(), example)
    loader = [(torch.randn(8, 3, 6, 6), torch.zeros(8, dtype=torch.long))]
    with pytest.warns(UserWarning, match="no place is left whose features"):
        heal(student, loader, HealConfig(epochs=1, distill=0.5, features=1.0), teacher=teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heal(student, loader, HealConfig(epochs=1, distill=0.5), teacher=teacher)
