"""Whether a network that a latency table lets through is as fast as the table says, on the machine of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from palmette.meter.latency import hardware
from palmette.supernet.latency import LatencyTable, timed
from palmette.supernet.search import Found
from palmette.supernet.supernet import Supernet

TRIES = 5
"""Networks that are timed before the fastest of them is taken."""


@dataclass(frozen=True)
class Timed:
    """Times of the answer of a search: by the table, measured now if this is its machine, and what is allowed, in ms.

    `slower`: networks of a larger value that were timed and passed the bound. `error`: of the table, in percent.
    """

    predicted_ms: float
    measured_ms: float | None
    bound_ms: float
    slower: int
    error: float

    def __str__(self) -> str:
        now = "not measured, this is another machine"
        if self.measured_ms is not None:
            now = f"{self.measured_ms:.3g} ms measured" + ("" if self.measured_ms <= self.bound_ms else ", too slow")
        passed = f"; {self.slower} better ones were slower" if self.slower else ""
        return f"{self.predicted_ms:.3g} ms by the table (off by {self.error:.1f} % in the mean), {now}{passed}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dict(vars(self))


def in_time(
    net: Supernet,
    table: LatencyTable,
    allowed: float,
    ranked: Sequence[Found],
    say: Callable[[str], None] | None = None,
) -> tuple[Found, Timed]:
    """The first of `ranked`, best first, that takes at most `allowed` milliseconds when it is timed, and its times.

    Timed against the supernet's largest network in the same rounds, in the runtime of the table. If none of the first
    five is fast enough, the fastest of them; on another machine than the table's the first. Raises ExportError where a
    network does not run there.
    """
    error = table.error.mean
    here = hardware(table.device.runtime, next(net.parameters()).device) == table.device.hardware
    if not here:
        first = ranked[0]
        return first, Timed(float(first.latency_ms or 0.0), None, allowed, 0, error)
    tried: list[tuple[Found, float]] = []
    for found in ranked[:TRIES]:
        took = timed(net, found.config, table)
        tried.append((found, took))
        if say is not None:
            say(f"timed: {took:.3g} ms, {found.latency_ms:.3g} ms by the table")
        if took <= allowed:
            break
    answer, took = min(tried, key=lambda pair: (pair[1] > allowed, pair[1]))
    slower = sum(other > allowed for found, other in tried if found is not answer)
    return answer, Timed(float(answer.latency_ms or 0.0), took, allowed, slower, error)
