"""What a device allows, and the units in which people say it: bytes and milliseconds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from palmette.errors import InputError

_BYTES = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zµ]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes in `text`: "512KiB" (binary), "1.5 MB" (decimal), "4096" or an int.

    Raises InputError for anything else, for a negative number, and for a fraction of a byte.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        number, factor = float(text), 1
    else:
        number, unit = _quantity(text, "memory", '"512KiB", "1.5MB"')
        factor = _BYTES.get(unit, 0)
    value = number * factor
    if factor == 0 or value < 0 or value != int(value):
        raise InputError(
            f"{text!r} is not an amount of memory", fix='Write whole bytes, such as "512KiB", "1.5MB" or 4096.'
        )
    return int(text) if isinstance(text, int) else int(value)


def format_bytes(size: int) -> str:
    """`size` bytes in binary units: 1536 -> "1.5 KiB"."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def parse_latency(text: str | float) -> float:
    """Milliseconds in `text`: "5ms", "0.2 s", "300us", or a number of milliseconds.

    Raises InputError for anything else and for what is not a positive finite time.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        number, factor = float(text), 1.0
    else:
        number, unit = _quantity(text, "time", '"5ms", "0.2s"')
        factor = _MILLISECONDS.get(unit, 1.0 if unit == "" else 0.0)
    value = number * factor
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{text!r} is not a latency", fix='Write a positive time with its unit, such as "5ms".')
    return value


def _quantity(text: object, noun: str, examples: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"{text!r} is not an amount of {noun}", fix=f"Write a number and its unit: {examples}.")
    return float(match[1]), match[2].lower()


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What a device allows; a bound of None is no bound.

    ram, flash: bytes, as a number or as text ("320KiB"); latency_ms: the longest forward pass.
    dtype: the type in which the device computes. weights_in: where the weights live while it computes; in "flash" they
    take no RAM. reserve: bytes of RAM that the runtime keeps for itself. inplace_elementwise: activations, gates and
    additions write over their input; inplace_depthwise: depthwise convolutions do, channel by channel. Both matter to
    memory that is computed from a formula, as for a supernet; a captured graph says itself what is in place.
    operators: "core" for a runtime that has only PyTorch's core operators and takes the others apart, as ExecuTorch
    does where no delegate takes them; it matters to a supernet's memory. Raises InputError for a bound that does not
    parse.
    """

    name: str = "custom"
    ram: int | str | None = None
    flash: int | str | None = None
    dtype: str = "float32"
    latency_ms: float | None = None
    weights_in: Literal["flash", "ram"] = "ram"
    reserve: int | str = 0
    inplace_elementwise: bool = False
    inplace_depthwise: bool = False
    operators: Literal["own", "core"] = "own"

    def __post_init__(self) -> None:
        _ = self.ram_bytes, self.flash_bytes, self.reserve_bytes
        if self.latency_ms is not None:
            parse_latency(self.latency_ms)
        if self.weights_in not in ("flash", "ram"):
            raise InputError(f"Weights cannot live in {self.weights_in!r}", fix='Write "flash" or "ram".')
        for name in ("inplace_elementwise", "inplace_depthwise"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} cannot be {getattr(self, name)!r}", fix="Give True or False.")
        if self.operators not in ("own", "core"):
            raise InputError(f"Operators cannot be {self.operators!r}", fix='Write "own" or "core".')

    @property
    def ram_bytes(self) -> int | None:
        """The bound on RAM in bytes."""
        return None if self.ram is None else parse_bytes(self.ram)

    @property
    def flash_bytes(self) -> int | None:
        """The bound on flash in bytes."""
        return None if self.flash is None else parse_bytes(self.flash)

    @property
    def reserve_bytes(self) -> int:
        """RAM in bytes that the runtime keeps for itself."""
        return parse_bytes(self.reserve)

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation or weight of `dtype`. Raises InputError for a type whose size is not known."""
        if self.dtype not in _ELEMENT_BYTES:
            raise InputError(
                f"The size of {self.dtype!r} is not known",
                where=f"profile {self.name!r}",
                fix=f"Known: {', '.join(_ELEMENT_BYTES)}.",
            )
        return _ELEMENT_BYTES[self.dtype]

    def exceeded(self, *, param_bytes: int, peak_bytes: int, latency_ms: float | None = None) -> Iterator[str]:
        """One sentence for each bound that a network breaks, with what it needs; a latency of None is not compared."""
        ram = peak_bytes + self.reserve_bytes + (param_bytes if self.weights_in == "ram" else 0)
        if self.ram_bytes is not None and ram > self.ram_bytes:
            yield f"needs {format_bytes(ram)} of RAM, the device has {format_bytes(self.ram_bytes)}"
        if self.flash_bytes is not None and param_bytes > self.flash_bytes:
            yield f"needs {format_bytes(param_bytes)} of flash, the device has {format_bytes(self.flash_bytes)}"
        bound = None if self.latency_ms is None else parse_latency(self.latency_ms)
        if bound is not None and latency_ms is not None and latency_ms > bound:
            yield f"takes {latency_ms:.3g} ms, the bound is {bound:.3g} ms"


PROFILES = {"cpu": DeviceProfile(name="cpu")}
"""Profiles known by name. "cpu" is this machine, without bounds."""


def profile_named(profile: str | DeviceProfile) -> DeviceProfile:
    """The profile of that name, or the profile itself. Raises InputError for an unknown name."""
    if isinstance(profile, DeviceProfile):
        return profile
    if profile not in PROFILES:
        raise InputError(
            f"No device profile is called {profile!r}", fix=f"Known: {', '.join(PROFILES)}; or pass a DeviceProfile."
        )
    return PROFILES[profile]
