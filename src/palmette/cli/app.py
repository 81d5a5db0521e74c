"""The typer application and its entry point, which turns every PalmetteError into one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

import palmette.ranks as ranks
from palmette.cli import adapt, curve, demo, files, look, profile, shrink, specialize, tables
from palmette.errors import PalmetteError

app = typer.Typer(
    name="palmette",
    help="Make trained PyTorch networks physically smaller and faster, and prove that they still work.",
    epilog="Start with: palmette demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("shrink")(shrink.shrink)
app.command("curve")(curve.curve)
app.command("specialize")(specialize.specialize)
app.command("adapt")(adapt.adapt)
app.command("profile")(profile.profile)
app.command("sites")(look.sites)
app.command("measure")(look.measure)
app.command("methods")(look.methods)
app.command("collapse")(files.collapse)
app.command("export")(files.export)
app.command("report")(files.report)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"palmette {version('palmette')}")
        raise typer.Exit


@app.callback()
def palmette(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make trained PyTorch networks physically smaller and faster, and prove that they still work."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 for input that cannot be used, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    first = ranks.is_first()  # several processes of one run: the first speaks
    tables.console.quiet = not first
    try:
        app(args=given, prog_name="palmette")
    except PalmetteError as error:
        if debug:
            raise
        if first or not error.told:
            typer.echo(f"palmette{'' if first else ', another process'}: {' '.join(str(error).split())}", err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if first:
            typer.echo("palmette: interrupted; the same command with --resume continues", err=True)
        raise SystemExit(130) from None
