"""Files that are whole or absent: everything is written beside its target, flushed to the disk, then moved over it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

import palmette.ranks as ranks
from palmette.errors import RunError

TEMPORARY_PREFIX = ".tmp-"
"""First characters of the name of a file that is still being written; such a file is never read."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`, moved over `path` when the block ends well and removed when it fails.

    The suffix is kept, so that writers which look at it behave. Missing parent folders are created. Of several
    processes that work together the first writes; what the others put there is thrown away. Raises RunError naming
    `path` when the system refuses.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if not ranks.leads():
            return
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise RunError(
            "A file cannot be written",
            where=str(path),
            why=error.strerror or str(error),
            fix="Choose a writable folder.",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until the file or folder is on the disk; folders that cannot be opened (Windows) are left to the system."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that a reader finds the old file or the new one, never a part.

    Raises RunError.
    """
    if not ranks.leads():
        return
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; floats round-trip exactly.

    Raises RunError when the value cannot be written as JSON or the file cannot be written.
    """
    try:
        text = json.dumps(value, indent=2)
    except (TypeError, ValueError) as error:
        raise RunError("A value cannot be stored as JSON", where=str(path), why=str(error)) from error
    write_atomic(path, text + "\n")


def plain(value: Any, what: str) -> Any:
    """`value` as JSON gives it back: NumPy numbers and arrays become plain ones, tuples lists. Raises RunError."""

    def default(item: Any) -> Any:
        if isinstance(item, np.generic | np.ndarray):
            return item.tolist()
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"{type(item).__name__} is no JSON value")

    try:
        return json.loads(json.dumps(value, default=default))
    except (TypeError, ValueError) as error:
        raise RunError(f"{what[0].upper()}{what[1:]} cannot be stored", why=str(error)) from error


def read_bytes(path: str | Path) -> bytes:
    """The content of a file. Raises RunError naming it when it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise RunError("A file cannot be read", where=str(path), why=error.strerror or str(error)) from error


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises RunError naming the file when it is missing, truncated or no JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise RunError(
            "A file is damaged", where=str(path), why=f"it is no JSON: {error}", fix="Delete it and run again."
        ) from error


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that a killed process left under `folder`."""
    for leftover in sorted(Path(folder).rglob(f"{TEMPORARY_PREFIX}*")):
        with suppress(OSError):
            leftover.unlink()
