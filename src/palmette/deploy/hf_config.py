"""Rewrite the config of a Hugging Face model so that its class builds fewer repeated layers.

Which attribute holds the number of layers is found by trying: one whose value is that number is lowered, and the class
is built without memory (on the meta device) to see whether it then has the names and shapes that are left. Nothing
is known of any architecture.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Place = tuple[str | int, ...]
"""Where a value stands in a config: names of attributes, and indices into lists."""


@dataclass(frozen=True)
class Kept:
    """A container of numbered layers: its path, how many layers it had, and the indices of those that stay."""

    path: str
    count: int
    indices: tuple[int, ...]


def renumbered(name: str, containers: Sequence[Kept]) -> str | None:
    """The name that an entry of the dense network has when the dropped layers are gone; None when it goes with one."""
    for kept in containers:
        prefix = f"{kept.path}."
        if name.startswith(prefix):
            index, dot, rest = name[len(prefix) :].partition(".")
            if index.isdigit():
                if int(index) not in kept.indices:
                    return None
                name = f"{prefix}{kept.indices.index(int(index))}{dot}{rest}"
    return name


def shortened(source: nn.Module, containers: Sequence[Kept]) -> Iterator[Any]:
    """Configs whose model has the layers that are left, and no others; the model is not yet held against anything.

    source: a PreTrainedModel. Its own config, copied, when `containers` is empty.
    """
    config: Any = source.config
    if not containers:
        yield copy.deepcopy(config)
        return
    shapes = {name: tuple(value.shape) for name, value in source.state_dict().items()}
    wanted = {new: shape for name, shape in shapes.items() if (new := renumbered(name, containers)) is not None}
    listed = any(_lists(config, kept.count) for kept in containers)
    for slicing in (True, False) if listed else (False,):  # per-layer lists are cut; one as long by chance stays
        for places in itertools.product(*(list(_counts(config, kept.count)) for kept in containers)):
            changed = _changed(config, containers, places, slicing)
            if changed is not None and _shapes(type(source), changed) == wanted:
                yield changed


def _changed(config: Any, containers: Sequence[Kept], places: Sequence[Place], slicing: bool) -> Any:
    """A copy with fewer layers at these places; None where they do not go together."""
    changed = copy.deepcopy(config)
    try:
        for kept, place in zip(containers, places, strict=True):
            for where in _lists(changed, kept.count) if slicing else ():
                if where != place[: len(where)]:
                    old = _get(changed, where)
                    _set(changed, where, type(old)(old[i] for i in kept.indices))
            _set(changed, place, len(kept.indices))
    except Exception:  # noqa: BLE001 (any attribute is tried: a config may refuse its new value in any way)
        return None
    return changed


def _shapes(kind: type[nn.Module], config: Any) -> Mapping[str, tuple[int, ...]] | None:
    """Names and shapes of a model of that config; None where the config makes no model."""
    try:
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))
    except Exception:  # noqa: BLE001 (any attribute is tried: a class may fail on its new value in any way)
        return None
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _counts(config: Any, count: int) -> Iterator[Place]:
    """Where a config holds the whole number `count`: attributes, entries of lists, those of configs inside."""
    for place, value in _values(config):
        if type(value) is int and value == count:
            yield place
        elif isinstance(value, list | tuple):
            yield from ((*place, i) for i, entry in enumerate(value) if type(entry) is int and entry == count)


def _lists(config: Any, count: int) -> list[Place]:
    return [place for place, value in _values(config) if isinstance(value, list | tuple) and len(value) == count]


def _values(config: Any, before: Place = ()) -> Iterator[tuple[Place, Any]]:
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name == "architectures":
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _values(value, (*before, name))
        else:
            yield (*before, name), value


def _get(config: Any, place: Place) -> Any:
    for step in place:
        config = config[step] if isinstance(step, int) else getattr(config, step)
    return config


def _set(config: Any, place: Place, value: Any) -> None:
    owner, last = _get(config, place[:-1]), place[-1]
    if isinstance(last, str):
        setattr(owner, last, value)
    elif isinstance(owner, list):
        owner[last] = value
    else:
        _set(config, place[:-1], (*owner[:last], value, *owner[last + 1 :]))
