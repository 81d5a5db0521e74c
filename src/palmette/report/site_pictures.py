"""The pictures of the sites: what was scored and removed, and which operations became one."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

from palmette.report import words
from palmette.report.figures import Figures, Merge, Score
from palmette.report.theme import COLOUR, bare, distinct, drawing, sheet, shorten, svg

CLASSES = {
    "exact": ("exact", "exact"),
    "repad": ("repad", "exact after re-padding (padding changed before healing)"),
    "bias_map": ("bias", "exact with a bias map"),
    "approx": ("approx", "inexact, on request"),
}
"""Exactness class -> colour and what it means."""
MAX_BARS = 60
MAX_TILES = 120
_TILE, _LETTERS, _WIDTH = 20.0, 30, 960.0


def colour_of(merge: Merge) -> str:
    """Name of the colour of a merge's exactness class; an unknown class counts as inexact."""
    return CLASSES.get(merge.exactness, CLASSES["approx"])[0]


def score_picture(figures: Figures) -> Markup | None:
    """The first ranking, low first, the removed ones highlighted; beside it the entropy where it is another number."""
    scores = sorted(figures.scores, key=lambda s: s.score)[:MAX_BARS]
    if not scores:
        return None
    other = any(s.entropy is not None and s.entropy != s.score for s in scores)
    removed = figures.removed_names
    labels = distinct([s.name for s in scores], 44)
    width, left, top = 960.0, 12 + 6.2 * max(map(len, labels.values())), 26.0
    height = top + 17 * len(scores) + 44
    with drawing():
        figure, axes = sheet(width, height, left, (width - left) / 2 + 34 if other else 96, top, 44)
        _columns(axes, scores, [s.score for s in scores], removed, _unit(scores, figures.method))
        axes.set_yticks(range(len(scores)), [labels[s.name] for s in scores])
        for tick, score in zip(axes.get_yticklabels(), scores, strict=True):
            tick.set_color(COLOUR["ink"] if score.name in removed else COLOUR["muted"])
            tick.set_fontsize(8)
        if other:
            box = axes.get_position()
            second = figure.add_axes((box.x1 + 0.075, box.y0, 1 - box.x1 - 0.125, box.height))
            second.patch.set_alpha(0)
            _columns(second, scores, [s.entropy or 0.0 for s in scores], removed, "entropy, bits")
            second.set_yticks([])
        if any(s.name in removed for s in scores):
            _legend(axes, height)
        said = ", ".join(f"{s.name} {s.score:.3g}{' (removed)' if s.name in removed else ''}" for s in scores[:20])
        return svg(figure, "scores", f"Scores of {len(figures.scores)} candidates, low is removed first: {said}")


def _unit(scores: Sequence[Score], method: str) -> str:
    unit = scores[0].unit
    return f"score of {method}" + (f", {unit}" if unit else "") + " (low is removed first)"


def _columns(axes: Axes, scores: Sequence[Score], values: list[float], removed: set[str], label: str) -> None:
    """Horizontal bars with their values at the end."""
    colours = [COLOUR["removed"] if s.name in removed else COLOUR["dense"] for s in scores]
    axes.barh(range(len(scores)), values, height=0.66, color=colours)
    largest = max(map(abs, values)) or 1.0
    for index, value in enumerate(values):
        axes.text(
            max(value, 0) + 0.012 * largest, index, words.score(value), va="center", fontsize=7.6, color=COLOUR["muted"]
        )
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.set_xlim(1.05 * min(0.0, *values), max(0.0, *values) * 1.12 or 1.0)
    axes.set_xlabel(label)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=COLOUR["grid"], linewidth=0.7)


def _legend(axes: Axes, height: float) -> None:
    top = axes.get_position().y1 + 9 / height
    for x, colour, text in ((0.0, "removed", "removed in the result"), (0.2, "dense", "kept")):
        x0 = axes.get_position().x0 + x
        figure = axes.figure
        patch = Rectangle((x0, top), 10 / 960, 10 / height, transform=figure.transFigure, color=COLOUR[colour])
        figure.add_artist(patch)
        figure.text(x0 + 15 / 960, top + 5 / height, text, va="center", fontsize=8.2, color=COLOUR["muted"])


