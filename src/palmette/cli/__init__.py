"""The command line: one command per verb; it parses, calls and prints."""

from palmette.cli.app import app, main

__all__ = ["app", "main"]
