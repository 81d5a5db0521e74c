"""Numbers with their units, and the sentences at the top, which never claim more than the intervals allow."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palmette.report.figures import Clock, Figures, Row

RUNTIMES = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino-bf16": "OpenVINO in bfloat16",
    "executorch": "ExecuTorch (XNNPACK)",
    "macs": "multiply-add count",
}
MINUS, NARROW, FIXED, TIMES = "\u2212", "\u202f", "\u00a0", "\u00d7"
DASH = "\u2013"
ADDS = "multiply\u2011adds"


def runtime(name: str) -> str:
    """A runtime as people call it."""
    return RUNTIMES.get(name, name)


def count(value: float | None) -> str:
    """A count with three digits: 12.6 M. None is a dash."""
    if value is None:
        return DASH
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{three(value / factor)}{NARROW}{unit}"
    return f"{value:.0f}".replace("-", MINUS)


def size(value: float | None) -> str:
    """Bytes in binary units: 114 KiB."""
    if value is None:
        return DASH
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{three(value / factor)}{NARROW}{unit}"
    return f"{value:.0f}{NARROW}B"


def ms(value: float | None) -> str:
    """Milliseconds with three digits."""
    return DASH if value is None else f"{three(value)}{NARROW}ms"


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction as percent: 97.25 %."""
    return DASH if fraction is None else f"{100 * fraction:.{digits}f}{NARROW}%"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, zero without one."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def points(difference: list[float] | None) -> str:
    """Percentage points with their interval: -0.22 [-0.51, +0.07]."""
    if difference is None:
        return DASH
    middle, low, high = difference
    return f"{signed(middle)}{FIXED}[{signed(low)},{FIXED}{signed(high)}]"


def error(value: float | None) -> str:
    """A relative error: 1.2e-07; exact zero is 0."""
    if value is None:
        return DASH
    return "0" if value == 0 else f"{value:.1e}".replace("-", MINUS) if math.isfinite(value) else "not finite"


def score(value: float | None) -> str:
    """A score with three decimals, or as a power of ten where that would hide it."""
    if value is None:
        return DASH
    plain = value == 0 or 1e-2 <= abs(value) < 1e4
    return (f"{value:.3f}" if plain else f"{value:.1e}").replace("-", MINUS)


def typeset(text: str) -> str:
    """A sentence with true minus signs before its numbers."""
    return re.sub(r"(?<![\w-])-(?=\d)", MINUS, text)


def change(before: float | None, after: float | None) -> str:
    """Relative change in percent: -29 %; empty where there is nothing to compare."""
    if not before or after is None:
        return ""
    value = 100 * (after / before - 1)
    digits = 0 if abs(value) >= 10 or value == 0 else 1
    return f"{signed(value, digits)}{NARROW}%"


def interval(bounds: list[float] | None) -> str:
    """An accuracy interval in percent: [96.4, 97.9]."""
    return DASH if bounds is None else f"[{100 * bounds[0]:.2f}, {100 * bounds[1]:.2f}]"


def three(value: float) -> str:
    """A number with about three digits."""
    steps = (99.95, 9.995, 0.9995, 0.00995)
    digits = 2 if value == 0 else next((i for i, least in enumerate(steps) if abs(value) >= least), 4)
    return f"{value:.{digits}f}".replace("-", MINUS)


def plural(number: int, word: str) -> str:
    """1 block, 2 blocks."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def allowed(figures: Figures) -> str:
    """The loss that was allowed: 0.5 points, 1 point."""
    return f"{figures.max_drop:g} point{'' if figures.max_drop == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What may be said of the accuracy. kind: good, open, bad or none."""

    kind: str
    text: str


def verdict(figures: Figures) -> Verdict:
    """Whether the loss is within the bound: only when the upper end of the drop's 95 % interval is."""
    bound = allowed(figures)
    if figures.shrunk.removed == 0:
        return Verdict(kind="none", text="Nothing was removed")
    if figures.shrunk.difference is None:
        return Verdict(kind="open", text=f"Within {bound}: not resolved (no paired comparison)")
    _, low, high = figures.shrunk.difference
    if -low <= figures.max_drop:
        return Verdict(kind="good", text=f"Within {bound}")
    if -high > figures.max_drop:
        return Verdict(kind="bad", text=f"More than {bound} lost")
    return Verdict(kind="open", text=f"Within {bound}: not resolved")


