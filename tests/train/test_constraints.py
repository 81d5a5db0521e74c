"""Weights that are zero stay zero through healing, whatever the optimizer carries along; nothing else is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from palmette.train.constraints import zeros_kept
from palmette.train.loop import HealConfig, heal

RECIPES = {
    "sgd": HealConfig(epochs=3, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": HealConfig(epochs=3, lr=1e-2, optimizer="adamw", weight_decay=1e-2),
}


def pruned(model: nn.Module, share: float = 0.5) -> nn.Module:
    """The model with the smallest weights of each matrix set to exactly zero, and one bias too."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                bound = parameter.abs().flatten().kthvalue(int(share * parameter.numel())).values
                parameter[parameter.abs() <= bound] = 0.0
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_stay_zero_and_the_rest_learns(nets, recipe):
    model = pruned(nets.net())
    held, start = zeros(model), nets.weights(model)
    history = heal(model, nets.loader(), RECIPES[recipe], constraints=[zeros_kept(model)])
    for name, zero in zeros(model).items():
        assert torch.equal(zero, held[name]), "exactly the pruned weights are zero"
        assert int(zero.sum()) == zero.numel() // 2
        assert bool((model.get_parameter(name)[~zero] != start[name][~zero]).all())
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_it_they_grow_again(nets, recipe):
    model = pruned(nets.net())
    heal(model, nets.loader(), RECIPES[recipe])
    assert all(int(zero.sum()) == 0 for zero in zeros(model).values())


def test_what_is_not_zero_trains_as_without_it(nets):
    plain, kept = nets.net(), nets.net()
    with torch.no_grad():
        kept[1].bias.zero_()
        plain[1].bias.zero_()
    heal(plain, nets.loader(), RECIPES["sgd"])
    heal(kept, nets.loader(), RECIPES["sgd"], constraints=[zeros_kept(kept)])
    assert nets.equal(nets.weights(plain), nets.weights(kept)), "a bias of zero is free, so nothing is held here"
    assert bool((kept[1].bias != 0).all())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_it_restores_the_zeros_it_saw_and_no_other_number(data):
    numbers = st.lists(st.sampled_from([0.0, -0.0, 1e-30, -2.0, 3.0]), min_size=6, max_size=6)
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(data.draw(numbers)).view(2, 3))
    held = model.weight.detach() == 0
    restore = zeros_kept(model)
    moved = torch.tensor(data.draw(numbers)).view(2, 3) + 5.0
    with torch.no_grad():
        model.weight.copy_(moved)
    bias = model.bias.detach().clone()
    restore()
    assert torch.equal(model.weight.detach(), torch.where(held, 0.0, moved))
    assert torch.equal(model.bias.detach(), bias)


def test_names_and_shapes_of_the_state_are_as_before(nets):
    model = pruned(nets.net())
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    heal(model, nets.loader(), RECIPES["sgd"], constraints=[zeros_kept(model)])
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("steps", [1, 7, 13])
def test_a_training_that_was_cut_off_goes_on_to_the_same_weights(nets, tmp_path, recipe, steps):
    start = pruned(nets.net())
    config = HealConfig(**{**RECIPES[recipe].to_dict(), "checkpoint_every_steps": 1, "checkpoint_seconds": 0.0})

    def train(file: str, cut: int | None = None) -> nn.Module:
        model, done = copy.deepcopy(start), []
        restore = zeros_kept(model)

        def constraint() -> None:
            restore()
            done.append(1)
            if cut is not None and len(done) > cut:
                raise KeyboardInterrupt

        heal(model, nets.loader(), config, seed=5, checkpoint=tmp_path / file, constraints=[constraint])
        return model

    whole = nets.weights(train("whole"))
    with pytest.raises(KeyboardInterrupt):
        train("cut", steps)
    assert nets.equal(nets.weights(train("cut")), whole)
