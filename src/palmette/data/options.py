"""Options of a data source, written behind a question mark as in a web address: `cifar10:DIR?size=96&norm=imagenet`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl

from palmette.errors import InputError

AUGMENTATIONS = ("none", "flip", "shift", "flip-shift")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": IMAGENET,
    "half": ((0.5,), (0.5,)),
    "none": ((0.0,), (1.0,)),
}

HELP = """Data: digits | cifar10:DIR | fashion-mnist:DIR | imagefolder:DIR | path/file.py:function.
Options follow a question mark, in quotes, as in "cifar10:DIR?norm=imagenet&size=96&augment=flip-shift&train=5000"
  size=N or HxW        resize every image (default: what the model expects, else the size of the source; folders: 224)
  channels=1|3         repeat a grey channel three times, or average colours to grey
  norm=NAME            source (default; ImageNet's for folders) | imagenet | half (mean and std 0.5) | none
  mean=A,B,C std=A,B,C normalisation by hand, for images in 0..1
  augment=NAME         none | flip | shift | flip-shift (training images only; by default none for digits,
                       flip for folders, flip-shift for the others)
  train=N val=N test=N use N images of that split, the same ones each time, classes in proportion
  calibration=N        unaugmented training images used to fit plans (default 1024)
  batch=N              batch size
  workers=N            processes that decode images (imagefolder only)"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Parsed options; None means "not given". Sizes are (height, width) in pixels, limits are numbers of images."""

    size: tuple[int, int] | None = None
    channels: int | None = None
    norm: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: str | None = None
    train: int | None = None
    val: int | None = None
    test: int | None = None
    calibration: int = 1024
    batch: int | None = None
    workers: int = 0

    def limit(self, split: str) -> int | None:
        """Number of images wanted of `split` ("train", "val", "test"), or None for all."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("must be a whole number")
    return int(text)


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise ValueError("must be at least 1")
    return value


def _size(text: str) -> tuple[int, int]:
    sides = tuple(_positive(side) for side in text.lower().split("x"))
    if len(sides) > 2:
        raise ValueError("must be N or HEIGHTxWIDTH")
    return sides[0], sides[-1]


def _floats(text: str) -> tuple[float, ...]:
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", part) for part in parts):
        raise ValueError("must be one number or three, as in 0.5 or 0.49,0.48,0.45")
    return tuple(map(float, parts))


def _deviations(text: str) -> tuple[float, ...]:
    values = _floats(text)
    if min(values) <= 0:
        raise ValueError("must be above zero")
    return values


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text

    return parse


_PARSERS: dict[str, Callable[[str], Any]] = {
    "size": _size,
    "channels": lambda text: int(_one_of("1", "3")(text)),
    "norm": _one_of("source", *NORMS),
    "mean": _floats,
    "std": _deviations,
    "augment": _one_of(*AUGMENTATIONS),
    "train": _positive,
    "val": _positive,
    "test": _positive,
    "calibration": _positive,
    "batch": _positive,
    "workers": _whole,
}


def parse_options(text: str, *, spec: str, allowed: Collection[str] = tuple(_PARSERS)) -> Options:
    """Options from `size=96&norm=half`.

    Raises InputError for an unknown option (listing the known ones) or a bad value.
    """
    options = Options()
    for name, value in parse_pairs(text, spec=spec, allowed=allowed).items():
        try:
            options = replace(options, **{name: _PARSERS[name](value)})
        except ValueError as error:
            raise InputError(f"option {name}={value} cannot be used", where=spec, why=str(error)) from error
    if (options.mean is None) != (options.std is None):
        raise InputError("options mean and std must be given together", where=spec)
    if options.mean is not None and options.norm is not None:
        raise InputError("give either norm or mean and std, not both", where=spec)
    return options


def parse_pairs(text: str, *, spec: str, allowed: Collection[str]) -> dict[str, str]:
    """Name to value from `a=1&b=2`, each name known and given once. Raises InputError otherwise."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text))
    except ValueError as error:
        raise InputError(
            "options cannot be read", where=spec, why=str(error), fix="Write ?name=value&name=value"
        ) from error
    found: dict[str, str] = {}
    for name, value in pairs:
        if name not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise InputError(f"unknown option {name!r}", where=spec, fix=f"Known options: {known}")
        if name in found:
            raise InputError(f"option {name!r} is given twice", where=spec)
        found[name] = value
    return found


ARRAY_OPTIONS = tuple(name for name in _PARSERS if name != "workers")
FOLDER_OPTIONS = tuple(_PARSERS)
