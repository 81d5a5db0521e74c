"""Configurations that fit, drawn without a single rejection.

Every choice that grows lets memory grow or stay. So a partial configuration can be completed if and only if it fits
with the smallest value everywhere else, and drawing one choice after the other among the values that can still be
completed never ends in a dead end.
"""

from __future__ import annotations

import numpy as np

from palmette.device import format_bytes
from palmette.errors import BudgetError
from palmette.supernet.codes import Ints
from palmette.supernet.memory import MemoryModel


def check_feasible(memory: MemoryModel) -> None:
    """Raise BudgetError if not even the smallest configuration keeps the profile's bounds; it names what binds."""
    smallest = memory.net.space.min()
    code = memory.codes.encode([smallest])
    if memory.fits(code)[0]:
        return
    profile, binding = memory.profile, memory.binding(smallest)
    ram, flash = int(memory.ram_bytes(code)[0]), int(memory.param_bytes(code)[0])
    parts = []
    if profile.ram_bytes is not None and ram > profile.ram_bytes:
        weights = "" if profile.weights_in == "flash" else f", and its weights take {format_bytes(flash)}"
        parts.append(
            f"the smallest needs {ram:,} bytes of RAM ({format_bytes(ram)}), {profile.ram_bytes:,} are there; most is "
            f"alive at '{binding.path}', {binding.peak_bytes:,} bytes{weights}"
        )
    if profile.flash_bytes is not None and flash > profile.flash_bytes:
        parts.append(f"the smallest has {flash:,} bytes of parameters, the flash holds {profile.flash_bytes:,}")
    raise BudgetError(
        f"No network of the supernet fits device '{profile.name}'",
        why="; ".join(parts),
        fix="Give more memory, a smaller input, int8, or make the supernet with smaller widths or bits.",
    )


def sample_within(memory: MemoryModel, count: int, rng: np.random.Generator) -> Ints:
    """Codes [count, choices] of configurations that keep the profile's bounds, choices drawn in a random order.

    Raises BudgetError if none does.
    """
    check_feasible(memory)
    choices = memory.codes.choices
    codes = np.zeros((count, len(choices)), dtype=np.int64)
    for j in rng.permutation(len(choices)):
        values = len(choices[j].values)
        tried = np.repeat(codes, values, axis=0)
        tried[:, j] = np.tile(np.arange(values), count)
        fits = memory.fits(tried).reshape(count, values)
        scores = np.where(fits, rng.random((count, values)), -1.0)
        codes[:, j] = scores.argmax(1)
    return codes


def sample_balanced(memory: MemoryModel, count: int, rng: np.random.Generator) -> Ints:
    """Codes [count, choices] that keep the bounds, spread evenly over the peaks that can be reached.

    Each is drawn under a bound of its own, uniform between the smallest peak and the profile's. Source: MOOFA (2024),
    which fills equal bins by rejection.
    """
    check_feasible(memory)
    space, profile = memory.net.space, memory.profile
    ends = memory.ram_bytes(memory.codes.encode([space.min(), space.max()]))
    most = int(ends[1]) if profile.ram_bytes is None else min(int(ends[1]), profile.ram_bytes)
    bounds = rng.integers(int(ends[0]), most + 1, size=count)
    return np.concatenate([sample_within(memory.bounded(ram=int(bound)), 1, rng) for bound in bounds])
