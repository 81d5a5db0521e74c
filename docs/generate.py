"""Write the pages and tables that follow from the code and from measured results.

    python docs/generate.py            # rewrite them
    python docs/generate.py --check    # exit with 1 when one of them is stale

The command line comes from typer, the Python reference from the docstrings of `palmette.__all__`, the methods from the
registry, the tables from benchmarks/results/*.json.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from depth_tables import headline_table, which_tables
from layout import NOTE, escape, page, slug, table, with_table
from measured import benchmarks_page, coverage_page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

METHODS = """
`palmette methods` prints these lists.
"""
VERBS = {
    "shrink": """
A method of shrink ranks candidates for removal; the lowest score goes first. `palmette shrink --method NAME` uses one.
""",
    "adapt": """
A method of adapt says how layer inputs are kept for backward (`codec`), or which channels are trained (`slice`).
`palmette adapt --method NAME` uses one. Two more are adapt's own and have no options: `auto` mixes the exact forms, few
bits, factors and frozen layers at the least gradient error, and `lossless` takes the exact forms alone.
""",
}


def pages() -> dict[Path, str]:
    """Every generated page or page with a generated table, and the text that it should have."""
    return {
        DOCS / "cli.md": cli_page(),
        DOCS / "api.md": api_page(),
        DOCS / "methods.md": methods_page(),
        DOCS / "coverage.md": coverage_page(),
        DOCS / "benchmarks.md": benchmarks_page(),
        DOCS / "which.md": with_table((DOCS / "which.md").read_text(), "which", which_tables()),
        ROOT / "README.md": with_table((ROOT / "README.md").read_text(), "headline", headline_table()),
    }


# ---- the command line ------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """One section per command: what it does, its usage, its options."""
    import typer

    from palmette.cli import app
    from palmette.resolve import DATA_HELP, MODEL_HELP

    root = typer.main.get_command(app)
    commands = [(f"palmette {name}", command) for name, command in sorted(root.commands.items())]
    parts = [
        NOTE,
        "# Command line",
        "Input that cannot be used ends a command with one line and exit code 2. `--help` says what is below.",
        options_table(root),
        *specs(MODEL_HELP),
        *specs(DATA_HELP),
    ]
    for name, command in commands:
        parts += [f"## {name}", prose(command.help or ""), options_table(command)]
    return page(parts)


def specs(text: str) -> list[str]:
    """The forms of a --model or --data: a heading from the first line, then the text as it was laid out."""
    heading, _, forms = text.partition(": ")
    return [f"## {heading}", f"What `--{heading.lower()}` takes:", f"```text\n{forms}\n```"]


def prose(text: str) -> str:
    """A docstring as Markdown: an `Example:` line becomes a block of commands, left out of the tests that run pages."""
    body, _, example = inspect.cleandoc(text).partition("Example:")
    block = f"```text\n{example.strip()}\n```" if example else ""
    return "\n\n".join(part for part in (body.strip(), block) if part)


def options_table(command: Any) -> str:
    """The options and arguments of one command."""
    hints = get_type_hints(inspect.unwrap(command.callback))
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False) and parameter.help]
    rows = [(f"`{option_name(p, hints.get(p.name))}`", escape(p.help), option_default(p)) for p in shown]
    return table(("option", "what it does", "default"), rows) if rows else ""


def option_name(parameter: Any, hint: Any) -> str:
    """The option with its short form and the word for its value."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag or parameter.count:
        return names
    return f"{names} {parameter.metavar or value_word(hint)}"


def value_word(hint: Any) -> str:
    """A word for a value of this type: its choices, or the name of the type."""
    if get_origin(hint) is Literal:
        return "\\|".join(str(choice) for choice in get_args(hint))
    inner = [option for option in get_args(hint) if option is not type(None)]
    if inner:
        return value_word(inner[0])
    return {str: "TEXT", int: "N", float: "X", Path: "PATH"}.get(hint, "VALUE")


def option_default(parameter: Any) -> str:
    """The default as it would be typed."""
    if parameter.required:
        return "required"
    value = parameter.default() if callable(parameter.default) else parameter.default
    value = getattr(value, "value", value)
    if value is None or value is False or value == () or "UNSET" in repr(value).upper():
        return ""
    return f"`{value}`"


# ---- the Python reference --------------------------------------------------------------------------------------------


