"""Batches that can be drawn again: every epoch is seeded, and its torch draws are kept apart from the model's.

A loader draws shuffles, worker seeds and augmentation from the same global torch generator as dropout. Here the loader
has a stream of its own, so that its batches do not depend on what the model draws: two networks trained from one seed
see the same batches, and after an interruption the first batches of an epoch can be drawn again and left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from palmette.errors import DataError
from palmette.graph.inputs import tensors
from palmette.seeding import derive_seed, preserved, seed_globals, seed_loader
from palmette.train.checkpoint import digest

_repeatable: weakref.WeakSet[Any] = weakref.WeakSet()

_REPEAT_FIX = (
    "Draw from the global random generators, or from a torch.Generator held by the loader, its sampler or its dataset,"
    " and yield the same batches for the same seed."
)


class Epoch:
    """The batches of one pass over a loader, under a torch stream of its own."""

    def __init__(self, loader: Any, seed: int, epoch: int) -> None:
        """Seed the global generators and the loader's from `seed` and start iterating.

        Python's and NumPy's global generators go on being shared by the loader and the model.
        """
        seed_globals(seed)
        seed_loader(loader, seed, epoch)
        self.drawn = 0
        self._batches = iter(loader)
        self.state: Tensor = torch.get_rng_state()

    def next(self) -> Any:
        """The next batch. Raises StopIteration at the end."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            batch = next(self._batches)
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(outside)
        self.drawn += 1
        return batch

    def drop(self, count: int) -> None:
        """Draw and drop `count` batches. Raises DataError when there are fewer."""
        try:
            for _ in range(count):
                self.next()
        except StopIteration:
            raise DataError("The loader has fewer batches than it says", fix="Correct its __len__.") from None

    def skip(self, count: int, state: Tensor, fingerprint: str, where: str) -> None:
        """Draw and drop `count` batches, after which the stream and the last batch must be what they were before.

        Raises DataError when they are not: this loader cannot be resumed.
        """
        batch = None
        try:
            for _ in range(count):
                batch = self.next()
        except StopIteration:
            batch = None
        if not torch.equal(self.state, state) or (count > 0 and batch_fingerprint(batch) != fingerprint):
            raise DataError(
                "The loader gives other batches than before the interruption",
                where=where,
                why="it draws from a source that cannot be seeded, or its data changed",
                fix=_REPEAT_FIX,
            )


@contextmanager
def drawn(loader: Any, seed: int, epoch: int = 0) -> Iterator[Epoch]:
    """An `Epoch` for reading only: all generators are as before when the block ends."""
    with preserved(loader):
        yield Epoch(loader, seed, epoch)


def batch_fingerprint(batch: Any) -> str:
    """Digest of all tensors in a batch."""
    return digest({str(index): tensor for index, tensor in enumerate(tensors(batch))})


def check_iterable(loader: Any, *, once: bool = False) -> None:
    """Refuse what cannot be passed over (`once`, or again and again in the same way). Raises DataError saying why."""
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise DataError(f"A {type(loader).__name__} is no loader", fix="Pass a DataLoader or a list of batches.")
    if hasattr(loader, "__next__") and not once:
        raise DataError(
            "The loader is its own iterator",
            why="it can be passed over once only, and every epoch needs a fresh pass",
            fix="Pass a DataLoader, a list of batches, or an object whose __iter__ starts anew.",
        )
    if getattr(loader, "num_workers", 0) > 0 and not getattr(loader, "in_order", True):
        raise DataError(
            "The loader gives batches in the order in which its workers finish",
            why="that order cannot be repeated",
            fix="Set in_order=True.",
        )
    if length(loader) == 0:
        raise empty()


def check_repeatable(loader: Any, seed: int) -> None:
    """Draw the first batch twice from one seed, once per loader. Raises DataError when it differs or is missing."""
    try:
        if loader in _repeatable:
            return
    except TypeError:  # a list, say, cannot be remembered
        pass
    first = [_first_fingerprint(loader, derive_seed(seed, "repeatable")) for _ in range(2)]
    if first[0] != first[1]:
        raise DataError(
            "The loader cannot be seeded",
            why="its first batch differs between two passes from the same seed",
            fix=_REPEAT_FIX,
        )
    try:
        _repeatable.add(loader)
    except TypeError:
        return


def _first_fingerprint(loader: Any, seed: int) -> str:
    with drawn(loader, seed) as epoch:
        try:
            return batch_fingerprint(epoch.next())
        except StopIteration:
            raise empty() from None


def empty() -> DataError:
    """The error for a loader without batches."""
    return DataError("The loader is empty", fix="Check the data, and drop_last with fewer samples than a batch holds.")


def dealt(loader: Any, fabric: Fabric | None) -> Any:
    """The loader of this process's share of the samples; the loader itself where one process works."""
    if fabric is None or fabric.world_size == 1:
        return loader
    return fabric.setup_dataloaders(loader, move_to_device=False)


def length(loader: Any) -> int | None:
    """Number of batches, or None when the loader does not know."""
    try:
        return len(loader)
    except TypeError:
        return None
