"""From a run folder to report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from palmette.errors import RunError
from palmette.files import read_json, write_atomic
from palmette.report import words
from palmette.report.figures import Figures, load_figures
from palmette.report.front import front_figures, render_front
from palmette.report.pictures import cost_picture, path_picture
from palmette.report.site_pictures import CLASSES, MAX_BARS, colour_of, score_picture, strip_picture

MAX_BYTES = 1_000_000
MAX_ROWS = 300
LONGEST_PIECE = 34
ARTIFACTS = {
    "model.safetensors": "weights, with the plan in the metadata: palmette.load(source_model, file)",
    "model.onnx": "for ONNX Runtime and other runtimes; dynamic batch",
    "model.pt2": "exported program: torch.export.load(file).module(), without palmette",
    "plan.json": "what was removed, in order",
    "figures.json": "every number on this page",
}


def render(run_folder: str | Path) -> Path:
    """Write report.html into `run_folder`, that of a shrink or of a curve, from its files, and return its path.

    The same folder gives the same bytes. Raises RunError when figures.json is missing or damaged, or when the page
    would exceed 1 MB.
    """
    folder = Path(run_folder)
    if front_figures(folder) is not None:
        return render_front(folder)
    page = page_of(load_figures(folder), _plan(folder), _artifacts(folder))
    if len(page.encode()) > MAX_BYTES:
        raise RunError("The report is larger than 1 MB", where=str(folder), why=f"it has {len(page.encode()):,} bytes")
    target = folder / "report.html"
    write_atomic(target, page)
    return target


def page_of(figures: Figures, plan: list[dict[str, str]], artifacts: list[dict[str, str]]) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("palmette.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["breakable"] = breakable
    merges = figures.merges
    return environment.get_template("report.html.j2").render(
        figures=figures,
        words=words,
        verdict=words.verdict(figures),
        tiles=tiles(figures),
        edits=words.edit_columns(figures.rows),
        path=path_picture(figures),
        cost=cost_picture(figures) if figures.shrunk.removed else None,
        scores=score_picture(figures),
        strip=strip_picture(figures),
        classes=[
            (colour, text) for name, (colour, text) in CLASSES.items() if any(m.exactness == name for m in merges)
        ],
        colour_of=colour_of,
        done=[m for m in merges if m.done],
        refused=[m for m in merges if not m.done],
        environment=_flat({k: v for k, v in figures.environment.items() if k not in ("command", "seed")}),
        plan=plan,
        artifacts=artifacts,
        max_rows=MAX_ROWS,
        max_bars=MAX_BARS,
    )


def breakable(name: str) -> Markup:
    """A path, escaped: in one piece when short, else with breaks allowed behind its dots."""
    text = escape(name)
    if len(name) <= LONGEST_PIECE:
        return Markup('<span class="nowrap">%s</span>') % text
    return Markup(str(text).replace(".", ".<wbr>"))  # noqa: S704 (escaped above)


def tiles(figures: Figures) -> list[dict[str, str]]:
    """The four figures under the headline: label, result, before, change."""
    dense, shrunk = figures.dense, figures.shrunk
    found = []
    for name in figures.runtimes[:1]:
        a, b = dense.clock(name), shrunk.clock(name)
        if a is not None and b is not None:
            found.append(_tile(f"Latency, {words.runtime(name)}", a.median_ms, b.median_ms, words.ms))
    found.append(_tile("Multiply-adds", dense.macs, shrunk.macs, words.count))
    found.append(_tile("Parameters", dense.params, shrunk.params, words.count))
    found.append(_tile("Peak memory", dense.peak_bytes, shrunk.peak_bytes, words.size))
    if shrunk.removed == 0:
        return [tile | {"before": "", "change": ""} for tile in found]
    return found


def _tile(label: str, before: float, after: float, show: Any) -> dict[str, str]:
    return {"label": label, "after": show(after), "before": show(before), "change": words.change(before, after)}


def _plan(folder: Path) -> list[dict[str, str]]:
    """Kind, site and fit of every edit in plan.json; empty when there is none."""
    path = folder / "plan.json"
    if not path.is_file():
        return []
    value = read_json(path)
    edits = value.get("edits", []) if isinstance(value, dict) else []
    return [
        {key: str(edit.get(key) or "") for key in ("kind", "site", "fit")} for edit in edits if isinstance(edit, dict)
    ]


def _artifacts(folder: Path) -> list[dict[str, str]]:
    """The files of the run that are there, with size and use."""
    return [
        {"name": name, "use": use, "size": words.size((folder / name).stat().st_size)}
        for name, use in ARTIFACTS.items()
        if (folder / name).is_file()
    ]


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text; versions and hardware speak for themselves."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += _flat(item, prefix if key in ("versions", "hardware") else f"{prefix}{key}.")
        else:
            rows.append(
                (
                    f"{prefix}{key}",
                    item if isinstance(item, str) else json.dumps(item) if item not in ([], None) else "none",
                )
            )
    return rows
