"""One HTML file per run, read from the run folder only: no network, no script, legible in print, light and dark."""

from __future__ import annotations

from palmette.report.render import render

__all__ = ["render"]
