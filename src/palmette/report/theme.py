"""Colours and type of the pictures: marker colours become CSS variables, so that one picture serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

NAMES = (
    "ink", "muted", "grid", "paper", "dense", "shrunk", "again", "chance", "removed",
    "exact", "repad", "bias", "approx", "refused",
)  # fmt: skip
COLOUR = {name: f"#0102{index + 16:02x}" for index, name in enumerate(NAMES)}
"""Marker colour of each CSS variable."""
POINTS_PER_PIXEL = 72 / 96
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "palmette",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": COLOUR["muted"],
    "axes.labelcolor": COLOUR["muted"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": COLOUR["muted"],
    "ytick.color": COLOUR["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": COLOUR["ink"],
    "hatch.linewidth": 0.6,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib settings for every picture of a report, independent of the user's."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(cast(Any, _STYLE))
        yield


def sheet(width: float, height: float, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` CSS pixels with one set of axes inside the given margins (pixels)."""
    figure = Figure(figsize=(width / 96, height / 96))
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def bare(axes: Axes, width: float, height: float) -> None:
    """Axes without frame or ticks whose units are pixels, y downwards."""
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")


def svg(figure: Figure, key: str, alt: str) -> Markup:
    """The figure as inline SVG: unique ids, CSS colours, the page's font, no date. `alt`: what it shows."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    text = re.sub(r"url\(#", f"url(#{key}-", text)
    for name, colour in COLOUR.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", text)
    text = re.sub(r"font(?:-family)?: ?(?:[\d.]+px )?'DejaVu Sans'[^;\"]*", _font, text)
    width = re.search(r'viewBox="0 0 ([\d.]+)', text)
    pixels = round(float(width.group(1)) / POINTS_PER_PIXEL) if width else 0
    opening = f'<svg role="img" aria-label="{escape(alt)}" style="max-width:{pixels}px" class="picture"'
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r' xmlns:xlink="[^"]*"', ' xmlns:xlink="http://www.w3.org/1999/xlink"', text, count=1)
    return Markup(re.sub(r"\s*\n\s*", "\n", opening + text[len("<svg") :]))  # noqa: S704 (text was escaped by the SVG writer)


def _font(match: re.Match[str]) -> str:
    pixels = re.search(r"([\d.]+px)", match.group(0))
    return f"font-size: {pixels.group(1)}" if pixels else "font-family: inherit"


def shorten(name: str, length: int) -> str:
    """`name` cut in its middle to at most `length` characters."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}\u2026{name[len(name) - (length - 1 - head) :]}"


def distinct(names: Sequence[str], length: int) -> dict[str, str]:
    """Labels of at most `length` characters; what all paths share is cut before what tells them apart."""
    parts = {name: name.split(".") for name in names}
    fewest = min(map(len, parts.values()), default=0)
    cuts = [(head, 0) for head in range(fewest)]
    cuts += [(head, tail) for head in reversed(range(fewest)) for tail in range(1, fewest - head)]
    for head, tail in cuts:
        left_out = {(tuple(p[:head]), tuple(p[len(p) - tail :])) for p in parts.values()}
        labels = {name: _cut(p, head, tail) for name, p in parts.items()}
        if len(left_out) == 1 and max(map(len, labels.values())) <= length:
            return labels
    return {name: shorten(name, length) for name in names}


def _cut(parts: list[str], head: int, tail: int) -> str:
    return ("\u2026" if head else "") + ".".join(parts[head : len(parts) - tail]) + ("\u2026" if tail else "")
