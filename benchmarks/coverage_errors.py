"""How far two networks are apart, and how far rounding alone may bring them apart."""

from __future__ import annotations

import copy
from typing import Any

import torch
from coverage_families import Family, inputs
from torch import Tensor, nn

from palmette.graph.inputs import call, main_output

FLOAT64_BOUND, FLOAT32_BOUND = 1e-10, 1e-4
ROUNDINGS = 8
"""Roundings of its weights by which a collapsed network may differ from the edited one."""


def relative(reference: Tensor, value: Tensor) -> float:
    """Largest difference relative to the largest reference value."""
    scale = reference.double().abs().max().clamp_min(1e-30)
    return float((reference.double() - value.double()).abs().max() / scale)


def worst_error(family: Family, edited: nn.Module, small: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """Largest relative error of the collapsed against the edited network over batches 1, 2 and 5, in eval mode."""
    worst = 0.0
    edited.eval()
    small.eval()
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = cast(inputs(family, batch, 200 + batch), dtype)
            worst = max(worst, relative(main_output(call(edited, x)), main_output(call(small, x))))
    return worst


def rounding_error(family: Family, edited: nn.Module, twin: nn.Module) -> float:
    """Relative error of the edited network in float32 against itself in float64: no merge can be held to less.

    Random weights with random removals can amplify rounding; merging is then judged against what float32 gives anyway.
    """
    edited.eval()
    x = inputs(family, 5, 205)
    with torch.no_grad():
        return relative(main_output(call(twin.eval(), cast(x, torch.float64))), main_output(call(edited, x)))


def condition(family: Family, twin: nn.Module) -> float:
    """How many times larger than a relative change of all weights the relative change of the outputs is, in float64.

    A merge rounds the weights that it makes. What one rounding of the edited network's own weights does to its outputs
    is therefore the least that a merge can be held to, whatever the network amplifies it by.
    """
    small, worst = 1e-12, 0.0
    xs = [cast(inputs(family, batch, 200 + batch), torch.float64) for batch in (1, 2, 5)]
    twin.eval()
    with torch.no_grad():
        references = [main_output(call(twin, x)) for x in xs]
        for seed in (0, 1):
            moved, generator = copy.deepcopy(twin), torch.Generator().manual_seed(seed)
            for p in moved.parameters():
                p.mul_(1 + small * (2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1))
            for x, reference in zip(xs, references, strict=True):
                worst = max(worst, relative(reference, main_output(call(moved, x))))
    return worst / small


def bound(plan: dict[str, Any], dtype: torch.dtype) -> float:
    """What the collapsed network may differ by: a fixed bound, or what rounding its weights does where that is more."""
    fixed = FLOAT64_BOUND if dtype == torch.float64 else max(FLOAT32_BOUND, 4 * plan["rounding"])
    return max(fixed, ROUNDINGS * plan["condition"] * torch.finfo(dtype).eps / 2)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """Inputs in another precision; whole numbers stay."""
    if isinstance(x, dict):
        return {k: cast(v, dtype) for k, v in x.items()}
    return x.to(dtype) if x.is_floating_point() else x
