"""A latency table of a supernet on a device: measured networks, and times of choices that add up to any other's.

Whole sub-networks are timed, each against the largest one in the same rounds, so that a machine that slows down slows
both. A table is fitted to part of them and tried on the others: milliseconds of every choice, that add up, and rates
per multiply-add and per byte of weights, which are products of choices (a layer's input and output). There are more
choices than measurements: what these leave open, the bytes that a choice touches and its number of operations say.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palmette.errors import InputError, RunError
from palmette.files import read_json, write_json
from palmette.graph.capture import example_of
from palmette.graph.inputs import with_batch
from palmette.meter.compute import evaluating
from palmette.meter.latency import hardware
from palmette.meter.runtimes import check_runtime, runners
from palmette.seeding import derive_seed
from palmette.supernet.codes import Codes, Floats, Ints
from palmette.supernet.fit import Error, features, fit_times, held_out_error, work_of
from palmette.supernet.memory import MemoryModel
from palmette.supernet.space import Choice, Config, key_of
from palmette.supernet.supernet import Supernet

FORMAT = 2
GROUP = 4
"""Sub-networks that are timed in turn with the largest."""
HELD_OUT = 4
"""Every so many-th drawn network is not fitted but predicted."""
FEWEST = 12
"""Networks below which no table is fitted."""
_ROUNDS, _FEWEST_ROUNDS, _GROUP_S, _SAMPLE_MS = 100, 15, 3.0, 2.0
"""Rounds, fewer where they last longer than seconds for a group; and how long a sample is at least."""


@dataclass(frozen=True)
class Device:
    """What was measured with: runtime, threads, batch, and the hardware with the versions of the libraries."""

    runtime: str
    threads: int
    batch: int
    hardware: str


@dataclass(frozen=True)
class Row:
    """A measured network: medians of itself and of the largest in the same rounds, in milliseconds.

    ratio: the median over the rounds of its time divided by the largest's in that round.
    """

    config: Config
    median_ms: float
    reference_ms: float
    ratio: float
    held_out: bool


@dataclass(frozen=True)
class LatencyTable:
    """The latency of a configuration: `base_ms`, one entry of each choice that matters, and rates times work.

    entries: name of a choice -> value -> milliseconds, of which only differences within a choice mean something.
    ms_per_mac, ms_per_byte: of multiply-adds, and of bytes of weights. rows: what was measured. error: of predictions
    for networks that were not fitted. largest: multiply-adds and bytes of the supernet's largest network.
    """

    device: Device
    base_ms: float
    entries: dict[str, dict[int, float]]
    ms_per_mac: float
    ms_per_byte: float
    rows: tuple[Row, ...]
    error: Error
    largest: tuple[float, float]

    def vector(self, codes: Codes) -> Floats:
        """Milliseconds [codes.width]: times `codes.mattering`, the part of the latency that adds up over choices.

        Raises InputError for a space of other choices or values than the table's.
        """
        wanted = {choice.name: sorted(choice.values) for choice in codes.choices}
        for name in {**wanted, **self.entries}:
            if wanted.get(name) != sorted(self.entries.get(name, {})):
                raise _foreign(f"'{name}' is one of {sorted(self.entries.get(name, {}))} there")
        found = codes.constant(self.base_ms)
        for choice in codes.choices:
            found += codes.of(choice.name, [self.entries[choice.name][v] for v in choice.values])
        return found

    def check(self, memory: MemoryModel) -> None:
        """Raise InputError for a table of another supernet than that of a memory model."""
        self.vector(memory.codes)
        work = work_of(memory, memory.codes.encode([memory.net.max()]))[0]
        if tuple(work) != tuple(self.largest):
            raise _foreign("its largest network has other multiply-adds or weights")

    def predict(self, memory: MemoryModel, codes: Ints) -> Floats:
        """Milliseconds [n] of codes [n, choices]. Raises InputError as `vector`."""
        found: Floats = memory.codes.mattering(codes) @ self.vector(memory.codes)
        rates = np.array([self.ms_per_mac, self.ms_per_byte])
        found += work_of(memory, codes) @ rates
        return found

    def save(self, path: str | Path) -> None:
        """Write the table as JSON. Raises RunError when it cannot be written."""
        write_json(path, _journal(self.device, self.entries, self.rows) | self._fitted())

    def _fitted(self) -> dict[str, Any]:
        rates = {"ms_per_mac": self.ms_per_mac, "ms_per_byte": self.ms_per_byte}
        fitted = {"base_ms": self.base_ms, "entries": self.entries, **rates, "error": asdict(self.error)}
        return {**fitted, "largest": list(self.largest)}

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """The table in a file. Raises RunError when it is missing, damaged, or still being measured."""
        raw = _read(Path(path))
        if "entries" not in raw:
            raise RunError(
                "The latency table is not finished", where=str(path), fix="Go on: palmette profile ... --resume"
            )
        with _whole(Path(path)):
            entries = {name: {int(v): float(ms) for v, ms in times.items()} for name, times in raw["entries"].items()}
            rows = tuple(Row(**row) for row in raw["rows"])
            base, mac, byte = (float(raw[name]) for name in ("base_ms", "ms_per_mac", "ms_per_byte"))
            largest = [float(amount) for amount in raw["largest"]]
            device, error = Device(**raw["device"]), Error(**raw["error"])
            return LatencyTable(device, base, entries, mac, byte, rows, error, (largest[0], largest[1]))


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

    Inputs have the size that the supernet was made with, or that a network's resolution says. Among the networks are
    the largest and the smallest; the others are drawn from `seed`, small ones as often as large ones, and every fourth
    is kept for the error alone. path: a JSON file that is written after every group of 4, and from which a later call
    goes on to the same networks.
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

    All their weights have the most bits: runtimes are given networks in floating point, so that fewer save no time.
    Raises InputError when there are fewer than 12 of them.
    """
    rng, space = np.random.default_rng(derive_seed("latencies", seed)), net.space
    whole = {c.name: c.values[-1] for c in space.of_kind("bits")}
    found = {key_of(config): config for config in (space.max(), space.canonical({**space.min(), **whole}))}
    for _ in range(100 * count):
        if len(found) == count:
            break
        share = rng.random()
        raw = {c.name: int(c.values[rng.binomial(len(c.values) - 1, share)]) for c in space.choices}
        config = space.canonical({**raw, **whole})
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
    times = np.array([reference * row.ratio for row in rows])
    held = np.array([row.held_out for row in rows])
    encoded = codes.encode(row.config for row in rows)
    onehot, work = codes.mattering(encoded), work_of(memory, encoded)
    vector, rates = fit_times(onehot[~held], work[~held], times[~held], features(memory))
    error = held_out_error(times[held], onehot[held] @ vector + work[held] @ rates)
    entries = {c.name: _entries(c, vector[codes.first[c.name] :]) for c in codes.choices}
    macs, weights = (float(amount) for amount in work_of(memory, codes.encode([net.max()]))[0])
    return LatencyTable(
        device, float(vector[0]), entries, float(rates[0]), float(rates[1]), rows, error, (macs, weights)
    )


