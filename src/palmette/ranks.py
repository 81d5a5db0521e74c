"""Processes that work on one run together: who leads, shares of the batches, sums over all, one voice for decisions.

The processes are those of torch.distributed (Lightning Fabric starts them). They act together only inside `together()`;
outside it, inside `alone()` and without a process group, every function here is that of a single process, so that
nothing ever waits for a process which does not come. Values travel as JSON, sums as int64 and float64.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from palmette.errors import PalmetteError, RunError, error_from

if TYPE_CHECKING:  # the command line answers --help without torch
    import torch
    from torch import Tensor

T = TypeVar("T")

_acting: ContextVar[bool | None] = ContextVar("acting together", default=None)  # False: alone, on purpose

_RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
_GONE = re.compile(r"gloo|nccl|peer|connection|broken pipe|socket|process ?group", re.IGNORECASE)


class Summable(Protocol):
    """What is gathered over batches and can be added up over processes."""

    def totals(self) -> dict[str, Tensor]:
        """The tensors gathered so far, int64 or float64, by a name that says the same in every process."""

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on with the totals of all processes; a name may be new here, where only others met it."""


@contextmanager
def together() -> Iterator[None]:
    """Inside the block the processes of torch.distributed, if there are several, work on one thing."""
    dist = _distributed()
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    yield from _switched(several and _acting.get() is not False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process works for itself."""
    yield from _switched(False)


def _switched(on: bool) -> Iterator[None]:
    token = _acting.set(on)
    try:
        yield
    finally:
        _acting.reset(token)


def count() -> int:
    """How many processes work together here."""
    return int(_distributed().get_world_size()) if _acting.get() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(_distributed().get_rank()) if _acting.get() else 0


def leads() -> bool:
    """Whether this process speaks for all: the first, or the only one."""
    return rank() == 0


def is_first() -> bool:
    """Whether this process is the first of those that were started together, by what their environment says."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return bool(dist.get_rank() == 0)
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def mine(number: int) -> bool:
    """Whether piece `number` of a work in pieces falls to this process: they are dealt out in turn."""
    return number % count() == rank()


def shard(pieces: Iterable[T]) -> Iterator[T]:
    """The pieces that fall to this process, in order. All are drawn, so that every process sees the same sequence."""
    return (piece for number, piece in enumerate(pieces) if mine(number))


def from_first(work: Callable[[], T]) -> T:
    """What `work()` gives in the first process, which alone does it while the others wait.

    Among several it is a JSON value, and an error is raised in every process.
    """
    if count() == 1:
        return work()
    wait()
    answer: dict[str, Any] = {}
    failure: Exception | None = None
    if leads():
        try:
            with alone():
                answer["value"] = work()
        except Exception as error:  # noqa: BLE001 - raised below, once the others know
            failure = error
            answer["error"] = in_words(error)
    heard = json.loads(_told(json.dumps(answer)))
    if failure is not None:
        raise failure
    if "error" in heard:
        raise _theirs(heard["error"])
    value: T = answer["value"] if leads() else heard["value"]
    return value


def gathered(value: Any) -> list[Any]:
    """The JSON value of each process, in their order."""
    if count() == 1:
        return [value]
    import torch

    own = _bytes(json.dumps(value))
    sizes = [int(size) for size in _all(torch.tensor([own.numel()], dtype=torch.int64))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: own.numel()] = own
    return [json.loads(_text(part[:size])) for part, size in zip(_all(padded), sizes, strict=True)]


@contextmanager
def joint() -> Iterator[None]:
    """A work done in shares, without sums inside the block: an error in one process is raised in all at its end.

    Without it the others would wait for the one that failed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if count() == 1:
            raise
        failure = error
    words = gathered(None if failure is None else in_words(failure))
    if failure is not None:
        if isinstance(failure, PalmetteError):
            failure.told = True
        raise failure
    for number, other in enumerate(words):
        if other is not None:
            raise _theirs({**other, "where": other.get("where") or f"process {number}"})


def _theirs(words: dict[str, Any]) -> PalmetteError:
    """The error of another process."""
    error = error_from(words)
    error.told = True
    return error


def in_words(error: Exception) -> dict[str, Any]:
    """An error as JSON; one of another family as a RunError."""
    if isinstance(error, PalmetteError):
        return error.to_dict()
    return RunError("A process failed", why=f"{type(error).__name__}: {error}").to_dict()


def add_up(parts: Sequence[Summable]) -> None:
    """Give each of `parts` the totals over all processes; these hold as many parts, in the same order.

    Counts are exact. One sum per type of number, whatever the number of parts. Raises TypeError for other types.
    """
    if count() == 1:
        return
    import torch

    own = [part.totals() for part in parts]
    if other := {t.dtype for sums in own for t in sums.values()} - {torch.int64, torch.float64}:
        raise TypeError(f"totals are int64 or float64, not {other}")
    layouts = gathered([{name: [str(t.dtype), list(t.shape)] for name, t in sums.items()} for sums in own])
    merged = [{name: spec for layout in layouts for name, spec in layout[i].items()} for i in range(len(parts))]
    totals: list[dict[str, Tensor]] = [{} for _ in parts]
    for dtype in (torch.int64, torch.float64):
        entries = [
            (i, name, shape)
            for i, names in enumerate(merged)
            for name, (kind, shape) in sorted(names.items())
            if kind == str(dtype)
        ]
        if not entries:
            continue
        zeros = {(i, name): torch.zeros(shape, dtype=dtype) for i, name, shape in entries}
        flat = _summed(torch.cat([own[i].get(name, zeros[i, name]).cpu().reshape(-1) for i, name, _ in entries]))
        for (i, name, shape), total in zip(entries, flat.split([math.prod(s) for _, _, s in entries]), strict=True):
            there = own[i].get(name)
            totals[i][name] = total.reshape(shape).to("cpu" if there is None else there.device)
    for part, sums in zip(parts, totals, strict=True):
        part.take(sums)


def _summed(values: Tensor) -> Tensor:
    """The sum of a flat tensor over the processes, on the CPU."""
    moved = values.to(_device(), copy=True)
    with reached():
        _distributed().all_reduce(moved)
    return moved.cpu()


@contextmanager
def reached() -> Iterator[None]:
    """Raises RunError where torch.distributed says that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).partition("\n")[0]
        if not _GONE.search(words):
            raise
        gone = RunError(
            "Another process of this run has ended", why=words, fix="What it printed says why; --resume goes on."
        )
        gone.told = True
        raise gone from error


def wait() -> None:
    """Until every process is here."""
    if count() > 1:
        import torch

        _summed(torch.ones(1, dtype=torch.int64))


def _told(text: str) -> str:
    """The first process's text."""
    import torch

    own, dist = _bytes(text), _distributed()
    size = torch.tensor([own.numel()], dtype=torch.int64, device=_device())
    with reached():
        dist.broadcast(size, src=0)
        heard = own.to(_device()) if leads() else torch.zeros(int(size), dtype=torch.uint8, device=_device())
        dist.broadcast(heard, src=0)
    return _text(heard.cpu())


def _all(own: Tensor) -> list[Tensor]:
    """The tensor of each process, all of one shape, on the CPU."""
    import torch

    moved = own.to(_device())
    parts = [torch.empty_like(moved) for _ in range(count())]
    with reached():
        _distributed().all_gather(parts, moved)
    return [part.cpu() for part in parts]


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed


def _bytes(text: str) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _text(data: Tensor) -> str:
    return bytes(data.tolist()).decode()


def _device() -> torch.device:
    """Where the process group wants its tensors."""
    import torch

    if _distributed().get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
