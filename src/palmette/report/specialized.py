"""The page of a `specialize`: what each board gets, what it was chosen from, and where its memory goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palmette.errors import RunError
from palmette.report import words
from palmette.report.page import MAX_ROWS, artifacts, figures_of, flat, templates, write_page
from palmette.report.specialized_pictures import cloud_picture, memory_picture

FILES = {
    "supernet.safetensors": "weights of the trained supernet: --resume goes on from it",
    "figures.json": "every number on this page",
}
BOARD_FILES = {
    "model.safetensors": "weights, with the plan in the metadata: palmette.load(source_model, file)",
    "model.onnx": "for ONNX Runtime and other runtimes; dynamic batch",
    "model.pt2": "exported program: torch.export.load(file).module(), without palmette",
}
_NEEDED = ("boards", "supernet", "recipe", "history", "environment")


def specialize_figures(folder: Path) -> dict[str, Any] | None:
    """The figures of a specialize's run folder, None for another. Raises RunError when they are damaged."""
    return figures_of(folder, "specialize", _NEEDED)


def render_specialized(run_folder: str | Path) -> Path:
    """Write report.html into the folder of a specialize, from figures.json there, and return its path.

    Raises RunError when figures.json is missing or is not that of a specialize.
    """
    folder = Path(run_folder)
    figures = specialize_figures(folder)
    if figures is None:
        raise RunError("The folder holds no specialize", where=str(folder), fix="Pass the folder of such a run.")
    boards = [_board(folder, board, index) for index, board in enumerate(figures["boards"])]
    page = (
        templates()
        .get_template("specialize.html.j2")
        .render(
            figures=figures,
            words=words,
            headline=headline(figures),
            lead=lead(figures),
            boards=boards,
            static=sorted(figures["supernet"]["static"].items()),
            environment=flat({k: v for k, v in figures["environment"].items() if k not in ("command", "seed")}),
            files=artifacts(folder, FILES),
            max_rows=MAX_ROWS,
        )
    )
    return write_page(folder, page)


def headline(figures: dict[str, Any]) -> str:
    """One sentence: how many boards have their network."""
    count = words.plural(len(figures["boards"]), "board")
    return f"One training, {count}: {'each has' if len(figures['boards']) > 1 else 'it has'} a network that fits."


def lead(figures: dict[str, Any]) -> list[str]:
    """The sentences under the headline: the supernet, and how networks were chosen."""
    supernet, recipe = figures["supernet"], figures["recipe"]
    kinds: dict[str, int] = {}
    for choice in supernet["choices"]:
        kinds[choice["kind"]] = kinds.get(choice["kind"], 0) + 1
    found = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    made = (
        f"{figures['model']} became a supernet of {supernet['networks']:.3g} networks (choices: {found}), trained with "
        f"the strategy \u201c{recipe['strategy']}\u201d for {words.plural(recipe['heal']['epochs'], 'epoch')}."
    )
    chosen = (
        f"For each board {recipe['measurements']} networks that fit were judged on validation data, batch norms "
        f"measured for each; the best was taken. Intervals are of 95{words.NARROW}%."
    )
    return [made, chosen]


def _board(folder: Path, board: dict[str, Any], index: int) -> dict[str, Any]:
    profile, found = board["profile"], board["found"]
    split = "validation" if board["split"] == "val" else board["split"]
    return {
        "name": profile["name"],
        "bounds": _bounds(profile),
        "accuracy": _with_interval(board["evaluation"]),
        "samples": f"{board['evaluation']['n']:,} {split}",
        "chance": _with_interval(board["random"]["evaluation"]),
        "ram": words.size(found["ram_bytes"]),
        "params": words.size(found["param_bytes"]),
        "memory": memory_picture(board, index),
        "cloud": cloud_picture(board, index),
        "notes": _notes(board),
        "promise": board["promise"],
        "config": list(board["config"].items()),
        "files": artifacts(folder / "boards" / profile["name"], BOARD_FILES),
    }


def _with_interval(seen: dict[str, Any]) -> str:
    return f"{words.percent(seen['accuracy'])} {words.interval(seen['interval'])}"


def _bounds(profile: dict[str, Any]) -> str:
    parts = [f"{profile[key]} of {name}" for key, name in (("ram", "RAM"), ("flash", "flash")) if key in profile]
    if "latency_ms" in profile:
        parts.append(f"{profile['latency_ms']} ms")
    return f"{', '.join(parts) or 'no bounds'}; {profile['dtype']}, weights in {profile['weights_in']}"


def _notes(board: dict[str, Any]) -> list[str]:
    """What else there is to say of a board's network: the size of its images, its time."""
    notes, edge, time = [], board["config"].get("resolution"), board.get("latency")
    if "dense" in board:
        notes.append(f"The largest network of the supernet has {_with_interval(board['dense'])} on the same data.")
    if edge is not None:
        notes.append(f"It sees images of {edge} \u00d7 {edge} pixels: scale yours before you pass them.")
    if time is not None:
        measured = time["measured_ms"]
        said = f"A pass takes {time['predicted_ms']:.3g} ms by the table (off by {time['error']:.1f} % in the mean)"
        if measured is None:
            notes.append(f"{said}; the table is of another machine, so it was not timed.")
        else:
            verdict = "within" if measured <= time["bound_ms"] else "above"
            notes.append(f"{said}, {measured:.3g} ms measured: {verdict} the {time['bound_ms']:.3g} ms allowed.")
        if time["slower"]:
            notes.append(f"{words.plural(time['slower'], 'network')} of a higher accuracy proved slower when timed.")
    return notes
