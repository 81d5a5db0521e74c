"""Configurations that fit, drawn without a single rejection.

Every choice that grows lets memory grow or stay. So a partial configuration can be completed if and only if it fits
with the smallest value everywhere else, and drawing one choice after the other among the values that can still be
completed never ends in a dead end. Latencies of a table need not grow so: where the smallest is too slow the values
everywhere else are those of any configuration that fits.
"""

from __future__ import annotations

import numpy as np

from palmette.device import format_bytes, parse_latency
from palmette.errors import BudgetError
from palmette.supernet.codes import Ints
from palmette.supernet.memory import MemoryModel
from palmette.supernet.optimum import Optimizer


def check_feasible(memory: MemoryModel) -> None:
    """Raise BudgetError if no configuration keeps the profile's bounds; it names the smallest need and what binds."""
    start_of(memory)


def start_of(memory: MemoryModel) -> Ints:
    """The code [choices] of the smallest configuration, or of any other that keeps the bounds if only that is too slow.

    Raises BudgetError.
    """
    found = _any(memory)
    if found is not None:
        return found
    smallest = memory.net.space.min()
    code = memory.codes.encode([smallest])
    profile, binding = memory.profile, memory.binding(smallest)
    ram, flash = int(memory.ram_bytes(code)[0]), int(memory.param_bytes(code)[0])
    parts = []
    if profile.ram_bytes is not None and ram > profile.ram_bytes:
        weights = "" if profile.weights_in == "flash" else f", and its weights take {format_bytes(flash)}"
        step = f" for a training step at batch {memory.batch}" if memory.mode == "train" else ""
        parts.append(
            f"the smallest needs {ram:,} bytes of RAM{step} ({format_bytes(ram)}), {profile.ram_bytes:,} are there; "
            f"most is alive at '{binding.path}', {binding.peak_bytes:,} bytes{weights}"
        )
    if profile.flash_bytes is not None and flash > profile.flash_bytes:
        parts.append(f"the smallest has {flash:,} bytes of parameters, the flash holds {profile.flash_bytes:,}")
    if profile.latency_ms is not None and memory.latency_ms(code)[0] > parse_latency(profile.latency_ms):
        took, bound = float(memory.latency_ms(code)[0]), parse_latency(profile.latency_ms)
        parts.append(f"the smallest takes {took:.3g} ms by the table of latencies, {bound:.3g} ms are allowed")
    raise BudgetError(
        f"No network of the supernet fits device '{profile.name}'",
        why="; ".join(parts),
        fix="Give more memory or time, a smaller input, int8, or make the supernet with smaller widths or bits.",
    )


def _any(memory: MemoryModel) -> Ints | None:
    """The code [choices] of the smallest configuration if it keeps the bounds, else of any that does, None without."""
    code = memory.codes.encode([memory.net.space.min()])
    if memory.fits(code)[0]:
        return np.asarray(code[0])
    if memory.profile.latency_ms is None:
        return None
    answer = Optimizer(memory).best(np.zeros(memory.codes.width))
    return None if answer is None else np.asarray(memory.codes.encode([answer.config])[0])


def sample_within(
    memory: MemoryModel, count: int, rng: np.random.Generator, *, ram: Ints | None = None, start: Ints | None = None
) -> Ints:
    """Codes [count, choices] of configurations that keep the profile's bounds, choices drawn in a random order.

    ram: bounds [count] in place of the profile's; start: a code that keeps all of them. Raises BudgetError if nothing
    keeps the bounds.
    """
    choices = memory.codes.choices
    codes = np.repeat((start_of(memory) if start is None else start)[None], count, axis=0)
    for j in rng.permutation(len(choices)):
        values = len(choices[j].values)
        tried = np.repeat(codes, values, axis=0)
        tried[:, j] = np.tile(np.arange(values), count)
        bounds = None if ram is None else np.repeat(ram, values)
        fits = memory.fits(tried, bounds).reshape(count, values)
        scores = np.where(fits, rng.random((count, values)), -1.0)
        codes[:, j] = scores.argmax(1)
    return codes


def sample_balanced(memory: MemoryModel, count: int, rng: np.random.Generator) -> Ints:
    """Codes [count, choices] that keep the bounds, spread evenly over the peaks that can be reached.

    Each is drawn under a bound of its own, uniform between the smallest peak and the profile's. Source: MOOFA (2024),
    which fills equal bins by rejection.
    """
    space, profile = memory.net.space, memory.profile
    start = start_of(memory)
    ends = memory.ram_bytes(np.stack([start, memory.codes.encode([space.max()])[0]]))
    most = int(ends[1]) if profile.ram_bytes is None else min(int(ends[1]), profile.ram_bytes)
    bounds = rng.integers(int(ends[0]), most + 1, size=count)
    return sample_within(memory, count, rng, ram=bounds, start=start)
