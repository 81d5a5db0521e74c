"""What the pages of all verbs share: the template engine, names that may break, files of a run, facts as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from palmette.errors import RunError
from palmette.files import read_json, write_atomic
from palmette.report import words

MAX_BYTES = 1_000_000
MAX_ROWS = 300
LONGEST_PIECE = 34


def templates() -> Environment:
    """The engine that fills the templates of this package; it refuses what a page is not given."""
    environment = Environment(
        loader=PackageLoader("palmette.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["breakable"] = breakable
    return environment


def write_page(folder: Path, page: str) -> Path:
    """Write report.html and return its path. Raises RunError when the page would exceed 1 MB."""
    if len(page.encode()) > MAX_BYTES:
        raise RunError("The report is larger than 1 MB", where=str(folder), why=f"it has {len(page.encode()):,} bytes")
    target = folder / "report.html"
    write_atomic(target, page)
    return target


def breakable(name: str) -> Markup:
    """A path, escaped: in one piece when short, else with breaks allowed behind its dots."""
    text = escape(name)
    if len(name) <= LONGEST_PIECE:
        return Markup('<span class="nowrap">%s</span>') % text
    return Markup(str(text).replace(".", ".<wbr>"))  # noqa: S704 (escaped above)


def figures_of(folder: Path, kind: str, needed: Iterable[str] = ()) -> dict[str, Any] | None:
    """figures.json of a run folder whose verb wrote that kind, None for another run.

    Raises RunError when the file cannot be read, or lacks what is needed.
    """
    path = folder / "figures.json"
    figures = read_json(path) if path.is_file() else None
    if not isinstance(figures, dict) or figures.get("kind") != kind:
        return None
    missing = [name for name in needed if name not in figures]
    if missing:
        raise RunError("A file is damaged", where=str(path), why=f"it lacks {missing[0]!r}", fix="Run it again.")
    return figures


def artifacts(folder: Path, uses: Mapping[str, str]) -> list[dict[str, str]]:
    """The files of the run that are there, with size and use."""
    return [
        {"name": name, "use": use, "size": words.size((folder / name).stat().st_size)}
        for name, use in uses.items()
        if (folder / name).is_file()
    ]


def flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text; versions and hardware speak for themselves."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += flat(item, prefix if key in ("versions", "hardware") else f"{prefix}{key}.")
        else:
            rows.append(
                (
                    f"{prefix}{key}",
                    item if isinstance(item, str) else json.dumps(item) if item not in ([], None) else "none",
                )
            )
    return rows
