"""Widths of equal memory: the papers' lists, and spaces fitted to a device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from palmette.device import DeviceProfile
from palmette.errors import BudgetError, InputError
from palmette.supernet import MOOFA, OFA, moofa_widths
from palmette.supernet.widths import equalised

BOARD = DeviceProfile(
    ram="320KiB", weights_in="flash", dtype="int8", inplace_elementwise=True, inplace_depthwise=True
)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "widths"),
    [
        ({}, (24, 96, 288, 360, 384, 392, 392)),
        ({"first": 16}, (16, 64, 224, 296, 320, 328, 328)),
        ({"first": 32}, (32, 128, 352, 432, 456, 464, 464)),
        ({"expand": 2}, (24, 96, 272, 360, 384, 392, 392)),
        ({"stages": 2}, (24, 96, 288, 360)),
    ],
    ids=str,
)
def test_the_recursion_gives_the_published_widths(arguments, widths):
    assert moofa_widths(**arguments) == widths


def test_the_recursion_gives_the_space_of_moofa():
    *stages, final, last = moofa_widths()
    assert (tuple(stages), final, last) == (MOOFA.widths, MOOFA.final, MOOFA.last)


def test_under_a_profile_the_next_block_would_not_fit():
    # A block of c channels with a shortcut is largest in its projection: 4 c in, c out, c kept for the addition.
    widths = moofa_widths(8, stages=3, profile=BOARD)
    for side, width in zip((28, 14, 7, 4), widths[1:], strict=True):
        assert 6 * width * side**2 <= BOARD.ram_bytes < 6 * (width + 8) * side**2


def test_without_ram_the_first_block_says_the_level():
    widths = moofa_widths(8, stages=1, profile=replace(BOARD, ram=None))
    assert widths == (8, 32, 128)


def test_a_first_block_that_does_not_fit_says_what_it_needs():
    with pytest.raises(BudgetError, match=r"it needs 451,584. Allow at least 451,584."):
        moofa_widths(24, profile=BOARD)


@pytest.mark.parametrize("space", [MOOFA, OFA], ids=lambda space: space.name)
@pytest.mark.parametrize("flash", [None, "4MiB"])
def test_an_equalised_space_fits_and_no_stage_could_be_wider(space, flash):
    profile = replace(BOARD, flash=flash)
    fitted = equalised(space, profile)
    largest = fitted.largest()
    assert fitted.peak_bytes(*largest, profile)[0] <= profile.ram_bytes
    weights = fitted.params(*largest)[0]
    if flash is not None:
        assert weights <= profile.flash_bytes
    for stage in range(space.stages):
        widths = list(fitted.widths)
        widths[stage] += 8
        wider = replace(fitted, widths=tuple(widths))
        over = wider.peak_bytes(*largest, profile)[0] > profile.ram_bytes
        assert over or (flash is not None and widths[stage] > max(fitted.widths))


def test_what_fits_keeps_its_width():
    fitted = equalised(MOOFA, replace(BOARD, ram="64MiB", flash="3MiB"))
    assert (fitted.stem, fitted.first) == (MOOFA.stem, MOOFA.first)
    odd = replace(MOOFA, stem=4, first=9, final=250, last=129)
    fitted = equalised(odd, replace(BOARD, ram="2MiB"))
    assert (fitted.stem, fitted.first, fitted.final, fitted.last) == (4, 9, 250, 129)
    # 9 channels would expand to 40 at 112 x 112, 8 expand to 32.
    tight = equalised(odd, replace(BOARD, ram="512KiB"))
    assert tight.first == 8


def test_equalised_stages_need_about_the_same():
    fitted = equalised(MOOFA, replace(BOARD, ram="1MiB"))
    block = fitted.peak_table(BOARD, fitted.resolutions[-1:]).block
    peaks = block.max((1, 2, 3, 4))
    assert peaks.min() > 0.8 * peaks.max()


def test_more_memory_gives_wider_stages():
    before = (0,) * 5
    for ram in ("192KiB", "256KiB", "512KiB", "1MiB"):
        widths = equalised(MOOFA, replace(BOARD, ram=ram)).widths
        assert all(new >= old for new, old in zip(widths, before, strict=True))
        before = widths


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(BudgetError, match="at its narrowest does not fit into 1,024 bytes"):
        equalised(MOOFA, replace(BOARD, ram="1KiB"))
    with pytest.raises(BudgetError, match="bytes of flash: stages of 8 channels take"):
        equalised(MOOFA, replace(BOARD, flash="1KiB"))
    with pytest.raises(InputError, match="keeps its weights in RAM"):
        equalised(MOOFA, replace(BOARD, weights_in="ram"))
    with pytest.raises(InputError, match="without a bound on RAM"):
        equalised(MOOFA, replace(BOARD, ram=None))
    with pytest.raises(InputError, match="keeps its weights in RAM"):
        moofa_widths(profile=DeviceProfile())
    with pytest.raises(InputError, match="positive"):
        moofa_widths(0)