def timed(net: Supernet, config: Config, table: LatencyTable) -> float:
    """Milliseconds of a network now, on the table's scale: its time over the largest's, times the table's largest."""
    row = _timed(net, [(1, config)], table.device)[0]
    return row.ratio * statistics.median(other.reference_ms for other in table.rows)


def _entries(choice: Choice, times: Floats) -> dict[int, float]:
    """Milliseconds by value, from a vector that begins with those of the choice; bits take no time."""
    last = len(choice.values) - 1
    return {v: float(times[last if choice.kind == "bits" else i]) for i, v in enumerate(choice.values)}


def _timed(net: Supernet, group: list[tuple[int, Config]], device: Device) -> list[Row]:
    """The networks of a group (number, configuration), timed in turn with the largest."""
    networks: dict[str, Any] = {"largest": net.extract(net.max())}
    networks |= {str(i): net.extract(config) for i, config in group}
    sync = torch.cuda.synchronize if next(net.parameters()).is_cuda else None
    before = torch.get_num_threads()
    torch.set_num_threads(device.threads)
    try:
        with evaluating(*networks.values()):
            passes: dict[str, Callable[[], Any]] = {}
            for name, network in networks.items():  # one by one: each has inputs of its own resolution
                inputs = with_batch(example_of(network), device.batch)
                passes |= runners({name: network}, inputs, device.runtime, device.threads, fast=True)
            with torch.inference_mode():
                samples = _rounds(passes, sync)
    finally:
        torch.set_num_threads(before)
    times = {name: np.array(taken) for name, taken in samples.items()}
    largest = times["largest"]
    middle = {name: (float(np.median(t)), float(np.median(t / largest))) for name, t in times.items()}
    reference = middle["largest"][0]
    return [Row(c, middle[str(i)][0], reference, middle[str(i)][1], _is_held_out(i)) for i, c in group]


