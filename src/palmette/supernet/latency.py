"""A latency table of a supernet on a device: measured networks, and times of choices that add up to any other's.

Whole sub-networks are timed, each against the largest one in the same rounds, so that a machine that slows down slows
both. A table that is linear in the code of a configuration is fitted to part of them and tried on the others. There are
more choices than measurements: what the measurements leave open, the multiply-adds, the bytes that are touched and the
number of operations of a choice say.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palmette.errors import InputError, RunError
from palmette.files import read_json, write_json
from palmette.graph.capture import example_of
from palmette.meter.latency import hardware, measure_latency
from palmette.meter.runtimes import check_runtime
from palmette.seeding import derive_seed
from palmette.supernet.codes import Codes, Floats, Ints
from palmette.supernet.fit import Error, features, fit_linear, held_out_error
from palmette.supernet.memory import MemoryModel
from palmette.supernet.space import Choice, Config, key_of
from palmette.supernet.supernet import Supernet

FORMAT = 1
GROUP = 4
"""Sub-networks that are timed in turn with the largest."""
HELD_OUT = 4
"""Every so many-th drawn network is not fitted but predicted."""
FEWEST = 12
"""Networks below which no table is fitted."""
_SAMPLES, _ROUND_S = 30, 4.0


@dataclass(frozen=True)
class Device:
    """What was measured with: runtime, threads, batch, and the hardware with the versions of the libraries."""

    runtime: str
    threads: int
    batch: int
    hardware: str


@dataclass(frozen=True)
class Row:
    """A measured network: medians of itself and of the largest in the same rounds, in milliseconds."""

    config: Config
    median_ms: float
    reference_ms: float
    held_out: bool


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds that add up: the latency of a configuration is `base_ms` and one entry of each choice that matters.

    entries: name of a choice -> value -> milliseconds, of which only differences within a choice mean something.
    rows: what was measured. error: of predictions for networks that were not fitted.
    """

    device: Device
    base_ms: float
    entries: dict[str, dict[int, float]]
    rows: tuple[Row, ...]
    error: Error

    def vector(self, codes: Codes) -> Floats:
        """Milliseconds [codes.width]: times `codes.mattering`, the latency.

        Raises InputError for a space that has choices or values which the table has not.
        """
        found = codes.constant(self.base_ms)
        for choice in codes.choices:
            known = self.entries.get(choice.name, {})
            missing = [v for v in choice.values if v not in known]
            if missing:
                raise InputError(
                    f"The latency table knows no '{choice.name}' of {missing[0]}",
                    why="it was measured for another supernet",
                    fix="Measure one for this supernet: measure_latencies(net), or palmette profile.",
                )
            found += codes.of(choice.name, [known[v] for v in choice.values])
        return found

    def predict(self, codes: Codes, rows: Ints) -> Floats:
        """Milliseconds [n] of codes [n, choices], linear in `codes.mattering(rows)`. Raises InputError as `vector`."""
        found: Floats = codes.mattering(rows) @ self.vector(codes)
        return found

    def save(self, path: str | Path) -> None:
        """Write the table as JSON. Raises RunError when it cannot be written."""
        write_json(path, _journal(self.device, self.entries, self.rows) | self._fitted())

    def _fitted(self) -> dict[str, Any]:
        return {"base_ms": self.base_ms, "entries": self.entries, "error": asdict(self.error)}

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """The table in a file. Raises RunError when it is missing, damaged, or still being measured."""
        raw = _read(Path(path))
        if "entries" not in raw:
            raise RunError(
                "The latency table is not finished", where=str(path), fix="Go on: palmette profile ... --resume"
            )
        entries = {name: {int(v): float(ms) for v, ms in times.items()} for name, times in raw["entries"].items()}
        rows = tuple(Row(**row) for row in raw["rows"])
        return LatencyTable(Device(**raw["device"]), float(raw["base_ms"]), entries, rows, Error(**raw["error"]))


