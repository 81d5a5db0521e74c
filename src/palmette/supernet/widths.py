"""Widths at which every stage needs about the same memory, by the papers' rule or under a device.

Halving the resolution from stage to stage leaves room for more channels. The papers' recursion finds the width whose
reference block takes what the one before took; under a DeviceProfile the same is found by bisection on the bytes that
are really alive there, for one reference block or for a whole space.

Source: MOOFA, arXiv 2409.05900, and its released code. The released depthwise root lacks a factor of 2, which changes
no width after rounding; it is written here as the equality asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from palmette.device import DeviceProfile
from palmette.errors import BudgetError, InputError
from palmette.supernet.staged import StagedSpace
from palmette.supernet.terms import Block, metric_of, round8


def moofa_widths(
    first: int = 24,
    stages: int = 5,
    expand: float = 4,
    kernel: int = 7,
    resolution: int = 56,
    profile: DeviceProfile | None = None,
) -> tuple[int, ...]:
    """Widths of the stages, of the final expand and of the feature mix: stages + 2 channels, `first` the first of them.

    resolution: pixels of a side in the first stage; expand, kernel: of the reference block. Under a profile each width
    is the largest multiple of 8 whose block, with a shortcut, needs at most the profile's RAM (without one: what
    `first` needs); weights are not bounded then, for that see `equalised`. Raises BudgetError when `first` itself does
    not fit, InputError for weights in RAM and for figures that are not positive.
    """
    if min(first, stages, expand, kernel, resolution) <= 0:
        raise InputError("Widths follow from positive figures only", fix="Give positive numbers for all of them.")
    if profile is not None:
        return _widths_under(profile, first, stages, expand, kernel, resolution)
    widths, side = [first], float(resolution)
    for _ in range(stages + 1):
        widths.append(_next_width(widths[-1], side, expand, kernel))
        side /= 2  # the papers do not round it
    return tuple(widths)


def _next_width(c: int, side: float, expand: float, kernel: int) -> int:
    """The width at half the side whose larger layer, expansion or depthwise, takes what it does at `c` channels."""
    area, after = side**2, side**2 / 4
    expansion = (1 + expand) * c * area + expand * c**2
    depthwise = 2 * expand * c * area + expand * c * kernel**2
    line = (1 + expand) * after
    width = (math.sqrt(line**2 + 4 * expand * max(expansion, depthwise)) - line) / (2 * expand)
    if depthwise > expansion:
        width = min(width, c * (2 * area + kernel**2) / (2 * after + kernel**2))
    return round8(width)


def _widths_under(
    profile: DeviceProfile, first: int, stages: int, expand: float, kernel: int, resolution: int
) -> tuple[int, ...]:
    metric, bound = metric_of(profile), _ram(profile)

    def needed(c: int, side: int) -> int:
        area = np.array(side**2)
        block = Block(c, c, np.array(round8(c * expand)), np.array(kernel), area, area, shortcut=True)
        return max(metric.unit * int(elements) + metric.reserve for _, elements in block.memory(metric))

    level = needed(first, resolution) if bound is None else bound
    if needed(first, resolution) > level:
        raise _too_small(
            f"A block of {first} channels on {resolution} x {resolution}", needed(first, resolution), level
        )
    widths, side = [first], resolution
    for _ in range(stages + 1):
        side = -(-side // 2)
        widths.append(_largest(lambda c, side=side: needed(c, side) <= level))  # type: ignore[misc]
    return tuple(widths)


def equalised(space: StagedSpace, profile: DeviceProfile) -> StagedSpace:
    """The space with stage widths at which the largest configuration of each stage just fits the profile's RAM.

    From input to output: stem and first block shrink where they must, the stages take the largest multiples of 8, the
    last two layers shrink where they must. Where the profile bounds flash, no width exceeds the largest cap at which
    the largest network's weights fit. Raises BudgetError with the smallest bound when even the narrowest space does not
    fit, InputError for weights in RAM and for a profile without RAM.
    """
    bound = _ram(profile)
    if bound is None:
        raise InputError(
            "Widths cannot be fitted to a device without a bound on RAM", where=f"profile {profile.name!r}"
        )
    channels = [1, 1, *[8] * space.stages, 8, 8]
    limits = [space.stem, space.first, *[None] * space.stages, space.final, space.last]
    least = _peak(_with(space, channels), profile)
    if least > bound:
        raise _too_small(f"{space.name} at its narrowest", least, bound)
    for place, limit in enumerate(limits):

        def fits(c: int, place: int = place) -> bool:
            return _peak(_with(space, [*channels[:place], c, *channels[place + 1 :]]), profile) <= bound

        channels[place] = _largest(fits, limit, step=1 if place < 2 else 8)
    return _within_flash(space, channels, profile)


def _within_flash(space: StagedSpace, channels: list[int], profile: DeviceProfile) -> StagedSpace:
    """The space at these channels, from the stages on capped as far as flash asks for it."""

    def capped(cap: int) -> StagedSpace:
        return _with(space, [*channels[:2], *(min(cap, c) for c in channels[2:])])

    def weights(cap: int) -> int:
        made = capped(cap)
        return profile.element_bytes * int(made.params(*made.largest())[0])

    flash = profile.flash_bytes
    if flash is None:
        return capped(max(channels))
    if weights(8) > flash:
        raise BudgetError(
            f"{space.name} does not fit into {flash:,} bytes of flash",
            why=f"stages of 8 channels take {weights(8):,}",
            fix="Allow more flash, or offer smaller expands and depths.",
        )
    return capped(_largest(lambda cap: weights(cap) <= flash, max(channels)))


def _with(space: StagedSpace, channels: list[int]) -> StagedSpace:
    """The space with these channels: stem, first block, stages, final expand, feature mix."""
    stem, first, *widths, final, last = channels
    return replace(space, stem=stem, first=first, widths=tuple(widths), final=final, last=last)


def _peak(space: StagedSpace, profile: DeviceProfile) -> int:
    """Bytes of the largest configuration at the highest resolution."""
    table = space.peak_table(profile, space.resolutions[-1:])
    return int(max(table.fixed.max(), table.block.max()))


def _largest(fits: Callable[[int], bool], limit: int | None = None, step: int = 8) -> int:
    """The largest multiple of `step` that fits, or `limit` where that does; the smallest multiple where none does."""
    top = 2**40 if limit is None else limit

    def inside(count: int) -> bool:
        return count * step < top + step and fits(min(count * step, top))

    low, high = 1, 2
    while inside(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return min(low * step, top)


def _ram(profile: DeviceProfile) -> int | None:
    if profile.weights_in == "ram":
        raise InputError(
            "Widths cannot be fitted to a device that keeps its weights in RAM",
            where=f"profile {profile.name!r}",
            why="their sum couples the stages",
            fix='Write weights_in="flash" and take from `ram` what the weights may have.',
        )
    return profile.ram_bytes


def _too_small(what: str, needed: int, bound: int) -> BudgetError:
    return BudgetError(
        f"{what} does not fit into {bound:,} bytes of RAM",
        why=f"it needs {needed:,}",
        fix=f"Allow at least {needed:,}.",
    )
