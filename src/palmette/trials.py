"""Independent trials: entries of an importance table, seeds, methods; one after the other, or spread by Ray.

Every finished trial is one JSON file in a journal folder before its value is used, so that an interrupted search goes
on from its table and computes only what is missing. Scheduling, serialisation and the cluster are Ray's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import palmette.ranks as ranks
from palmette.errors import MissingDependency, PalmetteError, RunError, error_from
from palmette.files import plain, read_json, write_json
from palmette.graph.ship import packed, unpacked
from palmette.seeding import seeded
from palmette.train.progress import progress

Trial = Callable[[Any], Any]
"""`trial(item)` -> a JSON value. For Ray: a function of a module that workers can import, or a `functools.partial` of
one; captured networks among its arguments, and in the items, travel whole."""

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_STORE_BYTES = 200 * 2**20  # of the workers started here: networks and figures, no data sets
_RAY_FIX = 'Start one with `ray start --head`, pass its address, or "local" for workers on this machine.'


class Journal:
    """A folder with one JSON file per finished trial, written atomically."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, key: str) -> Path:
        """Where the value of trial `key` lies: a readable name, made unique by a hash of the key."""
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", key).strip("-.")[:60]
        return self.folder / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"

    def read(self, key: str) -> tuple[bool, Any]:
        """Whether the trial is done, and its value. Raises RunError when its file is damaged."""
        file = self.file(key)
        if not file.exists():
            return False, None
        stored = read_json(file)
        if not isinstance(stored, dict) or stored.get("key") != key or "value" not in stored:
            raise RunError("The file of a trial is damaged", where=str(file), fix="Delete it and run again.")
        return True, stored["value"]

    def write(self, key: str, value: Any) -> Any:
        """Store the value of a trial and return it as it will be read. Raises RunError when it is no JSON."""
        value = plain(value, f"the result of trial {key!r}")
        write_json(self.file(key), {"key": key, "value": value})
        return value


