"""A progress bar on a terminal, and nothing at all in a log.

The environment variable PALMETTE_PROGRESS forces it on (1) or off (0).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import palmette.ranks as ranks

Report = Callable[[int, str], None]
"""`report(done, note)`: steps done so far and what to say beside the bar."""

_INTERVAL_SECONDS = 0.1


def shown() -> bool:
    """Whether bars are drawn: as PALMETTE_PROGRESS says, else when stderr is a terminal; by one process of several."""
    if not ranks.is_first():
        return False
    forced = os.environ.get("PALMETTE_PROGRESS")
    if forced in ("0", "1"):
        return forced == "1"
    return sys.stderr.isatty()


def _silent(_done: int, _note: str) -> None:
    """Report nothing."""


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Report]:
    """A bar named `label` on stderr that vanishes at the end; `total` is None when the length is unknown."""
    if not shown():
        yield _silent
        return
    console = Console(stderr=True, force_terminal=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as bar:
        task = bar.add_task(label, total=total, note="")
        last = 0.0

        def report(done: int, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _INTERVAL_SECONDS or done == total:
                last = now
                bar.update(task, completed=done, note=note)

        yield report
