"""Random numbers that can be repeated: seeds derived from names, states put aside and brought back.

The generators meant are the global ones (Python's `random`, NumPy's legacy one, torch's of every device in use) and
those that a loader carries (`torch.Generator`, `numpy.random.Generator`, `random.Random` on it, its samplers, its
dataset or the dataset's transform).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_globals(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the generator that users' code draws from
    torch.manual_seed(seed)


def global_state() -> dict[str, Tensor]:
    """State of the global generators, as tensors named rng.* that a file can hold."""
    version, words, python_gauss = random.getstate()
    _, keys, position, has_gauss, numpy_gauss = np.random.get_state()  # noqa: NPY002 - as above
    gauss = [math.nan if python_gauss is None else python_gauss, float(numpy_gauss)]
    state = {
        "rng.torch": torch.get_rng_state(),
        "rng.python": torch.tensor([version, *words], dtype=torch.int64),
        "rng.numpy": torch.tensor([*np.asarray(keys).tolist(), int(position), int(has_gauss)], dtype=torch.int64),
        "rng.gauss": torch.tensor(gauss, dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        state |= {f"rng.cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_globals(state: dict[str, Tensor]) -> None:
    """Bring back what `global_state` returned; devices that were not in use then are left alone."""
    version, *words = state["rng.python"].tolist()
    *keys, position, has_gauss = state["rng.numpy"].tolist()
    python_gauss, numpy_gauss = state["rng.gauss"].tolist()
    random.setstate((version, tuple(words), None if math.isnan(python_gauss) else python_gauss))
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, numpy_gauss))  # noqa: NPY002
    torch.set_rng_state(state["rng.torch"].clone())
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            if f"rng.cuda.{index}" in state:
                torch.cuda.set_rng_state(state[f"rng.cuda.{index}"].clone(), index)


@contextmanager
def preserved(*loaders: Any) -> Iterator[None]:
    """Put the global generators, and those of `loaders`, back at the end: the block leaves no trace in later draws."""
    state = global_state()
    owned = [(generator, _get_state(generator)) for loader in loaders for generator in generators(loader)]
    try:
        yield
    finally:
        restore_globals(state)
        for generator, saved in owned:
            _set_state(generator, saved)


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seed the global generators from `parts` for the block, and put them back afterwards."""
    with preserved():
        seed_globals(derive_seed(*parts))
        yield


def seed_loader(loader: Any, seed: int, epoch: int = 0) -> None:
    """Make the next `iter(loader)` repeatable: seed its generators, set the samplers' epoch, drop persistent workers.

    Persistent workers keep their random state from one epoch to the next, where nobody can save it, so they start
    afresh.
    The global generators are the caller's business (`seed_globals`).
    """
    for index, generator in enumerate(generators(loader)):
        _seed(generator, derive_seed(seed, index))
    for holder in _holders(loader):
        if isinstance(holder, DistributedSampler):
            holder.seed = seed >> 1  # its own is the same for every run
        if callable(getattr(holder, "set_epoch", None)):
            holder.set_epoch(epoch)
    if hasattr(loader, "_num_iter_calls"):  # Fabric's wrapper hands this count to a distributed sampler as its epoch
        loader._num_iter_calls = epoch
        loader = loader._dataloader
    if getattr(loader, "_iterator", None) is not None:
        loader._iterator = None


def generators(loader: Any) -> list[Any]:
    """The generators that the loader, its samplers and its datasets hold as attributes, each once."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    found: dict[int, Any] = {}
    for holder in _holders(loader):
        for value in vars(holder).values():
            if isinstance(value, kinds):
                found.setdefault(id(value), value)
    return list(found.values())


def _holders(loader: Any) -> list[Any]:
    """The loader and the samplers, datasets and loaders reachable from it, each once, those with attributes only."""
    found: dict[int, Any] = {}
    queue = [loader]
    while queue:
        holder = queue.pop(0)
        if holder is None or id(holder) in found or not hasattr(holder, "__dict__"):
            continue
        found[id(holder)] = holder
        queue += [vars(holder).get(name) for name in ("batch_sampler", "sampler", "dataset", "transform", "loader")]
    return list(found.values())


def _seed(generator: Any, seed: int) -> None:
    """Seed a generator of any of the kinds in place."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)


def _get_state(generator: Any) -> Any:
    """The state of a generator of any of the kinds."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    """Bring back the state of a generator of any of the kinds."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
