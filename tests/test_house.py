"""The rules of the house, held by reading the sources: lengths, docstrings, import order, what may not be written."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "palmette"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CODE = [*SOURCES, *sorted(path for folder in ("tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py"))]

# The rooms of the house from the ground up. A module imports from rooms below its own, or from its own room.
ROOMS = (
    ("errors",),
    ("ranks",),
    ("files", "seeding", "stats", "device", "compat", "usercode", "weights", "models"),
    ("run", "registry", "zoo", "data"),
    ("graph", "meter"),  # a merge is timed by the meter, the meter reads captured graphs; no cycle between modules
    ("train",),
    ("resolve", "deploy", "report", "trials"),
    ("depth", "ondevice", "supernet", "sparsity", "fairness"),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
NEIGHBOURS = {"graph", "meter"}  # the only two rooms on one floor that may use each other

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in SOURCES}


def functions(paths: list[Path]) -> list[tuple[str, int]]:
    """Every function with its length in lines, decorators and docstring left out."""
    return [
        (f"{name(path)}:{node.lineno} {node.name}", node.end_lineno - body_start(node) + 1)
        for path in paths
        for node in ast.walk(tree(path))
        if isinstance(node, FUNCTIONS)
    ]


def body_start(node: ast.FunctionDef) -> int:
    """The line where the statements begin that are not the docstring; a long signature is not a long function."""
    body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
    return body[0].lineno


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_no_file_is_longer_than_400_lines():
    lengths = {name(path): len(path.read_text().splitlines()) for path in CODE}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_no_function_is_longer_than_60_lines_and_few_than_50():
    found = functions(CODE)
    assert [entry for entry in found if entry[1] > 60] == []
    long = [entry for entry in found if entry[1] > 50]
    assert len(long) < 0.02 * len(found), long


# ---- docstrings and imports ------------------------------------------------------------------------------------------


def public(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """The public classes and functions of a module, and the public methods of its public classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)) and not child.name.startswith("_"):
            if not any(ast.unparse(mark).split(".")[-1] in {"overload", "setter"} for mark in child.decorator_list):
                yield f"{prefix}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_everything_public_has_a_docstring(path):
    documented = itertools.chain([("the module", tree(path))], public(tree(path), ""))
    assert [what for what, node in documented if not ast.get_docstring(node)] == []


def imports(path: Path, *, lazy: bool) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of palmette; lazy: also those inside functions. Not those for type checking."""
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, FUNCTIONS) and not lazy:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "palmette":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "palmette")
        waiting += ast.iter_child_nodes(node)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downwards(module):
    here = room(module)
    assert here in FLOOR, f"{here} has no floor: give it one in ROOMS"
    upwards = []
    for line, other in imports(MODULES[module], lazy=True):
        there = room(other)
        allowed = there == here or FLOOR[there] < FLOOR[here] or {here, there} == NEIGHBOURS
        if not allowed:
            upwards.append(f"line {line}: {other}")
    assert upwards == []


def test_no_two_modules_import_each_other():
    graph = {module: {other for _, other in imports(path, lazy=False)} - {module} for module, path in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# ---- what may not be written -----------------------------------------------------------------------------------------


def calls(path: Path, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield node


def constant(call: ast.Call, keyword: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == keyword and isinstance(k.value, ast.Constant)), None)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_assert_in_the_product(path):
    assert [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)] == []


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_pickled(path):
    assert imported(path) & {"cloudpickle", "dill", "marshal", "shelve", "joblib"} == set()
    used = {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} <= {
        "pickle.UnpicklingError"
    }  # to say what was refused
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "pickle" for node in ast.walk(tree(path)))
    assert [call.lineno for call in calls(path, "torch.load") if constant(call, "weights_only") is not True] == []
    assert [call.lineno for call in calls(path, "np.load", "numpy.load") if constant(call, "allow_pickle")] == []
    assert [call.lineno for call in calls(path, "torch.save")] == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_model_zoos_are_reached_through_compat_only(path):
    if path.name != "compat.py":
        assert imported(path) & {"torchvision", "timm"} == set()


def tracked() -> list[Path]:
    """The text files that are, or would be, under version control; without git, those of the source tree."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        listed = [name(path) for path in [*CODE, *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]]
    binary = {".png", ".svg", ".npz", ".gz", ".safetensors", ".onnx", ".pt2"}
    return [ROOT / line for line in listed if line and Path(line).suffix not in binary and (ROOT / line).is_file()]


FORBIDDEN = {
    "a path of one machine": r"(?<![\w.*)])/(?:work|tmp|root|home)/",
    "the host of a package registry": "|".join(
        ("pypi" + r"\.org", "python" + r"hosted\.org", "--(?:extra-)?index" + "-url")
    ),
    "something left open": "|".join(r"\b" + word + r"\b" for word in ("TO" + "DO", "FIX" + "ME", "X" + "XX")),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what):
    me = Path(__file__)
    found = [
        f"{name(path)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path != me
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert found == []


def test_every_skip_has_a_reason():
    marks = ("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail")
    silent = [
        f"{name(path)}:{call.lineno}"
        for path in CODE
        for call in [*calls(path, "pytest.skip"), *calls(path, *marks)]
        if not any(keyword.arg == "reason" for keyword in call.keywords)
        and (ast.unparse(call.func) in marks or not call.args)
    ]
    bare = [
        name(path)
        for path in CODE
        for mark in marks
        if re.search(rf"@{re.escape(mark)}$", path.read_text(), re.MULTILINE)
    ]
    assert silent + bare == []


def test_the_two_lists_of_dependencies_agree():
    text = (ROOT / "pyproject.toml").read_text()
    pinned = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {re.sub(r"[-_.]+", "-", entry).lower() for entry in pinned}
    wanted = {re.sub(r"[-_.]+", "-", entry).lower() for entry in re.findall(r'"([A-Za-z][\w.-]*)>=', text)}
    assert wanted - pinned == set(), "constraints.txt pins whatever pyproject.toml asks for"
