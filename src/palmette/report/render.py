"""From a run folder to report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palmette.files import read_json
from palmette.report import words
from palmette.report.adapted import adapt_figures, render_adapted
from palmette.report.figures import Figures, load_figures
from palmette.report.front import front_figures, render_front
from palmette.report.page import MAX_ROWS, artifacts, flat, templates, write_page
from palmette.report.pictures import cost_picture, path_picture
from palmette.report.site_pictures import CLASSES, MAX_BARS, colour_of, score_picture, strip_picture
from palmette.report.specialized import render_specialized, specialize_figures

ARTIFACTS = {
    "model.safetensors": "weights, with the plan in the metadata: palmette.load(source_model, file)",
    "model.onnx": "for ONNX Runtime and other runtimes; dynamic batch",
    "model.pt2": "exported program: torch.export.load(file).module(), without palmette",
    "plan.json": "what was removed, in order",
    "figures.json": "every number on this page",
}


def render(run_folder: str | Path) -> Path:
    """Write report.html into `run_folder`, that of a shrink, curve, adapt or specialize, and return its path.

    The same folder gives the same bytes. Raises RunError when figures.json is missing or damaged, or when the page
    would exceed 1 MB.
    """
    folder = Path(run_folder)
    if front_figures(folder) is not None:
        return render_front(folder)
    if adapt_figures(folder) is not None:
        return render_adapted(folder)
    if specialize_figures(folder) is not None:
        return render_specialized(folder)
    page = page_of(load_figures(folder), _plan(folder), artifacts(folder, ARTIFACTS))
    return write_page(folder, page)


def page_of(figures: Figures, plan: list[dict[str, str]], files: list[dict[str, str]]) -> str:
    """The page as text."""
    merges = figures.merges
    return (
        templates()
        .get_template("report.html.j2")
        .render(
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
            environment=flat({k: v for k, v in figures.environment.items() if k not in ("command", "seed")}),
            plan=plan,
            artifacts=files,
            max_rows=MAX_ROWS,
            max_bars=MAX_BARS,
        )
    )


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
