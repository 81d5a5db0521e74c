"""Every code block of the README and the documentation runs, and the generated pages are up to date.

Python blocks of a page share one namespace and one temporary folder; commands that start with `palmette` run there
too, in order. A line `<!-- test: slow -->` before a block keeps its page's remainder for the slow suite;
`<!-- test: skip, REASON -->` leaves one block out. A block with `title="nets.py"` is also the file of that name.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from palmette.compat import declare_missing_schemas

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("bash", "sh", "shell", "console")
FENCE = re.compile(
    r"^(?:<!-- test: (?P<mark>slow|skip)(?:, (?P<reason>[^>]+?))? -->\n+)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[\w.]+)\")?[^\n]*\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    line: int
    mark: str | None
    reason: str | None
    title: str | None = None

    @property
    def commands(self) -> list[list[str]]:
        lines = self.body.replace("\\\n", " ").splitlines()
        split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
        return [words for words in split if words and words[0] == "palmette"]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m["language"], m["body"], text.count("\n", 0, m.start("body")), m["mark"], m["reason"], m["title"])
        for m in FENCE.finditer(text)
    ]


def run_page(page: Path, chosen: list[Block], folder: Path) -> int:
    declare_missing_schemas()  # pages import transformers, which fails beside a torchvision for another torch
    namespace: dict[str, object] = {"__name__": "__docs__"}
    done = 0
    for block in chosen:
        if block.title:
            (folder / block.title).write_text(block.body)
        if block.language == "python":
            exec(compile("\n" * block.line + block.body, str(page), "exec"), namespace)
            done += 1
        elif block.language in SHELLS:
            for words in block.commands:
                run_command(words, folder, f"{page.name}, line {block.line}")
                done += 1
    return done


def run_command(words: list[str], folder: Path, where: str) -> None:
    command = [sys.executable, "-m", "palmette", *words[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{where}: {shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def runnable(page: Path, *, slow: bool) -> list[Block]:
    """The blocks that run: up to the first slow one in the default suite, all of them in the slow one."""
    found = [block for block in blocks(page) if block.mark != "skip"]
    first_slow = next((at for at, block in enumerate(found) if block.mark == "slow"), None)
    if slow:
        return found if first_slow is not None else []
    return found[:first_slow]


def has_code(block: Block) -> bool:
    return block.language == "python" or (block.language in SHELLS and bool(block.commands))


def names(*, slow: bool) -> list[object]:
    return [pytest.param(page, id=page.name) for page in PAGES if any(map(has_code, runnable(page, slow=slow)))]


@pytest.mark.parametrize("page", names(slow=False))
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page(page, runnable(page, slow=False), tmp_path) > 0


@pytest.mark.slow
@pytest.mark.parametrize("page", names(slow=True))
def test_slow_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page(page, runnable(page, slow=True), tmp_path) > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_that_is_left_out_says_why(page):
    assert [f"{page.name}:{block.line}" for block in blocks(page) if block.mark == "skip" and not block.reason] == []


def test_no_fence_escapes_the_reader():
    for page in PAGES:
        assert len(re.findall(r"^```", page.read_text(), re.MULTILINE)) == 2 * len(blocks(page)), page.name


def test_generated_pages_are_up_to_date():
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"run `make docs-generate` and commit what it writes\n{done.stdout}{done.stderr[-2000:]}"
    )


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES[1:] if page.name not in menu] == []


def test_links_between_pages_resolve():
    outside = ("http://", "https://", "mailto:")
    broken = [
        f"{page.name}: {target}"
        for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if not target.startswith(outside) and not (page.parent / target).exists()
    ]
    assert broken == []