def _rounds(passes: dict[str, Callable[[], Any]], sync: Callable[[], None] | None) -> dict[str, list[float]]:
    """Milliseconds of a pass, in turn and in alternating order.

    Before each sample a pass runs untimed: whoever came before has taken the caches, and by how much that slows a
    network down depends on its neighbours.
    """

    def sample(run: Callable[[], Any], repeats: int) -> float:
        run()
        if sync is not None:
            sync()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if sync is not None:
            sync()
        return (time.perf_counter() - start) * 1e3 / repeats

    fastest = {name: min(sample(run, 1) for _ in range(5)) for name, run in passes.items()}
    repeats = {name: max(1, math.ceil(_SAMPLE_MS / max(ms, 1e-3))) for name, ms in fastest.items()}
    taken: dict[str, list[float]] = {name: [] for name in passes}
    order, start = list(passes), time.monotonic()
    for done in range(_ROUNDS):
        if done >= _FEWEST_ROUNDS and time.monotonic() - start > _GROUP_S:
            break
        for name in order:
            taken[name].append(sample(passes[name], repeats[name]))
        order.reverse()
    return taken


def _is_held_out(number: int) -> bool:
    """Every fourth, at another place of each group; never the largest or the smallest."""
    return number > 1 and (number + number // GROUP) % HELD_OUT == 0


# ---- the file --------------------------------------------------------------------------------------------------------


def _choices(choices: Iterable[Choice]) -> dict[str, list[int]]:
    return {choice.name: list(choice.values) for choice in choices}


def _journal(device: Device, choices: Mapping[str, Iterable[int]], rows: Iterable[Row]) -> dict[str, Any]:
    return {
        "palmette_latency": FORMAT,
        "device": asdict(device),
        "choices": {name: list(values) for name, values in choices.items()},
        "rows": [asdict(row) for row in rows],
    }


def _read(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("palmette_latency") != FORMAT:
        raise RunError("The file is no latency table of this version", where=str(path), fix="Measure one again.")
    return raw


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Within the block what a file lacks, or holds in its place, is a RunError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(
            "The latency table is damaged", where=str(path), why=f"{type(error).__name__}: {error}",
            fix="Delete the file and measure again.",
        ) from error  # fmt: skip


def _foreign(why: str) -> InputError:
    return InputError(
        "The latency table was measured for another supernet",
        why=why,
        fix="Measure one for this supernet: measure_latencies(net), or palmette profile with the same options.",
    )


def _known(path: Path, device: Device, choices: Iterable[Choice]) -> list[Row]:
    """The rows in a file that was begun before. Raises RunError when they are of another device or supernet."""
    raw = _read(path)
    with _whole(path):
        return _rows_of(raw, path, device, choices)


def _rows_of(raw: dict[str, Any], path: Path, device: Device, choices: Iterable[Choice]) -> list[Row]:
    fix = "Name another file, or delete this one."
    for name, value in asdict(device).items():
        if raw["device"].get(name) != value:
            was = raw["device"].get(name)
            raise RunError(
                f"The latency table was measured with another {name}", where=str(path), why=f"{was}, not {value}",
                fix=fix,
            )  # fmt: skip
    if raw["choices"] != _choices(choices):
        raise RunError("The latency table is of another supernet", where=str(path), fix=fix)
    return [Row(**row) for row in raw["rows"]]
