"""The folder of one run: what was asked, where it ran, and each finished stage, so that a killed run goes on."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

import palmette.ranks as ranks
from palmette.errors import RunError
from palmette.files import TEMPORARY_PREFIX, plain, read_json, remove_leftovers, write_json
from palmette.seeding import seeded

_PACKAGES = (
    "palmette",
    "torch",
    "numpy",
    "safetensors",
    "lightning-fabric",
    "onnx",
    "onnxruntime",
    "openvino",
    "executorch",
    "torchao",
    "torchvision",
    "timm",
)
_LOCK = ".lock"


class Run:
    """One run folder, locked for this process while it lives.

    It holds run.json (config and seed), environment.json (versions, hardware, seed, command), stages/ (values of
    `once`) and whatever the caller writes at `path(name)`. Every file in it is whole or absent.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume: bool = False,
        command: str = "",
        config: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Create `folder`, or take up the run in it when `resume` is set (a missing or empty one then starts afresh).

        Raises RunError when the folder cannot be written, is in use by another process, holds other things, holds a run
        and `resume` is not set, or holds a run of another config or seed; a damaged file in it is named.
        """
        self.folder = Path(folder)
        self.seed = seed
        self.command = command
        self.config: dict[str, Any] = plain(config or {}, "the configuration")
        self._lock: TextIO | None = None
        self.environment: dict[str, Any] = ranks.from_first(lambda: self._opened(resume))
        self._check_joined()

    def _opened(self, resume: bool) -> dict[str, Any]:
        self._check_content(resume)
        self._lock = self._prepare()
        remove_leftovers(self.folder)
        self._check_same()
        return self._record_environment()

    def _check_joined(self) -> None:
        """Refuse processes that cannot see the folder, or were started for another run."""
        with ranks.joint():
            if ranks.count() == 1:
                return
            if not (self.folder / "run.json").exists():
                raise RunError(
                    "The run folder cannot be seen",
                    where=f"process {ranks.rank()}, {self.folder}",
                    why="the first process has made it, on another disk",
                    fix="Choose a folder that all nodes share.",
                )
            difference = first_difference(read_json(self.folder / "run.json")["config"], self.config)
            if difference is not None:
                name, first, here = difference
                raise RunError(
                    f"The processes were started for different runs: another {name}",
                    where=f"process {ranks.rank()}",
                    why=f"{first!r} in the first process, {here!r} here",
                    fix="Give every process the same network and options, and a seed to what is random.",
                )

    def path(self, name: str) -> Path:
        """Where the file `name` of this run lies; folders in the name are created.

        Raises RunError for a name that leads out of the run folder.
        """
        path = self.folder / name
        if (
            not name
            or not path.resolve().is_relative_to(self.folder.resolve())
            or path.resolve() == self.folder.resolve()
        ):
            raise RunError(f"{name!r} is not the name of a file in a run folder", where=str(self.folder))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError("A folder cannot be created", where=str(path.parent), why=error.strerror) from error
        return path

    def once(self, name: str, fn: Callable[[], Any], *, alone: bool = False) -> Any:
        """The JSON value of `fn()`, computed at the first call and read from stages/<name>.json ever after.

        `fn` runs under random states derived from the run's seed and the name, and leaves the global ones as they were,
        so that what comes next does not depend on whether the stage was computed or read. The value returned is always
        the one that was stored (tuples become lists); floats are exact. Raises RunError when it is no JSON, or damaged.

        Of several processes that work together all call `fn`, which may add up their shares, and all go on with the
        value of the first. alone: only the first calls it, while the others wait; for what is timed or written.
        """
        file = self.path(f"stages/{name}.json")
        found = ranks.from_first(lambda: [_stored(file)] if file.exists() else [])
        if found:
            return found[0]
        with seeded(self.seed, "stage", name):
            value = plain(ranks.from_first(fn) if alone else fn(), f"the result of stage {name!r}")
        return ranks.from_first(lambda: _store(file, name, value))

    def done(self, name: str) -> bool:
        """Whether stage `name` has been stored."""
        file = self.path(f"stages/{name}.json")
        return ranks.from_first(file.exists)

    def close(self) -> None:
        """Let other processes use the folder; happens by itself when the process ends."""
        if self._lock is not None:
            self._lock.close()

    def _check_content(self, resume: bool) -> None:
        try:
            content = {entry.name for entry in self.folder.iterdir()} if self.folder.exists() else set()
        except OSError as error:
            raise RunError("The run folder cannot be read", where=str(self.folder), why=error.strerror) from error
        content = {name for name in content if name != _LOCK and not name.startswith(TEMPORARY_PREFIX)}
        if "run.json" in content and not resume:
            raise RunError(
                "The folder holds a run already",
                where=str(self.folder),
                fix="Go on with it (--resume, or resume=True), or choose another folder.",
            )
        if content and "run.json" not in content:
            raise RunError(
                "The folder holds other files and no run",
                where=str(self.folder),
                why=f"it contains {min(content)!r}",
                fix="Choose an empty or a new folder.",
            )

    def _prepare(self) -> TextIO:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / _LOCK).open("a", encoding="utf-8")  # open while the run lives
        except OSError as error:
            raise RunError(
                "The run folder cannot be written",
                where=str(self.folder),
                why=error.strerror,
                fix="Choose another folder.",
            ) from error
        if not _try_lock(lock):
            lock.close()
            raise RunError(
                "The run folder is in use by another process", where=str(self.folder), fix="Wait for it or end it."
            )
        return lock

    def _check_same(self) -> None:
        wanted = {"schema": 1, "seed": self.seed, "config": self.config}
        file = self.folder / "run.json"
        if not file.exists():
            write_json(file, wanted)
            return
        stored = read_json(file)
        if not isinstance(stored, dict):
            raise RunError("A file is damaged", where=str(file), fix="Choose another folder.")
        difference = first_difference(stored, wanted)
        if difference is not None:
            name, before, now = difference
            raise RunError(
                f"The run was started with another {name}",
                where=str(file),
                why=f"{before!r} then, {now!r} now",
                fix="Resume with the same options or choose another folder.",
            )

    def _record_environment(self) -> dict[str, Any]:
        file = self.folder / "environment.json"
        now = {"command": self.command, "seed": self.seed, **environment()}
        if not file.exists():
            write_json(file, now)
            return now
        stored: dict[str, Any] = read_json(file)
        known = [stored, *stored.get("resumed", [])]
        if not any(all(entry.get(key) == value for key, value in now.items() if key != "command") for entry in known):
            stored["resumed"] = [*stored.get("resumed", []), now]
            write_json(file, stored)
        return stored


def _stored(file: Path) -> Any:
    stored = read_json(file)
    if not isinstance(stored, dict) or "value" not in stored:
        raise RunError("A stage's file is damaged", where=str(file), fix="Delete it and run again with --resume.")
    return stored["value"]


def _store(file: Path, name: str, value: Any) -> Any:
    write_json(file, {"stage": name, "value": value})
    return value


def environment() -> dict[str, Any]:
    """Versions of Python and the packages that matter, the machine, its accelerators, and the number of threads."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    hardware = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {"versions": versions, "hardware": hardware, "threads": torch.get_num_threads()}


def first_difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name and both values of the first place where two JSON values differ; None when they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            found = first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
            if found is not None:
                return found
        return None
    return None if before == now else (name or "value", before, now)


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _try_lock(file: TextIO) -> bool:
    """Lock the file for this process; the lock ends with it and is not inherited. True where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system without locks is no reason to refuse
    return True
