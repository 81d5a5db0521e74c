"""Markdown: pages, tables, cells, and tables between two markers."""

from __future__ import annotations

import re
from typing import Any

NOTE = "<!-- Written by docs/generate.py: edit what it reads, not this page. -->"


def page(parts: list[str]) -> str:
    """The parts, a blank line between them, and one newline at the end."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def table(head: tuple[str, ...], rows: list[Any]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def escape(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w-]+", "-", heading.lower()).strip("-")


def with_table(text: str, name: str, content: str) -> str:
    """The text with what stands between the two markers of `name` replaced."""
    start, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"the markers {start} and {end} are missing")
    return f"{before}{start}\n{content}\n{end}{after}" if content else f"{before}{start}\n{end}{after}"
