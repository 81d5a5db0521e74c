"""Loaders, transforms and options of the data sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from palmette.data import HELP, load_source
from palmette.data.loaders import Transform, random_flip, random_shift
from palmette.data.options import ARRAY_OPTIONS, FOLDER_OPTIONS, parse_options
from palmette.data.sources import digits
from palmette.errors import InputError


def everything(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def pixel_set(loader):
    """The images of a loader with norm=none, as a set of bytes."""
    return {(x * 255).round().to(torch.uint8).numpy().tobytes() for x in everything(loader)[0]}


# --- loaders


def reseeded(loader, seed):
    loader.generator.manual_seed(seed)
    return list(loader)


@pytest.mark.parametrize("augment", ["none", "flip", "shift", "flip-shift"])
def test_a_reseeded_loader_yields_the_same_batches(augment):
    loader = load_source(f"digits?augment={augment}&train=200").train
    first = reseeded(loader, 3)
    torch.manual_seed(99)  # the global generator has no part in it
    torch.rand(7)
    again = reseeded(loader, 3)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    other = reseeded(loader, 4)
    assert not torch.equal(first[0][0], other[0][0])


def test_loaders_leave_the_global_generator_alone():
    data = load_source("digits?augment=flip-shift")
    before = torch.get_rng_state()
    for loader in (data.train, data.val, data.test, data.calibration):
        next(iter(loader))
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_of_a_source_decide_the_order():
    def first(seed):
        return next(iter(load_source("digits", seed=seed).train))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_validation_keeps_its_order_and_is_not_augmented():
    data = load_source("digits?augment=flip-shift&norm=none")
    source = digits(parse_options("", spec="digits"))
    for loader, part in ((data.val, source.val), (data.test, source.test)):
        x, y = everything(loader)
        assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(part.images))
        assert y.tolist() == part.labels.tolist()


def test_calibration_is_training_data_as_it_is():
    data = load_source("digits?augment=flip-shift&norm=none&calibration=64")
    plain = load_source("digits?norm=none&calibration=64")
    assert len(data.calibration.dataset) == 64
    assert pixel_set(data.calibration) == pixel_set(plain.calibration) <= pixel_set(plain.train)
    assert torch.equal(everything(data.calibration)[1], everything(data.calibration)[1])


def test_no_training_batch_holds_a_single_image():
    data = load_source("digits?train=65&batch=32")
    assert [len(y) for _, y in data.train] == [32, 32]
    assert [len(y) for _, y in load_source("digits?train=66&batch=32").train] == [32, 32, 2]
    assert sum(len(y) for _, y in load_source("digits?val=33&batch=32").val) == 33  # nothing is dropped where it counts


def test_example_inputs_look_like_the_batches():
    data = load_source("digits?size=12x10&channels=3")
    x, y = next(iter(data.val))
    assert data.example_inputs.shape == (2, 3, 12, 10)
    assert data.example_inputs.dtype == x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.shape[1:] == (3, 12, 10)


# --- transforms

batches = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 6), st.sampled_from([1, 3]), st.integers(2, 7), st.integers(2, 7))
)


@given(batches, st.integers(1, 3), st.integers(0, 99))
def test_shifts_move_each_image_as_a_whole(pixels, amount, seed):
    x = torch.from_numpy(pixels)
    shifted = random_shift(x, amount, torch.Generator().manual_seed(seed))
    rows, columns = torch.randint(2 * amount + 1, (2, len(x)), generator=torch.Generator().manual_seed(seed))
    height, width = x.shape[2:]
    for before, after, row, column in zip(x, shifted, rows.tolist(), columns.tolist(), strict=True):
        padded = torch.zeros(x.shape[1], height + 2 * amount, width + 2 * amount, dtype=torch.uint8)
        padded[:, amount : amount + height, amount : amount + width] = before
        assert torch.equal(after, padded[:, row : row + height, column : column + width])


@given(batches, st.integers(0, 99))
def test_flips_mirror_or_keep_each_image(pixels, seed):
    x = torch.from_numpy(pixels)
    flipped = random_flip(x, torch.Generator().manual_seed(seed))
    for before, after in zip(x, flipped, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(2))


def test_about_half_of_the_images_are_flipped():
    x = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3).repeat(2000, 1, 1, 1)
    share = (random_flip(x, torch.Generator().manual_seed(0)) != x).flatten(1).any(1).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.05)


@given(batches)
def test_normalise_scales_then_standardises(pixels):
    channels = pixels.shape[1]
    mean, std = (0.2, 0.4, 0.6)[:channels], (0.5, 0.25, 0.3)[:channels]
    transform = Transform(channels=channels, size=pixels.shape[2:], mean=mean, std=std)
    expected = (pixels / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert np.allclose(transform.normalise(torch.from_numpy(pixels)).numpy(), expected, atol=1e-5)


def test_grey_becomes_three_equal_channels_and_colour_becomes_grey():
    grey, colour = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    colour[:, 0] = 153
    to_three = Transform(channels=3, size=(4, 4), mean=(0.0,), std=(1.0,)).normalise(grey)
    assert to_three.shape == (2, 3, 4, 4)
    assert torch.allclose(to_three, torch.tensor(0.2))
    to_one = Transform(channels=1, size=(4, 4), mean=(0.0,), std=(1.0,)).normalise(colour)
    assert to_one.shape == (2, 1, 4, 4)
    assert torch.allclose(to_one, torch.tensor(0.2))


@pytest.mark.parametrize("size", [(3, 5), (16, 16), (8, 8)])
def test_resizing_keeps_a_flat_image_flat(size):
    x = torch.full((2, 1, 8, 8), 102, dtype=torch.uint8)
    y = Transform(channels=1, size=size, mean=(0.0,), std=(1.0,)).normalise(x)
    assert y.shape == (2, 1, *size)
    assert torch.allclose(y, torch.tensor(0.4))


# --- options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sze=3", r"unknown option 'sze'.*Known options: augment, batch"),
        ("size=a", "option size=a cannot be used.*whole number"),
        ("size=0", "at least 1"),
        ("size=3x4x5", "HEIGHTxWIDTH"),
        ("batch=0", "at least 1"),
        ("train=-5", "whole number"),
        ("channels=2", "must be one of 1, 3"),
        ("augment=twirl", "must be one of none, flip, shift, flip-shift"),
        ("norm=imagnet", "must be one of source, imagenet, half, none"),
        ("mean=0.5", "mean and std must be given together"),
        ("mean=0.5,0.5&std=1", "one number or three"),
        ("mean=nan&std=1", "one number or three"),
        ("mean=0.5&std=0", "above zero"),
        ("norm=half&mean=0.5&std=1", "either norm or mean and std"),
        ("size=8&size=9", "given twice"),
        ("size", "cannot be read"),
        ("mean=0.1,0.2,0.3&std=1,1,1", "mean has 3 values for 1 channel"),
    ],
)
def test_options_that_cannot_be_used(text, message):
    with pytest.raises(InputError, match=message) as error:
        load_source(f"digits?{text}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digits:here", "digits takes no folder"),
        ("cifar10", "cifar10 needs a folder.*cifar10:DIR"),
        ("cifr10:x", "Did you mean cifar10:DIR"),
        ("xyz", "Write digits, cifar10:DIR"),
        ("digits?workers=2", "unknown option 'workers'"),
    ],
)
def test_specs_that_cannot_be_used(spec, message):
    with pytest.raises(InputError, match=message):
        load_source(spec)


def test_named_norms_are_applied():
    raw = everything(load_source("digits?norm=none").val)[0]
    half = everything(load_source("digits?norm=half").val)[0]
    by_hand = everything(load_source("digits?mean=0.25&std=0.5").val)[0]
    colour = everything(load_source("digits?norm=imagenet&channels=3").val)[0]
    assert torch.allclose(half, (raw - 0.5) / 0.5, atol=1e-5)
    assert torch.allclose(by_hand, (raw - 0.25) / 0.5, atol=1e-5)
    assert torch.allclose(colour[:, 2:], (raw - 0.406) / 0.225, atol=1e-5)


def test_help_names_every_option():
    for name in (*ARRAY_OPTIONS, *FOLDER_OPTIONS):
        assert f"{name}=" in HELP