def api_page() -> str:
    """One section per public name, in alphabetical order: signature, docstring, public members."""
    import palmette

    parts = [
        NOTE,
        "# Python reference",
        "Everything here is reached as `pm.NAME` after `import palmette as pm`.",
    ]
    for name in sorted(palmette.__all__, key=str.lower):
        value = getattr(palmette, name)
        parts += [f"## {name}", signature_block(name, value), docstring(value)]
        if inspect.isclass(value):
            parts += [fields(value), members(value)]
    return page(parts)


def signature_block(name: str, value: Any) -> str:
    """The signature of a function or class, one parameter a line where it is long."""
    if not callable(value) or (inspect.isclass(value) and issubclass(value, BaseException)):
        return ""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return ""
    if inspect.isclass(value):
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    text = f"{name}{clean(str(signature))}"
    if len(text) > 110:
        inner = ",\n    ".join(clean(str(parameter)) for parameter in with_marks(signature))
        result = "" if signature.return_annotation is inspect.Signature.empty else f" -> {annotation(signature)}"
        text = f"{name}(\n    {inner},\n){result}"
    return f"```text\n{text}\n```"


def with_marks(signature: inspect.Signature) -> list[Any]:
    """The parameters, with `*` before the keyword-only ones."""
    found: list[Any] = list(signature.parameters.values())
    kinds = [parameter.kind for parameter in found]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        found.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return found


def annotation(signature: inspect.Signature) -> str:
    """The return annotation as it was written."""
    value = signature.return_annotation
    return clean(value if isinstance(value, str) else inspect.formatannotation(value))


def clean(text: str) -> str:
    """Without quotes around annotations, module prefixes and addresses."""
    text = re.sub(r"(?<=[:>] )'([^']*)'", r"\1", text)
    text = re.sub(r'(?<=[:>] )"([^"]*)"', r"\1", text)
    text = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", text)
    text = re.sub(r"<factory>", "...", text)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


def docstring(value: Any) -> str:
    """The docstring, except one that dataclass made up."""
    text = inspect.getdoc(value) or ""
    return "" if inspect.isclass(value) and text.startswith(f"{value.__name__}(") else paragraphs(text)


def paragraphs(text: str) -> str:
    """A docstring as Markdown: what is indented stays as it was laid out."""
    out: list[str] = []
    for part in inspect.cleandoc(text).split("\n\n"):
        indented = all(line.startswith("    ") for line in part.splitlines())
        out.append(f"```text\n{inspect.cleandoc(part)}\n```" if indented else part)
    return "\n\n".join(out)


def fields(value: type) -> str:
    """The fields of a dataclass that have a text of their own below them."""
    if not dataclasses.is_dataclass(value):
        return ""
    body = ast.parse(inspect.getsource(value)).body[0].body  # type: ignore[attr-defined]
    rows = [
        (f"`{field.target.id}`", escape(text.value.value))
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    ]
    return table(("field", "what it says"), rows) if rows else ""


def members(value: type) -> str:
    """The public methods and properties of a class, with the first line of what they say."""
    rows = []
    for name, member in sorted(vars(value).items()):
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        call = "" if isinstance(member, property) else "()"
        rows.append((f"`{name}{call}`", escape((inspect.getdoc(function) or "").partition("\n")[0])))
    return table(("member", "what it gives"), rows) if rows else ""


# ---- methods ---------------------------------------------------------------------------------------------------------


def methods_page() -> str:
    """One section per registered method: what it is, its paper, its options with their bounds."""
    from palmette.registry import methods

    parts = [NOTE, "# Methods", METHODS]
    for verb, text in VERBS.items():
        listed = [m for m in methods() if m.verb == verb]
        rows = [(f"[{m.name}](#{slug(m.name)})", m.ranks, m.edit, escape(m.unit), escape(m.paper)) for m in listed]
        parts += [f"## Methods of {verb}", text, table(("name", "ranks", "edit", "unit of the score", "paper"), rows)]
        for entry in listed:
            header = inspect.getdoc(importlib.import_module(entry.score.__module__)) or ""
            parts += [f"### {entry.name}", paragraphs(header), config_table(entry.config)]
    return page(parts)


def config_table(config: type) -> str:
    """The options of a method: what they mean, and a table of what is allowed."""
    from palmette.cli.look import option_rows
    from palmette.registry import config_help

    rows = [(f"`{name}`", escape(allowed), f"`{default}`") for name, allowed, default in option_rows(config)]
    if not rows:
        return "It has no options."
    return "\n\n".join([paragraphs(config_help(config)), table(("option", "allowed", "default"), rows)])


# ---- writing ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Write or check the pages; returns the exit code."""
    stale = [(path, text) for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path, text in stale:
        print(f"{'stale' if '--check' in sys.argv else 'written'}: {path.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            path.write_text(text)
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
