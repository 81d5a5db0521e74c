"""Trials that the tests send to workers, and `trials_job.py JOURNAL LOG [ray]`, a driver that is there to be killed."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from palmette.errors import RefusedEdit
from palmette.trials import run_trials

ITEMS = {f"seed {number}/a": number for number in range(6)}


def draw(item: int, *, log: str = "", pause: float = 0.0) -> dict[str, Any]:
    """A trial that draws, and leaves a line for each time that it was done."""
    if log:
        with Path(log).open("a") as file:
            file.write(f"{item}\n")
    time.sleep(pause)
    return {"item": item, "draw": torch.rand(2).tolist(), "threads": torch.get_num_threads(), "process": os.getpid()}


def outputs(item: Any, *, network: Any, inputs: torch.Tensor) -> list[float]:
    """The outputs of a captured network, the item's own or the one that all trials share."""
    return (item or network)(inputs).flatten().tolist()


def refuse(item: int) -> None:
    """A trial that fails in a known way for one item."""
    if item == 2:
        raise RefusedEdit("it cannot be done", where="site", why="reasons", fix="Leave it out.")


def crash(item: int) -> int:
    """A trial that fails in an unknown way."""
    return 1 // item


def die(_: int) -> None:
    """A trial whose process ends."""
    os._exit(7)


def nothing(_: int) -> object:
    """A trial whose value is no JSON."""
    return object()


if __name__ == "__main__":
    torch.set_num_threads(1)
    journal, log, *address = sys.argv[1:]
    run_trials(partial(draw, log=log, pause=0.5), ITEMS, journal=journal, ray=address[0] if address else None)
