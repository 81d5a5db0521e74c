"""Whether the options of `Supernet.from_model` make sense, before anything is traced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import fx, nn

from palmette.errors import InputError


def check_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for options of `from_model` of another type, or out of bounds."""
    for name in ("width", "heads", "kernel", "resolution", "bits"):
        values = options[name]
        if isinstance(values, str) or not isinstance(values, Sequence) or not all(map(_is_number, values)):
            raise InputError(f"{name} = {values!r} is no sequence of numbers", fix=f"Write {name}=(...), () for none.")
    for name in ("width", "heads"):
        if not all(0 < share <= 1 for share in options[name]):
            raise _out_of_bounds(name, options[name], "Give shares above 0 and up to 1.")
    for name in ("kernel", "resolution", "bits"):
        if not all(isinstance(value, int) for value in options[name]):
            raise _out_of_bounds(name, options[name], "Give whole numbers.")
    if not all(size > 0 and size % 2 for size in options["kernel"]):
        raise _out_of_bounds("kernel", options["kernel"], "Give odd edges from 1.")
    for name, least in (("depth", 0), ("round_to", 1)):
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise _out_of_bounds(name, value, f"Give a whole number from {least}.")


def check_model(model: Any) -> None:
    """Raise InputError for a network in double precision, whose bytes no device profile counts."""
    if isinstance(model, nn.Module) and any(p.dtype == torch.float64 for p in model.parameters()):
        raise InputError(
            "The network computes in double precision", why="no device profile does", fix="Pass model.float()."
        )


def check_protected(gm: fx.GraphModule, protect: Iterable[str], blocks: Iterable[str]) -> None:
    """Raise InputError for a protected path that no operation, module or block has or lies below."""
    known = {str(n.meta.get("path")) for n in gm.graph.nodes} | {name for name, _ in gm.named_modules()} | {*blocks}
    for path in protect:
        if not any(own == path or own.startswith(f"{path}.") for own in known):
            raise InputError(
                f"There is nothing to protect at {path!r}",
                fix="Name modules as model.named_modules() does, or operations as a report does.",
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _out_of_bounds(name: str, value: Any, fix: str) -> InputError:
    return InputError(f"{name} = {value!r} is out of bounds", fix=fix)
