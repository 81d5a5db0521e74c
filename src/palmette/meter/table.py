"""A journal of timing decisions: what was once measured is looked up, so that a resumed run decides the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from torch import nn

import palmette.ranks as ranks
from palmette.errors import InputError, RunError
from palmette.files import read_json, write_json
from palmette.meter.compute import macs
from palmette.meter.latency import measure_latency
from palmette.meter.runtimes import RUNTIMES, check_runtime

_SCHEMA = 1
_SAMPLES = 50
_BUDGET_S = 1.0
"""Time for the samples of one comparison; export and warm-up come on top, some 50 ms for a small part."""


class CostTable:
    """Costs by key, in milliseconds of a runtime or, for "macs", in multiply-adds; in a JSON file when `path` is given.

    A new measurement is in the file before it is returned. measure: False looks up only. threads: None is torch's
    present number. Raises InputError for an unknown runtime, MissingDependency without its packages, RunError for a
    file that is damaged or belongs to another runtime.
    """

    def __init__(
        self, runtime: str = "eager", path: Path | None = None, *, measure: bool = True, threads: int | None = None
    ) -> None:
        if runtime not in (*RUNTIMES, "macs"):
            raise InputError(f"No cost is called {runtime!r}", fix=f"Known: {', '.join(RUNTIMES)}, macs.")
        if measure and runtime != "macs":
            check_runtime(runtime)
        self.runtime, self.path, self.measure, self.threads = runtime, path, measure, threads
        self.entries: dict[str, Any] = {}
        if path is not None and path.exists():
            self.entries = _read(path, runtime)["entries"]

    @classmethod
    def stored(cls, path: Path) -> Self:
        """A table that only looks up what the file holds. Raises RunError when it is missing or damaged."""
        return cls(_read(path, None)["runtime"], path, measure=False)

    def compare(self, key: str, before: nn.Module, after: nn.Module, example_inputs: Any) -> tuple[float, float]:
        """Cost of both for the same inputs, at the batch these have; interleaved medians when not looked up.

        Raises RunError for an unknown key when the table may not measure, ExportError when a part does not export.
        """
        entry = self._entry(key, {"before": before, "after": after}, example_inputs)
        try:
            return float(entry["before"]), float(entry["after"])
        except KeyError as error:
            raise RunError(f"The cost table's entry {key!r} is no comparison", where=str(self.path)) from error

    def time(self, key: str, module: nn.Module, example_inputs: Any) -> float:
        """Cost of one module, at the batch of the inputs. Raises as `compare` does."""
        entry = self._entry(key, {"time": module}, example_inputs)
        try:
            return float(entry["time"])
        except KeyError as error:
            raise RunError(f"The cost table's entry {key!r} is a comparison", where=str(self.path)) from error

    def _entry(self, key: str, modules: dict[str, nn.Module], inputs: Any) -> dict[str, Any]:
        """What is known of the key, else measured: by the first of several processes, while the others wait."""
        known = self.entries.get(key)
        if known is None or ranks.count() > 1:
            found: dict[str, Any] = ranks.from_first(lambda: self.entries.get(key) or self._add(key, modules, inputs))
            self.entries[key] = known = found
        return known

    def _add(self, key: str, modules: dict[str, nn.Module], inputs: Any) -> dict[str, Any]:
        if not self.measure:
            raise RunError(
                f"The cost table has no entry {key!r}",
                where=str(self.path) if self.path else None,
                why="it was made for looking up only",
                fix="Measure again with a table that may measure.",
            )
        entry: dict[str, Any]
        if self.runtime == "macs":
            entry = {name: float(macs(module, inputs, batch=None)) for name, module in modules.items()}
        else:
            entry = self._measure(modules, inputs)
        self.entries[key] = entry
        if self.path is not None:
            write_json(self.path, {"schema": _SCHEMA, "runtime": self.runtime, "entries": self.entries})
        return entry

    def _measure(self, modules: dict[str, nn.Module], inputs: Any) -> dict[str, Any]:
        timed = measure_latency(
            modules,
            inputs,
            runtime=self.runtime,
            batch=None,
            threads=self.threads,
            runs=_SAMPLES,
            warmup=3,
            budget_s=_BUDGET_S,
            fast=True,
        )
        first = next(iter(timed.values()))
        entry: dict[str, Any] = {name: latency.median_ms for name, latency in timed.items()}
        return entry | {k: getattr(first, k) for k in ("runs", "batch", "threads", "dtype", "hardware")}


def _read(path: Path, runtime: str | None) -> dict[str, Any]:
    table = read_json(path)
    if not isinstance(table, dict) or table.get("schema") != _SCHEMA or not isinstance(table.get("entries"), dict):
        raise RunError("The file is no cost table of this version", where=str(path), fix="Delete it to measure again.")
    found = str(table.get("runtime"))
    if runtime is not None and found != runtime:
        raise RunError(
            f"The cost table is for {found!r}, not for {runtime!r}", where=str(path), fix="Use another file or runtime."
        )
    return table