def measure_latencies(
    net: Supernet,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    count: int = 48,
    budget_seconds: float | None = None,
    seed: int = 0,
    path: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> LatencyTable:
    """Time `count` sub-networks in a runtime of this machine, and fit the table from which any other's time follows.

    Inputs have the size that the supernet was made with. Among the networks are the largest and the smallest; the
    others are drawn from `seed`, small ones as often as large ones, and every fourth is kept for the error alone. path:
    a JSON file that is written after every group of 4, and from which a later call goes on to the same networks.
    budget_seconds: stop after the group that exceeds it, once there are 12. say: is told of the progress.

    Raises InputError for fewer than 12 networks, a space without so many, or an unknown runtime, MissingDependency
    without the runtime's packages, ExportError when a network does not run there, RunError for a file of another
    device or supernet.
    """
    if count < FEWEST or threads < 1 or batch < 1:
        raise InputError(f"count = {count}, threads = {threads}, batch = {batch}", fix=f"At least {FEWEST}, 1 and 1.")
    device = Device(check_runtime(runtime), threads, batch, hardware(runtime, next(net.parameters()).device))
    file = None if path is None else Path(path)
    rows = [] if file is None or not file.exists() else _known(file, device, net.space.choices)
    configs, start = drawn(net, count, seed), time.monotonic()
    done = {key_of(row.config) for row in rows}
    waiting = [(i, config) for i, config in enumerate(configs) if key_of(config) not in done]
    for first in range(0, len(waiting), GROUP):
        spent = time.monotonic() - start
        if budget_seconds is not None and spent > budget_seconds and len(rows) >= FEWEST:
            break
        rows += _timed(net, waiting[first : first + GROUP], device)
        if file is not None:
            write_json(file, _journal(device, _choices(net.space.choices), rows))
        if say is not None:
            last = rows[-1]
            say(f"{len(rows)} of {len(configs)} networks, {time.monotonic() - start:.0f} s, {last.median_ms:.4g} ms")
    table = fit_table(net, device, rows)
    if file is not None:
        table.save(file)
    return table


def drawn(net: Supernet, count: int, seed: int) -> list[Config]:
    """Different configurations: the largest, the smallest, and some drawn with a share of largeness of their own each.

    Raises InputError when there are fewer than 12 of them.
    """
    rng, space = np.random.default_rng(derive_seed("latencies", seed)), net.space
    found = {key_of(config): config for config in (space.max(), space.min())}
    for _ in range(100 * count):
        if len(found) == count:
            break
        share = rng.random()
        raw = {c.name: int(c.values[rng.binomial(len(c.values) - 1, share)]) for c in space.choices}
        config = space.canonical(raw)
        found.setdefault(key_of(config), config)
    if len(found) < FEWEST:
        raise InputError(
            f"The supernet has only {len(found)} networks, too few for a table", fix="Time them: pm.measure_latency."
        )
    return list(found.values())


def fit_table(net: Supernet, device: Device, rows: Iterable[Row]) -> LatencyTable:
    """The table of measured networks. Raises InputError for fewer than 12, or none that is held out."""
    rows = tuple(rows)
    if len(rows) < FEWEST or not any(row.held_out for row in rows):
        raise InputError(f"{len(rows)} measured networks are too few for a table", fix=f"Measure {FEWEST} or more.")
    memory = MemoryModel(net)
    codes = memory.codes
    reference = statistics.median(row.reference_ms for row in rows)
    times = np.array([reference * row.median_ms / row.reference_ms for row in rows])
    held = np.array([row.held_out for row in rows])
    onehot = codes.mattering(codes.encode(row.config for row in rows))
    vector = fit_linear(onehot[~held], times[~held], features(memory))
    error = held_out_error(times[held], onehot[held] @ vector)
    entries = {
        c.name: {v: float(vector[codes.first[c.name] + i]) for i, v in enumerate(c.values)} for c in codes.choices
    }
    return LatencyTable(device, float(vector[0]), entries, rows, error)


def _timed(net: Supernet, group: list[tuple[int, Config]], device: Device) -> list[Row]:
    """The networks of a group (number, configuration), timed in turn with the largest."""
    networks: dict[str, Any] = {"largest": net.extract(net.max())}
    networks |= {str(i): net.extract(config) for i, config in group}
    timed = measure_latency(
        networks,
        example_of(net.network),
        runtime=device.runtime,
        batch=device.batch,
        threads=device.threads,
        runs=_SAMPLES,
        budget_s=_ROUND_S,
        fast=True,
    )
    reference = timed["largest"].median_ms
    return [Row(c, timed[str(i)].median_ms, reference, i > 1 and i % HELD_OUT == 0) for i, c in group]


# ---- the file --------------------------------------------------------------------------------------------------------


def _choices(choices: Iterable[Choice]) -> dict[str, dict[int, float]]:
    return {choice.name: dict.fromkeys(choice.values, 0.0) for choice in choices}


def _journal(device: Device, entries: Mapping[str, Mapping[int, float]], rows: Iterable[Row]) -> dict[str, Any]:
    choices = {name: list(values) for name, values in entries.items()}
    return {
        "palmette_latency": FORMAT,
        "device": asdict(device),
        "choices": choices,
        "rows": [asdict(row) for row in rows],
    }


def _read(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("palmette_latency") != FORMAT:
        raise RunError("The file is no latency table of this version", where=str(path), fix="Measure one again.")
    return raw


def _known(path: Path, device: Device, choices: Iterable[Choice]) -> list[Row]:
    """The rows in a file that was begun before. Raises RunError when they are of another device or supernet."""
    raw = _read(path)
    fix = "Name another file, or delete this one."
    for name, value in asdict(device).items():
        if raw["device"].get(name) != value:
            was = raw["device"].get(name)
            raise RunError(
                f"The latency table was measured with another {name}", where=str(path), why=f"{was}, not {value}",
                fix=fix,
            )  # fmt: skip
    if raw["choices"] != {c.name: list(c.values) for c in choices}:
        raise RunError("The latency table is of another supernet", where=str(path), fix=fix)
    return [Row(**row) for row in raw["rows"]]