def run_trials(
    trial: Trial,
    items: Mapping[str, Any],
    *,
    journal: str | Path,
    ray: str | None = None,
    cpus_per_trial: int = 1,
    seed: int = 0,
    label: str = "trials",
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The JSON value of `trial(item)` for each item, in their order; what is in the journal is not computed again.

    items: by name; a name stands for one item as long as the journal folder lives.
    journal: the folder of finished trials, made when it is missing.
    ray: None for this process; "local" for workers on this machine, "auto" for the running cluster that Ray finds, or
    the address of one. cpus_per_trial: CPUs, and threads of torch, that a trial on Ray gets.
    Every trial starts from random states derived from (seed, name), so that its value does not depend on the others.
    Raises what a trial raised, with its name, when that is a PalmetteError, and RunError for any other error (finished
    trials stay in the journal); MissingDependency without Ray, RunError when its cluster cannot be reached.
    """
    if ranks.count() > 1:
        with_ray = {"ray": ray, "cpus_per_trial": cpus_per_trial}
        return _in_shares(trial, items, journal, with_ray, seed=seed, label=label, say=say)
    book = Journal(journal)
    found = {key: value for key in items for done, value in [book.read(key)] if done}
    missing = {key: item for key, item in items.items() if key not in found}
    if say is not None and found and missing:
        say(f"{label}: {len(found)} of {len(items)} are done already")
    with progress(label, len(items)) as report:
        there = ray is not None and bool(missing)
        source = _on_ray(trial, missing, seed, str(ray), cpus_per_trial) if there else _here(trial, missing, seed)
        for key, value in source:
            found[key] = book.write(key, value)
            report(len(found), key)
    return {key: found[key] for key in items}


def _in_shares(
    trial: Trial, items: Mapping[str, Any], journal: str | Path, with_ray: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """`run_trials` where several processes work together: Ray is asked by the first; else each does its share, alone.

    The journal lies in a folder that all of them see.
    """
    if with_ray["ray"] is None:
        book = Journal(journal)
        missing = ranks.from_first(lambda: [key for key in items if not book.file(key).exists()])
        own = {key: items[key] for key in ranks.shard(missing)}
        with ranks.joint(), ranks.alone():
            run_trials(trial, own, journal=journal, **options)
    return ranks.from_first(lambda: run_trials(trial, items, journal=journal, **with_ray, **options))


def _here(trial: Trial, items: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Any]]:
    """Each trial in this process."""
    for key, item in items.items():
        try:
            yield key, attempt(trial, key, item, seed)
        except Exception as error:
            raise named(error, key) from error


def _on_ray(trial: Trial, items: Mapping[str, Any], seed: int, address: str, cpus: int) -> Iterator[tuple[str, Any]]:
    """Each trial as a task of Ray, in the order in which they finish; what is under way is given up at an error."""
    ray = connect(address)
    task = ray.remote(num_cpus=cpus, max_retries=1)(_remote)  # once more where a worker was lost
    shared = ray.put(carried(packed, trial))
    waiting = {task.remote(shared, key, carried(packed, item), seed, cpus): key for key, item in items.items()}
    try:
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            key = waiting.pop(ready)
            try:
                answer = ray.get(ready)
            except ray.exceptions.RayError as error:
                raise RunError("A worker failed", where=f"trial {key!r}", why=_gist(str(error))) from error
            if "value" not in answer:
                raise error_from(answer["error"])
            yield key, answer["value"]
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _gist(text: str) -> str:
    """The last line of an error's text that says something, without colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d*m", "", text).splitlines()]
    return next((line for line in reversed(lines) if line.strip("^ ")), "no reason is known")


def _remote(trial: Trial, key: str, item: Any, seed: int, threads: int) -> dict[str, Any]:
    """One trial in a worker: its value, or its error in words, because errors with keywords do not travel."""
    torch.set_num_threads(threads)
    try:
        value = attempt(carried(unpacked, trial), key, carried(unpacked, item), seed)
        return {"value": plain(value, f"the result of trial {key!r}")}
    except Exception as error:  # noqa: BLE001 - whatever it is, the driver raises it
        return {"error": named(error, key).to_dict()}


def carried(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `change` applied to what lies in it: in a partial's arguments, in lists, tuples and dicts."""
    if isinstance(value, partial):
        arguments = [carried(change, argument) for argument in value.args]
        return partial(value.func, *arguments, **carried(change, value.keywords))
    if type(value) in (list, tuple):
        return type(value)(carried(change, entry) for entry in value)
    if type(value) is dict:
        return {name: carried(change, entry) for name, entry in value.items()}
    return change(value)


def connect(address: str, cpus: int | None = None) -> Any:
    """The module `ray`, connected: as it is already, else to `address`, or to workers started here for "local".

    cpus: how many of this machine the workers get, all without it. The connection lasts as long as the process. Raises
    MissingDependency, or RunError when nothing answers.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MissingDependency("Ray is not installed", fix='pip install "palmette[ray]"') from error
    if ray.is_initialized():
        return ray
    own: dict[str, Any] = {}
    if address == "local":
        own = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(
            "The Ray cluster cannot be reached", where=f"--ray {address}", why=str(error), fix=_RAY_FIX
        ) from error
    return ray


def attempt(trial: Trial, key: str, item: Any, seed: int) -> Any:
    """One trial under its own random states."""
    with seeded(seed, "trial", key):
        return trial(item)


def named(error: Exception, key: str) -> PalmetteError:
    """The error of a trial as one that says which trial it was."""
    if isinstance(error, PalmetteError):
        where = f"trial {key!r}" if error.where is None else f"trial {key!r}, {error.where}"
        return type(error)(error.what, where=where, why=error.why, fix=error.fix)
    return RunError("A trial failed", where=f"trial {key!r}", why=f"{type(error).__name__}: {error}")
