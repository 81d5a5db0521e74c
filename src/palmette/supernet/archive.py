"""Measured networks on disk, and the best of them within a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from palmette.errors import InputError, RunError
from palmette.files import plain, read_bytes, write_atomic


@dataclass(frozen=True)
class Measured:
    """One network: its text (palmette.supernet.coding), its value (the larger the better), its peak memory."""

    network: str
    value: float
    peak: int


class Archive:
    """A file of measured networks, one JSON line each below a first line that says what is in it.

    about: what all entries share (space, metric of the peak, data, weights); a file about something else is refused, so
    that figures of two kinds never mix. What is within a budget is within a looser one, so `best` never gets worse as
    the budget grows. Every `add` leaves a whole file behind; a search that was stopped goes on from there. One process
    writes at a time. Raises RunError naming file and line when the file is damaged, InputError when it is about
    something else.
    """

    def __init__(self, path: str | Path, about: dict[str, Any]) -> None:
        self.path, self.about = Path(path), plain(about, "what an archive is about")
        self._entries: dict[str, Measured] = {}
        if self.path.exists():
            self._read()

    def add(self, *entries: Measured) -> None:
        """Add or replace measurements; the last one of a network counts. Raises InputError, RunError."""
        added = [Measured(entry.network, float(entry.value), int(entry.peak)) for entry in entries]
        for entry in added:
            if not math.isfinite(entry.value) or entry.peak < 0:
                raise InputError(f"{entry} is no measurement", why="a finite value and a peak of at least 0 are needed")
        self._entries |= {entry.network: entry for entry in added}
        lines = [{"archive": 1, "about": self.about}, *(asdict(entry) for entry in self)]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def best(self, budget: int | None = None) -> Measured | None:
        """The entry with the largest value whose peak is within the budget, the leaner of equals; None without one."""
        within = [entry for entry in self if budget is None or entry.peak <= budget]
        return max(within, key=lambda entry: (entry.value, -entry.peak), default=None)

    def front(self) -> list[Measured]:
        """The entries that `best` can return, from the leanest on: value and peak both rise."""
        found: list[Measured] = []
        for entry in sorted(self, key=lambda entry: (entry.peak, -entry.value)):
            if not found or entry.value > found[-1].value:
                found.append(entry)
        return found

    def get(self, network: str) -> Measured | None:
        """The measurement of exactly this network, None if it was never measured."""
        return self._entries.get(network)

    def __iter__(self) -> Iterator[Measured]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self) -> None:
        first, *lines = read_bytes(self.path).splitlines() or [b""]
        about = self._parse(1, first).get("about")
        if about != self.about:
            raise InputError(
                "An archive is about something else",
                where=str(self.path),
                why=f"it says {about}, asked for is {self.about}",
                fix="Use another file.",
            )
        for number, line in enumerate(lines, 2):
            parts = self._parse(number, line)
            try:
                entry = Measured(str(parts["network"]), float(parts["value"]), int(parts["peak"]))
            except (KeyError, TypeError, ValueError) as error:
                raise self._damaged(number, f"{type(error).__name__}: {error}") from error
            self._entries[entry.network] = entry

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            parts = json.loads(line)
        except ValueError as error:
            raise self._damaged(number, str(error)) from error
        if not isinstance(parts, dict):
            raise self._damaged(number, "it is no JSON object")
        return parts

    def _damaged(self, number: int, why: str) -> RunError:
        return RunError(
            "An archive is damaged", where=f"{self.path}, line {number}", why=why, fix="Delete that line, or the file."
        )
