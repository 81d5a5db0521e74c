"""Distillation inside the network: places that both have, the stated error, and networks left as they were."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from palmette.errors import InputError
from palmette.graph import Plan, capture, drop, find_sites, linearize
from palmette.train import HealConfig, heal
from palmette.train.features import FeatureTaps, matched_places

EXAMPLE = torch.zeros(2, 3, 6, 6)
HINTS = HealConfig(epochs=2, lr=0.02, features=1.0, clip=None)


@pytest.fixture
def dense(nets):
    return capture(nets.residual().eval(), EXAMPLE)


def plain_net() -> nn.Sequential:
    """Eight convolutions in a row, with norms and activations, and a head."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU()) for _ in range(8)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(108, 3)).eval()


def zero_task(output, _):
    return output.sum() * 0


def feature_error(student, teacher, x) -> float:
    taps = FeatureTaps(student, teacher)
    with torch.no_grad(), taps.inserted():
        student.eval()(x)
        teacher.eval()(x)
        return float(taps.loss())


# ---- places ----------------------------------------------------------------------------------------------------------


def test_blocks_in_both_networks_are_matched_and_a_dropped_one_is_not(dense):
    assert [place.path for place in matched_places(dense, dense)] == ["blocks.0", "blocks.1", "blocks.2"]
    shorter = Plan([drop("blocks.1")]).apply(dense, EXAMPLE)
    assert [place.path for place in matched_places(shorter, dense)] == ["blocks.0", "blocks.2"]


def test_a_linearised_activation_is_held_against_the_activation(dense):
    last = [site.path for site in find_sites(dense, EXAMPLE) if site.kind == "activation"][-1]
    edited = Plan([linearize(last, fit="identity", force=True)]).apply(dense, EXAMPLE)
    place = matched_places(edited, dense)[-1]
    assert place.path == "blocks.2"
    assert str(place.student.meta["path"]).startswith("linearized.")
    assert place.teacher.meta["path"] == last


def test_without_blocks_operations_are_compared_evenly_spaced_the_classifier_left_out():
    network = capture(plain_net(), EXAMPLE)
    places = matched_places(network, network)
    assert [place.path for place in places] == ["0.0", "1.0", "3.0", "4.0", "5.0", "7.0"]
    assert {place.student.target for place in places} == {torch.ops.aten.silu.default}
    assert [place.path for place in matched_places(network, network, limit=2)] == ["3.0", "7.0"]


def test_networks_that_cannot_be_matched_are_refused(nets, dense):
    with pytest.raises(InputError, match=r"into the model .*palmette\.capture"):
        matched_places(nets.residual(), dense)
    with pytest.raises(InputError, match=r"into the teacher .*features=0"):
        matched_places(dense, nets.residual())
    with pytest.raises(InputError, match="no place in common"):
        matched_places(dense, capture(plain_net(), EXAMPLE))
    with pytest.raises(InputError, match=r"needs a teacher \(at HealConfig\.features"):
        heal(dense, nets.images(), HINTS)


# ---- the error -------------------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_tensors_inside(nets):
    first, second = nets.residual(1).eval(), nets.residual(2).eval()
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def inside(network):
        found, y = [], torch.relu(network.stem(x))
        for block in network.blocks:
            y = block(y)
            found.append(y)
        return found

    with torch.no_grad():
        pairs = zip(inside(first), inside(second), strict=True)
        expected = sum((s - t).square().sum() / t.square().sum() for s, t in pairs) / 3
    found = feature_error(capture(first, x), capture(second, x), x)
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert feature_error(capture(first, x), capture(first, x), x) == 0


def test_only_the_student_gets_a_gradient_and_a_pass_is_read_once(nets, dense):
    student, x = capture(nets.residual(5).eval(), EXAMPLE), torch.randn(4, 3, 6, 6)
    taps = FeatureTaps(student, dense)
    with taps.inserted():
        student(x)
        dense(x)
        taps.loss().backward()
        with pytest.raises(InputError, match="has not run"):
            taps.loss()
    assert student.stem.weight.grad.abs().sum() > 0
    assert dense.stem.weight.grad is None


# ---- in healing ------------------------------------------------------------------------------------------------------


def test_healing_with_features_alone_brings_the_student_to_the_teacher(nets, dense):
    x = next(iter(nets.images(shuffle=False)))[0]
    student = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in student.blocks.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = feature_error(student, dense, x)
    heal(student, nets.images(), HealConfig(epochs=8, lr=0.05, features=1.0), teacher=dense, loss_fn=zero_task)
    assert feature_error(student, dense, x) < 0.5 * before


def test_graphs_and_states_are_left_as_they_were(nets, dense):
    student, before = Plan([drop("blocks.1")]).apply(dense, EXAMPLE), nets.weights(dense)
    codes = student.code, dense.code, list(student.state_dict())
    heal(student, nets.images(), HINTS, teacher=dense)
    assert (student.code, dense.code, list(student.state_dict())) == codes
    assert nets.equal(nets.weights(dense), before)
    assert not [name for name, _ in student.named_modules() if "tap" in name]
    copy.deepcopy(student)
    with pytest.raises(ValueError, match="boom"):
        heal(student, nets.images(), HINTS, teacher=dense, loss_terms=[boom])
    assert (student.code, dense.code, list(student.state_dict())) == codes


def boom(network, inputs, output):
    raise ValueError("boom")


@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
def test_the_teacher_runs_once_a_batch(nets, dense, distill):
    calls, student = [], copy.deepcopy(dense)
    dense.stem.register_forward_hook(lambda *_: calls.append(1))
    heal(student, nets.images(), HealConfig(epochs=1, features=0.5, distill=distill), teacher=dense)
    assert len(calls) == 6


def test_bfloat16_and_float64(nets, dense, caplog):
    losses = {}
    for precision in ("32-true", "bf16-mixed", "64-true"):
        student, teacher = copy.deepcopy(dense), capture(nets.residual(3).eval(), EXAMPLE)
        loader = nets.images(shuffle=False)
        if precision == "64-true":
            student, teacher = student.double(), teacher.double()
            loader = [(x.double(), y) for x, y in loader]
        config = HealConfig(epochs=1, lr=0.01, features=2.0, precision=precision)
        losses[precision] = heal(student, loader, config, teacher=teacher)[-1]["loss"]
    assert "Mixed Precision" not in caplog.text  # Lightning would say so at every healing
    assert losses["64-true"] == pytest.approx(losses["32-true"], rel=1e-5)
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)


@pytest.mark.parametrize("at", [4, 8])
def test_resumed_healing_ends_with_the_same_weights(nets, dense, tmp_path, at):
    file = tmp_path / "h.safetensors"
    config = HealConfig(epochs=2, lr=0.02, features=1.0, distill=0.5, checkpoint_every_steps=1)
    calls = itertools.count()

    def bomb(network, inputs, output):
        if next(calls) == at:
            raise ValueError("boom")
        return output.new_zeros(())

    def calm(network, inputs, output):
        return output.new_zeros(())

    def student():
        return Plan([drop("blocks.1")]).apply(dense, EXAMPLE)

    whole, broken, resumed = student(), student(), student()
    history = heal(whole, nets.images(), config, teacher=dense, loss_terms=[calm])
    with pytest.raises(ValueError, match="boom"):
        heal(broken, nets.images(), config, teacher=dense, loss_terms=[bomb], checkpoint=file)
    assert heal(resumed, nets.images(), config, teacher=dense, loss_terms=[calm], checkpoint=file) == history
    assert nets.equal(nets.weights(resumed), nets.weights(whole))
    assert not nets.equal(nets.weights(resumed), nets.weights(broken))
