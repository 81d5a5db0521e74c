"""The zoo: shapes, names, that the networks learn, and that their widths are such that merging pays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from palmette import models
from palmette.data import load_source
from palmette.errors import InputError

NAMES = [entry.name for entry in models.zoo()]


def train(name, epochs, size=None):
    """Accuracy on the digits' test split after a short training."""
    data = load_source("digits", image_size=size)
    torch.manual_seed(0)
    model = models.build(name, shape=tuple(data.example_inputs.shape[1:]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * len(data.train))
    for _ in range(epochs):
        for x, y in data.train:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return torch.cat([model(x).argmax(1) == y for x, y in data.test]).float().mean().item()


def test_the_promised_networks_are_there():
    assert {"digits-mobile", "digits-mlp", "digits-resnet", "cifar-vit", "mlp"} <= set(NAMES)
    assert sorted(NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_networks_map_images_to_logits_and_pass_gradients(name):
    entry = models.entry(name)
    model = models.build(name, num_classes=7)
    y = model(torch.randn(3, *entry.shape))
    assert y.shape == (3, 7)
    y.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert entry.summary


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28)])
def test_networks_can_be_built_for_other_images(name, shape):
    model = models.build(name, shape=shape).eval()
    assert model(torch.randn(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_networks_treat_images_of_a_batch_apart_and_can_be_copied(name):
    model = models.build(name).eval()
    x = torch.randn(4, *models.entry(name).shape)
    with torch.no_grad():
        whole, alone = copy.deepcopy(model)(x), torch.cat([model(part) for part in x.split(1)])
    assert whole.std(0).max() > 1e-4  # outputs differ from image to image
    assert torch.allclose(whole, alone, atol=1e-5)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InputError, match=r"Did you mean palmette:digits-mobile\?"):
        models.build("digits-moble")
    with pytest.raises(InputError, match="Known: cifar-vit, digits-mlp"):
        models.build("zzz")


@pytest.mark.parametrize("name", ["digits-mlp", "cifar-vit"])
def test_images_that_no_patch_fits_are_refused(name):
    with pytest.raises(InputError, match="images of 9x9 cannot be cut into patches of"):
        models.build(name, shape=(1, 9, 9))


@pytest.mark.parametrize(("name", "epochs"), [("mlp", 10), ("digits-mlp", 10)])
def test_networks_learn_the_digits(name, epochs):
    assert train(name, epochs) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-mobile", "digits-resnet"])
@pytest.mark.parametrize("size", [(8, 8), (16, 16)])
def test_convolutional_networks_learn_the_digits(name, size):
    assert train(name, 6, size) > 0.95


def test_every_inverted_residual_costs_less_as_one_dense_convolution():
    blocks = [m for m in models.build("digits-mobile").modules() if isinstance(m, models.InvertedResidual) and m.skip]
    assert len(blocks) >= 5
    for block in blocks:
        convs = [m for m in block.layers if isinstance(m, torch.nn.Conv2d)]
        separate = sum(c.weight.numel() for c in convs)  # multiply-adds per position, all at stride 1
        assert 9 * convs[0].in_channels * convs[-1].out_channels < 0.75 * separate
