"""Save a network with its plan in one safetensors file, and rebuild it from its source network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn

from palmette.errors import InputError, PlanError
from palmette.files import write_atomic
from palmette.graph.capture import capture, is_captured, make_inputs, set_shapes
from palmette.graph.int8 import from_integers, note, stored_weights
from palmette.graph.ops import remove_dead
from palmette.graph.plan import Plan
from palmette.graph.resize import resize
from palmette.graph.rewrite import replay

FORMAT = 1
SCALES = ":scales"
"""Behind the name of a weight in 8 bits: the name of its scales."""


def structure_hash(model: nn.Module) -> str:
    """Hash of the names, shapes and dtypes of a model's state: equal for two models of one architecture."""
    lines = sorted(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in model.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def weights_hash(state: dict[str, Tensor]) -> str:
    """Hash of the contents of a state."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:16]


def save(model: nn.Module, file: str | Path, *, source: nn.Module | None = None) -> None:
    """Write the weights of an edited or collapsed network with what `load` needs to rebuild it.

    The file is written atomically and without pickle; weights in 8 bits are int8 in it. `source`: the network it was
    made from; when given, `load` refuses a source of another structure.
    Raises InputError if `model` did not come from palmette.
    """
    if not is_captured(model):
        raise InputError(
            "Only networks that palmette made can be saved with a plan", fix="Save others with safetensors."
        )
    meta: Any = model.meta
    info: dict[str, Any] = dict(meta["palmette"])
    state, aliases = _unshared(model.state_dict())
    stored = stored_weights(model)
    for name, (integers, scales) in stored.items():
        state |= {name: integers, f"{name}{SCALES}": scales}
    facts = {
        "format": str(FORMAT),
        "torch": torch.__version__.split("+")[0],
        "plan": info.get("plan") or Plan().to_json(),
        "pad": info.get("pad", "repad"),
        "inputs": json.dumps(info["inputs"]),
        "collapsed": json.dumps(bool(info.get("collapsed"))),
        "steps": json.dumps(info.get("steps", [])),
        "aliases": json.dumps(aliases),
        "int8": json.dumps(sorted(stored)),
        "source": structure_hash(source) if source is not None else "",
        "weights": weights_hash(state),
    }
    # One key only: safetensors writes several in no fixed order, and equal networks should give equal files.
    write_atomic(Path(file), to_bytes(state, metadata={"palmette": json.dumps(facts)}))


def load(source_model: nn.Module, file: str | Path) -> fx.GraphModule:
    """Rebuild the network that `save` wrote from the network it was made from, without timing or algebra.

    The weights of `source_model` do not matter.
    Raises InputError for a missing, truncated, damaged or foreign file, PlanError for another source model.
    """
    path = Path(file)
    state, metadata = _read(path)
    expected = metadata.get("source")
    if expected and expected != structure_hash(source_model):
        raise PlanError(
            "The source model has another structure than the one the file was made from",
            where=str(path),
            fix="Pass the original model.",
        )
    try:
        return _rebuilt(source_model, state, metadata, path)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            "The file's plan is damaged", where=str(path), why=f"{type(error).__name__}: {error}", fix="Write it again."
        ) from error


def _rebuilt(source_model: nn.Module, state: dict[str, Tensor], metadata: dict[str, str], path: Path) -> fx.GraphModule:
    example = make_inputs(json.loads(metadata["inputs"]))
    gm = capture(source_model, example)
    for step in _steps(metadata):
        if "plan" in step:
            gm = Plan.from_json(step["plan"]).with_blank_matrices().apply(gm, example, step["pad"])
        elif "resize" in step:
            resize(gm, step["resize"])
        else:
            _replay(gm, step["decisions"], example)
    scales = {name: state.pop(f"{name}{SCALES}") for name in json.loads(metadata.get("int8", "[]"))}
    state |= {name: from_integers(state[name], value) for name, value in scales.items()}
    for name, original in json.loads(metadata["aliases"]).items():
        state[name] = state[original]
    _fill(gm, state, path)
    note(gm, scales)
    gm.meta["palmette"]["collapsed"] = json.loads(metadata["collapsed"])
    set_shapes(gm, example)
    return gm.eval()


def _steps(metadata: dict[str, str]) -> list[dict[str, Any]]:
    """What was applied and collapsed, in order; files of an earlier version hold one plan and its decisions."""
    if "steps" in metadata:
        return list(json.loads(metadata["steps"]))
    decisions = json.loads(metadata["decisions"])
    return [{"plan": metadata["plan"], "pad": metadata["pad"]}, *([{"decisions": decisions}] if decisions else [])]


def _replay(gm: fx.GraphModule, decisions: list[dict[str, Any]], example: Any) -> None:
    """Repeat one collapse in place: its structure, without timing or algebra."""
    replay(gm, decisions)
    remove_dead(gm)
    info = gm.meta["palmette"]
    info["decisions"] = [*info.get("decisions", []), *decisions]
    info["steps"] = [*info.get("steps", []), {"decisions": decisions}]
    gm.recompile()
    set_shapes(gm, example)


def read_plan(file: str | Path) -> Plan:
    """The plan stored with a saved network."""
    return Plan.from_json(_read(Path(file))[1]["plan"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise InputError("There is no such file", where=str(path), fix="Pass the model.safetensors of a run.")
    try:
        with safe_open(str(path), framework="pt") as f:
            facts = (f.metadata() or {}).get("palmette", "{}")
            state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(
            "The file is truncated or no safetensors file", where=str(path), why=str(error), fix="Write it again."
        ) from error
    metadata = _parsed(facts)
    if metadata.get("format") != str(FORMAT):
        raise InputError(
            "The file holds no palmette plan",
            where=str(path),
            fix="Pass a file written by palmette, or load plain weights with --weights.",
        )
    if metadata.get("weights") not in (None, weights_hash(state)):
        raise InputError("The file's weights are not those it was written with", where=str(path), fix="Write it again.")
    return state, metadata


def _parsed(text: str) -> dict[str, str]:
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _unshared(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each storage once, and for further names of a tensor the first name."""
    first: dict[Any, str] = {}
    kept, aliases = {}, {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            kept[name] = value.detach().cpu().contiguous()
    return kept, aliases


def _fill(gm: fx.GraphModule, state: dict[str, Tensor], path: Path) -> None:
    own = gm.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or wrong:
        names = ", ".join((missing + extra + wrong)[:3])
        raise PlanError(
            f"The file does not fit the source model (first differing: {names})",
            where=str(path),
            fix="Pass the original model.",
        )
    gm.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})