def headline(figures: Figures) -> str:
    """One plain sentence or two: cost, then accuracy."""
    dense, shrunk = figures.dense, figures.shrunk
    if shrunk.removed == 0:
        return "Nothing was removed: the result is the dense network."
    claims = [_speed(dense.clock(name), shrunk.clock(name), name) for name in figures.runtimes[:1]]
    claims.append(_macs(dense, shrunk))
    cost = ", ".join(c for c in claims if c)
    loss = {
        "good": f"within {allowed(figures)} of the dense network",
        "bad": f"more than {allowed(figures)} below the dense network",
        "open": f"whether it is within {allowed(figures)} of the dense network is not resolved",
    }[verdict(figures).kind]
    return f"{cost[0].upper()}{cost[1:]}. Accuracy: {loss}."


def _speed(dense: Clock | None, shrunk: Clock | None, name: str) -> str:
    """Faster or slower only when the quartile ranges do not touch."""
    if dense is None or shrunk is None or shrunk.median_ms <= 0:
        return ""
    if shrunk.q75_ms < dense.q25_ms:
        return f"{dense.median_ms / shrunk.median_ms:.2f}{TIMES} as fast in {runtime(name)}"
    if shrunk.q25_ms > dense.q75_ms:
        return f"slower in {runtime(name)} ({ms(dense.median_ms)} before, {ms(shrunk.median_ms)} after)"
    return f"no faster in {runtime(name)} beyond the spread of the timing"


def _macs(dense: Row, shrunk: Row) -> str:
    if not dense.macs or dense.macs == shrunk.macs:
        return f"the same number of {ADDS}"
    share = abs(100 * (1 - shrunk.macs / dense.macs))
    return f"{share:.0f}{NARROW}% {'fewer' if shrunk.macs < dense.macs else 'more'} {ADDS}"


def lead(figures: Figures) -> list[str]:
    """The sentences under the headline: what was removed, the accuracy with its interval, and the controls."""
    shrunk, dense = figures.shrunk, figures.dense
    if shrunk.removed == 0:
        return [figures.message] if figures.message else []
    parts = [plural(n, word) for n, word in ((shrunk.linearized, "activation"), (shrunk.dropped, "block")) if n]
    did = [f"removed {' and '.join(parts)}"] if parts else []
    if shrunk.replaced:
        did.append(f"put something simpler in place of {plural(shrunk.replaced, 'other' if parts else 'site')}")
    said = [f"The method {_quoted(figures.method)} {' and '.join(did)} in {figures.model}."]
    if shrunk.accuracy is not None and dense.accuracy is not None:
        said.append(
            f"Accuracy on {shrunk.n:,} {_split(figures.split)} samples: {percent(dense.accuracy)} before, "
            f"{percent(shrunk.accuracy)} after; difference {points(shrunk.difference)} points "
            f"(95{NARROW}% interval, paired)."
        )
    if figures.split != "test":
        said.append(
            "These samples also chose when to stop, because no test data was given: expect a little less on new data."
        )
    return [*said, *_controls(figures)]


def _quoted(name: str) -> str:
    return f"\u201c{name}\u201d"


def _split(name: str) -> str:
    return {"val": "validation"}.get(name, name)


_EDITS = {"linearized": "Linearised", "dropped": "Dropped", "replaced": "Replaced"}


def edit_columns(rows: Sequence[Any]) -> list[tuple[str, str]]:
    """Key and heading of each kind of edit that a row has, for rows as objects or as mappings."""
    read = [row if isinstance(row, Mapping) else vars(row) for row in rows]
    return [(name, title) for name, title in _EDITS.items() if any(row.get(name) for row in read)]


def by_chance(figures: Figures) -> str:
    """The control of random removals: as many sites, or with a search of its own as much of the chosen cost."""
    return "random removal " + ("that saves as much by the timed table" if figures.search else "of as many sites")


def _controls(figures: Figures) -> list[str]:
    """What the controls say, and whether the method is told apart from chance."""
    again, chance, ours = figures.row("dense + same training"), figures.row("random removal"), figures.shrunk.difference
    said, method = [], _quoted(figures.method)
    if again is not None and again.accuracy is not None:
        said.append(
            f"Control: the dense network with the same extra training reaches {percent(again.accuracy)} "
            f"({points(again.difference)} points)."
        )
    if chance is not None and chance.accuracy is not None:
        text = (
            f"Control: {by_chance(figures)} reaches {percent(chance.accuracy)} ({points(chance.difference)} points); "
        )
        if ours is None or chance.difference is None:
            said.append(text + "the two were not compared.")
        elif ours[1] > chance.difference[2]:
            said.append(text + f"{method} chose better than chance.")
        elif ours[2] < chance.difference[1]:
            said.append(text + f"chance chose better than {method}.")
        else:
            said.append(text + f"a difference between {method} and chance is not resolved.")
    if not said:
        said.append("The controls (dense with the same training, random removal) were not run.")
    return said
