"""Data sources by name. Anything beyond them comes from the user's own loaders (`path/file.py:function`)."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from palmette.data.folder import imagefolder
from palmette.data.loaders import Batch, Data, Loader, from_source
from palmette.data.options import ARRAY_OPTIONS, FOLDER_OPTIONS, HELP, Options, parse_options
from palmette.data.sources import Source, cifar10, decode_images, digits, fashion_mnist
from palmette.errors import DataError, InputError

__all__ = ["HELP", "SOURCES", "Batch", "Data", "Loader", "Options", "Source", "decode_images", "load_source"]

_IN_MEMORY: dict[str, Callable[[Path, Options], Source]] = {"cifar10": cifar10, "fashion-mnist": fashion_mnist}
SOURCES = ("digits", *_IN_MEMORY, "imagefolder")


def load_source(spec: str, *, image_size: tuple[int, int] | None = None, batch_size: int = 64, seed: int = 0) -> Data:
    """Loaders for `digits`, `cifar10:DIR`, `fashion-mnist:DIR` or `imagefolder:DIR`, with options as in HELP.

    `image_size` (height, width) and `batch_size` hold where the options do not say. Raises InputError for a spec or
    option that cannot be read, DataError for data that cannot.
    """
    location, _, text = spec.partition("?")
    name, _, path = location.partition(":")
    if name not in SOURCES:
        near = get_close_matches(name, SOURCES, n=1)
        fix = (
            f"Did you mean {_example(near[0])}?"
            if near
            else f"Write {', '.join(map(_example, SOURCES))}, or path/file.py:function"
        )
        raise InputError(f"no data source named {name!r}", where=spec, fix=fix)
    options = parse_options(text, spec=spec, allowed=FOLDER_OPTIONS if name == "imagefolder" else ARRAY_OPTIONS)
    if (name == "digits") == bool(path):
        raise InputError(
            "digits takes no folder" if path else f"{name} needs a folder", where=spec, fix=f"Write {_example(name)}"
        )
    try:
        if name == "imagefolder":
            return imagefolder(Path(path).expanduser(), options, size=image_size, batch=batch_size, seed=seed)
        source = digits(options) if name == "digits" else _IN_MEMORY[name](Path(path).expanduser(), options)
        return from_source(name, source, options, size=image_size, batch=batch_size, seed=seed)
    except OSError as error:
        raise DataError("data cannot be read", where=spec, why=str(error)) from error


def _example(name: str) -> str:
    return "digits" if name == "digits" else f"{name}:DIR"
