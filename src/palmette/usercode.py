"""The user's own functions, named as `path/file.py:function`; a fault in them is reported with its line."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from palmette.errors import InputError


def is_file_spec(spec: str) -> bool:
    """Whether `spec` reads as `path/file.py:function`."""
    path, _, name = spec.rpartition(":")
    return (path.endswith(".py") and bool(name)) or spec.endswith(".py")


def call_user_function(spec: str, **offered: Any) -> Any:
    """What `path/file.py:function` returns; of `offered`, it gets the arguments that it names.

    The file's folder is importable while the file is read and the function runs. Raises InputError for a missing file
    or function, and for any exception inside, naming the user's line.
    """
    file, name = _parts(spec)
    with _importable(file.resolve().parent):
        function = _function(file, name)
        with _reported(file, f"{name}() of {file.name} failed"):
            return function(**_accepted(function, offered))


def user_function(spec: str) -> Callable[..., Any]:
    """The function that `path/file.py:function` names, uncalled. Raises InputError as `call_user_function` does."""
    file, name = _parts(spec)
    with _importable(file.resolve().parent):
        return _function(file, name)


def _parts(spec: str) -> tuple[Path, str]:
    location, _, name = spec.rpartition(":")
    if not location.endswith(".py"):
        raise InputError("no function is named", where=spec, fix="Write path/file.py:function")
    file = Path(location).expanduser()
    if not file.is_file():
        raise InputError("no such file", where=str(file))
    return file, name


def _function(file: Path, name: str) -> Callable[..., Any]:
    module = _import(file)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        fix = f"Its functions: {', '.join(known)}" if known else None
        raise InputError(f"no function {name!r} in {file.name}", where=str(file), fix=fix)
    found: Callable[..., Any] = function
    return found


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`folder` first on the module path for the block."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _import(file: Path) -> ModuleType:
    """The file as a module of a name of its own, so that two files of one name do not meet."""
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"palmette_user_{digest}_{file.stem}", file.resolve())
    if spec is None or spec.loader is None:
        raise InputError("not a Python file", where=str(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and worker processes look their module up
    try:
        with _reported(file, f"{file.name} cannot be imported"):
            spec.loader.exec_module(module)
    except InputError:
        del sys.modules[spec.name]
        raise
    return module


@contextmanager
def _reported(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
        raise InputError(what, where=_where(file, error), why=why) from error


def _where(file: Path, error: BaseException) -> str:
    """The deepest line of the user's file that the error passed through."""
    own = str(file.resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    if isinstance(error, SyntaxError) and error.filename == own:
        lines.append(error.lineno)
    return f"{file}:{lines[-1]}" if lines else str(file)


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built-in callables carry no signature
        return {}
    return {name: value for name, value in offered.items() if name in names}
