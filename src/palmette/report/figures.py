"""figures.json as typed values; a field that is missing or of another kind is named, not guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from palmette.errors import RunError
from palmette.files import read_json

T = TypeVar("T")
FILE = "figures.json"


@dataclass(frozen=True, kw_only=True)
class Clock:
    """One latency: milliseconds of a forward pass, median and quartiles, and what ran on what."""

    runtime: str
    median_ms: float
    q25_ms: float
    q75_ms: float
    runs: int
    batch: int
    threads: int
    dtype: str
    hardware: str


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of removal and healing; accuracies are fractions."""

    round: int
    candidate: str
    sites: list[str]
    score: float | None
    val_accuracy: float
    val_n: int
    val_interval: list[float]
    macs: int
    latency_ms: float | None = None
    accepted: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One candidate of the first ranking."""

    name: str
    score: float
    unit: str = ""
    macs_saved: int | None = None
    ms_saved: float | None = None
    entropy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network of the accounting table; `difference` is (points, low, high) against the dense one."""

    name: str
    linearized: int
    dropped: int
    depth: int
    macs: int
    params: int
    peak_bytes: int
    latency: list[Clock] = field(default_factory=list)
    accuracy: float | None = None
    n: int = 0
    interval: list[float] | None = None
    difference: list[float] | None = None
    replaced: int = 0

    @property
    def removed(self) -> int:
        """Sites changed, dropped or replaced."""
        return self.linearized + self.dropped + self.replaced

    def clock(self, runtime: str | None) -> Clock | None:
        """The latency in `runtime`."""
        return next((c for c in self.latency if c.runtime == runtime), None)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """One merge that was done, or refused for a reason."""

    members: list[str]
    result: str = ""
    done: bool
    reason: str = ""
    exactness: str = ""
    worst_error: float | None = None
    worst_error_float32: float | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    ms_before: float | None = None
    ms_after: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Everything a report shows."""

    command: str
    method: str
    seed: int
    model: str
    data: str
    max_drop: float
    environment: dict[str, Any]
    rows: list[Row]
    rounds: list[Round] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    split: str = "val"
    verification: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    cost_runtime: str | None = None
    search: bool = False
    """Whether the method has a search of its own, whose networks each stem from the dense one, in place of rounds."""

    def row(self, name: str) -> Row | None:
        """The row of that name."""
        return next((r for r in self.rows if r.name == name), None)

    @property
    def dense(self) -> Row:
        """The network before any change."""
        return self.rows[0]

    @property
    def shrunk(self) -> Row:
        """The result; the dense network itself when nothing was removed."""
        return self.row("shrunk") or self.dense

    @property
    def runtimes(self) -> list[str]:
        """Runtimes timed for the dense network and the result, the deciding one first."""
        found = [c.runtime for c in self.dense.latency if self.shrunk.clock(c.runtime) is not None]
        preferred = self.cost_runtime or "onnxruntime"
        return sorted(found, key=lambda name: name != preferred)

    @property
    def kept_rounds(self) -> list[Round]:
        """The rounds that led to the result: up to the last accepted one."""
        last = max((i for i, r in enumerate(self.rounds) if r.accepted), default=-1)
        return self.rounds[: last + 1]

    @property
    def removed_names(self) -> set[str]:
        """Names of the candidates and sites that the result no longer has."""
        names = {name for r in self.kept_rounds for name in r.candidate.split(", ")}
        return names | {site for r in self.kept_rounds for site in r.sites}


_PARTS: dict[str, type[Any]] = {
    "rows": Row, "rounds": Round, "scores": Score, "merges": Merge, "latency": Clock,
}  # fmt: skip


def load_figures(folder: Path) -> Figures:
    """The figures of a run. Raises RunError when the file is missing, damaged, of another version, or lacks a field."""
    path = folder / FILE
    if not folder.is_dir():
        raise RunError("There is no such run folder", where=str(folder))
    if not path.is_file():
        raise RunError(
            "There is nothing to report",
            where=str(folder),
            why=f"it holds no {FILE}",
            fix="Give the folder of a finished run; shrink --resume finishes one.",
        )
    value = read_json(path)
    if not isinstance(value, Mapping) or value.get("schema") != 1:
        raise RunError(
            "The figures are of another version", where=str(path), fix="Report with the version that made them."
        )
    figures = _build(Figures, value, str(path))
    if not figures.rows:
        raise RunError("The figures hold no networks", where=str(path), why="'rows' is empty")
    return figures


def _build(kind: type[T], value: Any, where: str) -> T:
    """An instance of a dataclass of this file from JSON; unknown keys are left out."""
    if not isinstance(value, Mapping):
        raise RunError("The figures are damaged", where=where, why="an object was expected")
    known: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        if entry.name in value:
            known[entry.name] = _checked(entry, value[entry.name], f"{where}: {entry.name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise RunError("The figures are damaged", where=where, why=f"'{entry.name}' is missing")
    return kind(**known)


_KINDS: dict[str, tuple[type[Any], ...]] = {
    "str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "None": (type(None),), "dict": (dict,),
    "list": (list, tuple),
}  # fmt: skip


def _checked(entry: dataclasses.Field[Any], value: Any, where: str) -> Any:
    """`value` if it is of the annotated kind; lists of parts are built."""
    kinds = [part.split("[")[0].strip() for part in str(entry.type).split("|")]
    if not any(isinstance(value, kind) for name in kinds for kind in _KINDS[name]):
        raise RunError("The figures are damaged", where=where, why=f"{str(value)[:60]!r} is no {' or '.join(kinds)}")
    if entry.name in _PARTS:
        return [_build(_PARTS[entry.name], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is not None and str(entry.type).startswith("list["):
        wanted = _KINDS[str(entry.type)[5:].split("]")[0]]
        if not all(isinstance(item, wanted) for item in value):
            raise RunError(
                "The figures are damaged", where=where, why=f"{str(value)[:60]!r} holds another kind of value"
            )
    return value
