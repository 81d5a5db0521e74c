"""Reading a network's weights from files of tensors; nothing in a weights file is ever run."""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from palmette.errors import InputError

_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")
_SHOWN = 3  # names listed in a message


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the tensors of a .safetensors file, or of a .pt that holds only weights, into `model`, all of them or none.

    A state dict under "state_dict" or "model" is found, and the "module." of DataParallel is taken off. Raises
    InputError for a file that is missing or truncated, for a pickle that carries code, and for names, shapes or kinds
    that differ (the first ones are named).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such weights file", where=str(path))
    read = _read_safetensors if _is_safetensors(path) else _read_torch
    found = read(path)
    own = model.state_dict()
    if found and not set(found) & set(own) and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    _check_names(found, own, path)
    _check_tensors(found, own, path)
    model.load_state_dict(found, strict=False)  # names were checked above, with shared tensors taken into account


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise InputError("weights are truncated or no safetensors file", where=str(path), why=_line(error)) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    damaged = "weights are truncated or no weights file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on pickle protocols, for files that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = _culprit(str(error))
        if culprit is None or not _looks_pickled(path):
            raise InputError(damaged, where=str(path)) from error
        raise InputError(
            "weights file refused",
            where=str(path),
            why=f"it is a pickle that carries more than tensors ({culprit}), so reading it could run code",
            fix="Save model.state_dict() with safetensors.torch.save_file, or with torch.save, and use that file",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        why = _line(error) if _looks_pickled(path) else None  # of other files the reader's words mean nothing
        raise InputError(damaged, where=str(path), why=why) from error
    return _state_dict(content, path)


def _looks_pickled(path: Path) -> bool:
    """A zip as torch writes it, or the opening byte of pickle's protocols."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


def _culprit(message: str) -> str | None:
    """What torch's reader refused, from its long message; None where it stumbled over something else."""
    found = re.search(
        r"GLOBAL (\S+)|Unsupported class (\S+)|Unsupported (operand \d+)|instantiate class (\S+)", message
    )
    return next(name for name in found.groups() if name) if found else None


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors in what was read."""
    candidates = [content]
    if isinstance(content, Mapping):
        candidates += [content[key] for key in _NESTED if key in content]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return {str(name): tensor for name, tensor in candidate.items()}
    kind = f"a dict of {_some(list(content))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise InputError("no state dict in the weights file", where=str(path), why=f"it holds {kind}")


def _check_names(found: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Raises InputError naming the first names that only one side has.

    Counters and tensors shared with a present one may be absent.
    """
    present = {tensor.data_ptr() for name, tensor in own.items() if name in found and tensor.numel()}
    missing = [
        name
        for name, tensor in own.items()
        if name not in found and not name.endswith("num_batches_tracked") and tensor.data_ptr() not in present
    ]
    unexpected = [name for name in found if name not in own]
    if not missing and not unexpected:
        return
    sides = []
    if missing:
        sides.append(f"{len(missing)} of the model's tensors are not in the file ({_some(missing)})")
    if unexpected:
        sides.append(f"{len(unexpected)} of the file's are not in the model ({_some(unexpected)})")
    fix = _prefix(missing, unexpected)
    if _is_ours(path):
        fix = "The file holds a shrunk network: rebuild it with palmette.load(source_model, file)"
    raise InputError("weights do not fit the model", where=str(path), why="; ".join(sides), fix=fix)


def _prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """What to do when one side's names are the other's behind a prefix, as wrappers around a model leave them."""
    for longer, shorter, fix in (
        (unexpected, missing, "Take {!r} off the names in the file"),
        (missing, unexpected, "Put {!r} before the names in the file"),
    ):
        names = [name for name in shorter if not name.endswith("num_batches_tracked")]
        for name in (n for n in longer if names and n.endswith(f".{names[0]}")):
            prefix = name.removesuffix(names[0])
            if {prefix + other for other in names} <= set(longer):
                return fix.format(prefix)
    return None


def _check_tensors(found: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Raises InputError naming the first tensors whose shape or kind differs, or that hold NaN."""
    wrong = [n for n, t in found.items() if t.shape != own[n].shape]
    if wrong:
        shown = ", ".join(f"{n} is {_shape(found[n])}, the model's {_shape(own[n])}" for n in wrong[:_SHOWN])
        raise InputError(f"{_tensors(wrong)} of the wrong shape", where=str(path), why=shown)
    kinds = [n for n, t in found.items() if t.is_floating_point() != own[n].is_floating_point()]
    if kinds:
        shown = ", ".join(f"{n} is {found[n].dtype}, the model's {own[n].dtype}" for n in kinds[:_SHOWN])
        raise InputError(f"{_tensors(kinds)} of the wrong kind", where=str(path), why=shown)
    broken = [n for n, t in found.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if broken:
        raise InputError("weights hold NaN or infinite values", where=str(path), why=_some(broken))


def _is_ours(path: Path) -> bool:
    """Whether the file's metadata says that palmette wrote it with a plan."""
    if not _is_safetensors(path):
        return False
    with path.open("rb") as file:
        head = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return any(key.startswith("palmette") for key in head.get("__metadata__", {}))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