def strip_picture(figures: Figures) -> Markup | None:
    """Left: operations before, in order; right: what they became. A refused merge keeps its operations, in grey."""
    merges = [m for m in figures.merges if m.members]
    if not merges:
        return None
    shown: list[Merge] = []
    tiles = 0
    for merge in merges:
        tiles += len(merge.members)
        if tiles > MAX_TILES and shown:
            break
        shown.append(merge)
    halves = _halves(shown)
    labels = distinct([member for merge in shown for member in merge.members], _LETTERS)
    height = max(_height(half) for half in halves) + 4
    with drawing():
        figure, axes = sheet(_WIDTH, height, 0, 0, 0, 0)
        bare(axes, _WIDTH, height)
        for index, half in enumerate(halves):
            longest = max(len(labels[member]) for merge in half for member in merge.members)
            _column(axes, half, labels, before=index * (_WIDTH + 20) / 2 + 12 + 6.2 * longest)
        return svg(figure, "strip", _strip_words(shown, len(merges)))


def _height(merges: Sequence[Merge]) -> float:
    return 24 + sum(_TILE * len(m.members) + 12 for m in merges)


def _halves(merges: Sequence[Merge]) -> list[Sequence[Merge]]:
    """One column or, for more than two merges, two of about equal height."""
    if len(merges) <= 2:
        return [merges]
    cut = min(range(1, len(merges)), key=lambda i: abs(_height(merges[:i]) - _height(merges[i:])))
    return [merges[:cut], merges[cut:]]


def _column(axes: Axes, merges: Sequence[Merge], labels: dict[str, str], before: float) -> None:
    """Merges below each other: labels that end at `before`, tiles, a funnel, the result."""
    after = before + 76
    axes.text(before + 17, 8, "before", ha="center", va="center", fontsize=8, color=COLOUR["muted"])
    axes.text(after + 17, 8, "after", ha="center", va="center", fontsize=8, color=COLOUR["muted"])
    y = 24.0
    for merge in merges:
        _group(axes, merge, labels, before, after, y)
        y += _TILE * len(merge.members) + 12


def _group(axes: Axes, merge: Merge, labels: dict[str, str], before: float, after: float, y: float) -> None:
    colour = COLOUR[colour_of(merge)] if merge.done else COLOUR["refused"]
    span = _TILE * len(merge.members)
    for index, member in enumerate(merge.members):
        at = y + _TILE * index
        axes.add_patch(Rectangle((before, at + 1.5), 34, _TILE - 3, color=colour, alpha=0.85 if merge.done else 0.5))
        axes.text(before - 8, at + _TILE / 2, labels[member], ha="right", va="center", fontsize=8)
    if merge.done:
        middle = y + span / 2
        corners = [(before + 34, y + 1.5), (after, middle - 8.5), (after, middle + 8.5), (before + 34, y + span - 1.5)]
        axes.add_patch(Polygon(corners, closed=True, color=colour, alpha=0.22, linewidth=0))
        axes.add_patch(Rectangle((after, middle - 8.5), 34, 17, color=colour, alpha=0.85))
        name = merge.result or "removed"
        axes.text(after + 42, middle, labels.get(name, shorten(name, 24)), va="center", fontsize=8)
        return
    for index in range(len(merge.members)):
        at = y + _TILE * index
        axes.plot([before + 34, after], [at + _TILE / 2] * 2, color=colour, linewidth=0.8, alpha=0.6)
        axes.add_patch(Rectangle((after, at + 1.5), 34, _TILE - 3, color=colour, alpha=0.5))
    axes.text(after + 42, y + span / 2, "refused", va="center", fontsize=8, color=COLOUR["muted"])


def _strip_words(merges: Sequence[Merge], total: int) -> str:
    done = [m for m in merges if m.done]
    parts = [
        f"{' + '.join(m.members)} became {m.result or 'nothing'} ({m.exactness or 'class unknown'})" for m in done[:20]
    ]
    left = f"; the first {len(merges)} of {total} are drawn" if len(merges) < total else ""
    return f"{len(done)} of {total} merges done{left}: " + "; ".join(parts)
