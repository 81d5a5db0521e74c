"""What a `.pt2` archive could run when it is loaded, read without loading it.

torch's loader unpickles some members and resolves names and formulas found in the graph. A file is plain when it has
no pickled member, calls ATen operators only, and writes its symbolic sizes with a short list of arithmetic names.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MEMBERS = re.compile(
    r"models/\w+\.json|data/(weights|constants)/(weight|tensor)_\d+|data/(weights|constants)/\w+_config\.json"
    r"|data/sample_inputs/\w+\.pt|archive_format|archive_version|byteorder|version|\.data/[\w.]+|\.format_version"
    r"|\.storage_alignment"
)
_TARGETS = re.compile(
    r"torch\.ops\.aten\.(?!from_file|_assert_async|save)\w+\.\w+|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|torch\.sym_(int|float|max|min|not|ite|sqrt)|math\.(trunc|ceil|floor)"
)
_NAMES = set(
    """
    Symbol Integer Rational Float Add Mul Pow Max Min Mod PythonMod FloorDiv CeilDiv CleanDiv ModularIndexing Identity
    IntTrueDiv FloatTrueDiv TruncToInt FloorToInt CeilToInt ToFloat PowByNatural Equality Unequality Eq Ne Lt Le Gt Ge
    StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not
    positive nonnegative nonzero integer precision evaluate true false True False
    """.split()  # noqa: SIM905 (a list of forty quoted words is harder to read)
)
_FORMULA = re.compile(r"(?:[A-Za-z]\w*|'[a-z]+\d+'|\d+(?:\.\d+)?|[-+*/%(),=<> ])*")
_TREE_TYPES = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
_NOTES = {"nn_module_stack", "torch_fn"}
_FOREIGN = {"as_custom_obj", "custom_obj", "custom_obj_values", "guards_code", "treespec_namedtuple_fields"}
_STRUCTURES = {"in_spec", "out_spec"}
_LARGEST_JSON = 512 * 1024**2


def code_in(path: Path) -> str | None:
    """Why loading the archive could run code, or None when it is plain."""
    try:
        with zipfile.ZipFile(path) as archive:
            return next(_members(archive), None)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        return f"it cannot be read as a program archive ({str(error)[:120]})"


def _members(archive: zipfile.ZipFile) -> Iterator[str]:
    models = 0
    for info in archive.infolist():
        name = info.filename.split("/", 1)[-1]
        if not _MEMBERS.fullmatch(name):
            yield f"it holds a member of unknown kind, {info.filename!r}"
        elif name.startswith("data/sample_inputs/") and info.file_size:
            yield "it holds pickled sample inputs"
        elif name.endswith(".json"):
            if info.file_size > _LARGEST_JSON:
                yield f"its member {info.filename!r} is too large to check"
                return
            models += name.startswith("models/")
            yield from _values(json.loads(archive.read(info)))
    if models != 1:
        yield f"it holds {models} programs instead of one"


def _values(value: Any) -> Iterator[str]:
    """Reasons found in a JSON value, depth first."""
    if isinstance(value, list):
        for item in value:
            yield from _values(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _entry(key, item)
            if key not in _STRUCTURES and key != "metadata":
                yield from _values(item)


def _entry(key: str, value: Any) -> Iterator[str]:
    if key == "use_pickle" and value is not False:
        yield "it holds pickled tensors"
    elif key in ("target", "as_operator") and isinstance(value, str):
        if not _TARGETS.fullmatch(value) and value not in ("", "None"):
            yield f"it calls {value[:80]!r}"
    elif key == "expr_str" and not _is_arithmetic(value):
        yield f"it evaluates the formula {str(value)[:80]!r}"
    elif key in _FOREIGN and value:
        yield f"it holds objects of other packages ({key})"
    elif key in _STRUCTURES and value:
        yield from _structure(json.loads(value))
    elif key == "metadata" and isinstance(value, dict) and not set(value) <= _NOTES:
        yield f"it holds unknown notes ({', '.join(sorted(set(value) - _NOTES))[:80]})"


def _is_arithmetic(formula: Any) -> bool:
    if not isinstance(formula, str) or not _FORMULA.fullmatch(formula):
        return False
    words = re.sub(r"'[a-z]+\d+'", "", formula)
    return all(w in _NAMES or re.fullmatch(r"[a-z]{1,2}\d+", w) for w in re.findall(r"[A-Za-z]\w*", words))


def _structure(spec: Any) -> Iterator[str]:
    """Reasons in a pytree specification `[version, tree]`: only tuples, lists and dicts with plain keys are known."""
    if isinstance(spec, list):
        for item in spec[1:]:
            yield from _structure(item)
    elif isinstance(spec, dict):
        if spec.get("type") not in _TREE_TYPES or "__enum__" in str(spec.get("context")):
            yield f"its inputs or outputs are of the type {str(spec.get('type'))[:80]!r}"
        for child in spec.get("children_spec", []):
            yield from _structure(child)
