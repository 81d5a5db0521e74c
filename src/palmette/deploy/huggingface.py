"""Write a shrunk network as a Hugging Face folder that `from_pretrained` loads, proven before the folder appears.

Where only whole layers went, the folder is one of the model's own class: its config names fewer layers, and the layers
that stay are numbered anew, so that caches of keys and values fit them. Where something went inside a layer (an
activation that was merged, one block of two), the folder also holds `modeling_palmette.py`, which replaces these
modules after the model's own class has built them; it needs transformers and torch, not palmette, and is loaded with
`trust_remote_code=True`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from palmette import compat
from palmette.deploy.hf_config import Kept, renumbered, shortened
from palmette.deploy.hf_difference import Difference, difference, refused, structures
from palmette.deploy.hf_proof import Proof, answers, cache_error, random_inputs
from palmette.deploy.parity import Parity, measure_parity
from palmette.deploy.plain import one_line
from palmette.errors import ExportError, InputError, PalmetteError
from palmette.files import TEMPORARY_PREFIX, read_json, write_json
from palmette.graph.capture import capture, is_captured
from palmette.graph.inputs import Example, call

CODE = "modeling_palmette.py"
NOTE = "palmette.json"
_COMPANIONS = (
    "tokenizer*.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.model",
    "*.spm",
    "*processor*_config.json",
    "chat_template*",
    "generation_config.json",
)
"""What is copied from the folder of the source: tokenizers, processors and how to generate, nothing else."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceReport:
    """What was written.

    standard: whether the model's own class loads the folder; else `trust_remote_code=True` is needed. layers: kept
    layers by container, as numbered in the dense model; linear, skipped: replaced modules by their paths in the
    folder's model. parity: of the logits with the shrunk network's, on examples, noise, real batches and padded ones;
    cache_error: largest relative difference of the next token's logits with a cache and without (None: no cache).
    """

    folder: Path
    model_class: str
    standard: bool
    parity: Parity
    cache_error: float | None
    layers: dict[str, list[int]] = field(default_factory=dict)
    linear: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "folder": self.folder.name, "parity": self.parity.to_dict()}

    def __str__(self) -> str:
        how = "from_pretrained" if self.standard else "from_pretrained with trust_remote_code=True"
        return f"{self.model_class}, {how}: {self.parity}"


def is_hugging_face(model: nn.Module) -> bool:
    """Whether `model` is a model of transformers; imports nothing."""
    package = sys.modules.get("transformers.modeling_utils")
    return package is not None and isinstance(model, package.PreTrainedModel)


def save_pretrained(
    network: nn.Module,
    source: nn.Module,
    folder: str | Path,
    example_inputs: Example | None = None,
    *,
    batches: Iterable[Any] | None = None,
    dense: fx.GraphModule | None = None,
) -> HuggingFaceReport:
    """Write `network`, which palmette made from `source`, so that transformers loads it; returns what was proven.

    network: captured, edited by drops, or collapsed. source: the dense PreTrainedModel. example_inputs: of the shapes
    that the network was captured with, by default random ones; batches: real inputs for the comparison, too. dense:
    `source` as `capture` returned it, where that is at hand.
    Written to a temporary folder, loaded again, compared, and only then moved to `folder`, which may hold an earlier
    folder of this function and nothing else. Tokenizer files in the folder that `source` came from are copied.
    Raises InputError for something else than such networks, ExportError for a change that no class of transformers can
    hold or a folder that does not compute what the network computes; nothing is left then.
    """
    if not is_captured(network) or not is_hugging_face(source):
        raise InputError(
            "save_pretrained needs a network that palmette made and the transformers model that it was made from",
            why=f"it got a {type(network).__name__} and a {type(source).__name__}",
        )
    target = Path(folder)
    _check_target(target)
    shrunk: Any = network
    example = random_inputs(shrunk, source) if example_inputs is None else example_inputs
    found = difference(shrunk, capture(source, example) if dense is None else dense, source)
    proof = Proof(shrunk, example, batches)
    errors: list[PalmetteError] = []
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in _attempts(found, source, example):
        place = Path(tempfile.mkdtemp(dir=target.parent, prefix=TEMPORARY_PREFIX))
        try:
            with _quiet():
                report = _written(attempt, found.state, source, place, proof)
            return _moved(report, source, place, target)
        except PalmetteError as error:
            errors.append(error)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    raise errors[0]


def _check_target(target: Path) -> None:
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / NOTE).is_file())):
        raise InputError("The folder holds something else", where=str(target), fix="Name a new or empty folder.")


# ---- what may be written ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """A config for the model's own class, and the modules that it has to replace (none: a standard folder)."""

    config: Any
    layers: list[Kept]
    linear: dict[str, tuple[int, int, bool]]
    skip: dict[str, dict[str, Any]]

    @property
    def standard(self) -> bool:
        return not self.linear and not self.skip


def _attempts(found: Difference, source: nn.Module, example: Example) -> Iterator[_Attempt]:
    """Fewer layers by every config that fits, then as many as before, those that are gone handing their input on."""
    inner = found.zero | found.through | set(found.fitted)
    shapes = structures(source, inner | found.gone, lambda model: _called(model, example))

    def skip(path: str) -> dict[str, Any]:
        place, length = shapes[path]
        told = {"zero": path in found.zero, "place": place, "length": length}
        return {**told, "size": list(found.fitted[path])} if path in found.fitted else told

    for config in shortened(source, found.layers):
        yield _Attempt(
            config=config,
            layers=found.layers,
            linear={_name(path, found.layers): size for path, size in found.linear.items()},
            skip={_name(path, found.layers): skip(path) for path in sorted(inner)},
        )
    if found.layers:
        config = next(shortened(source, ()))
        yield _Attempt(
            config=config,
            layers=[],
            linear=found.linear,
            skip={path: skip(path) for path in sorted(inner | found.gone)},
        )


def _name(path: str, layers: list[Kept]) -> str:
    """The path of a module that stays, in the model with fewer layers."""
    return str(renumbered(path, layers))


def _called(model: nn.Module, inputs: Any) -> Any:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return call(model, inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---- writing ---------------------------------------------------------------------------------------------------------


def _written(
    attempt: _Attempt, state: dict[str, Tensor], source: nn.Module, place: Path, proof: Proof
) -> HuggingFaceReport:
    """Write the folder, load it again, and hold it against the network. Raises ExportError."""
    kind = _model_class(attempt, source, place)
    try:
        model = kind(_config(attempt, kind))
    except Exception as error:
        raise refused("The network", f"its class cannot be built again ({one_line(error)})") from error
    _fill(model, state, source, attempt)
    try:
        model.to(next(source.parameters()).dtype).eval().save_pretrained(place)
        _finish_config(place, attempt, source)
        loaded = kind.from_pretrained(place, local_files_only=True).eval()
    except Exception as error:
        raise ExportError("The folder cannot be written and loaded again", why=one_line(error)) from error
    parity = measure_parity(
        proof.reference, answers(loaded), proof.example, proof.batches, main=0, runtime="transformers"
    )
    return HuggingFaceReport(
        folder=place,
        model_class=type(source).__name__,
        standard=attempt.standard,
        parity=parity,
        cache_error=cache_error(loaded, proof.example),
        layers={kept.path: list(kept.indices) for kept in attempt.layers},
        linear=sorted(attempt.linear),
        skipped=sorted(attempt.skip),
    )


def _model_class(attempt: _Attempt, source: nn.Module, place: Path) -> Any:
    """The model's own class, or the one of the code that is written beside the weights, imported from there."""
    if attempt.standard:
        return type(source)
    classes = {"@MODEL@": type(source), "@CONFIG@": type(attempt.config)}
    text = Path(__file__).with_name("templates").joinpath(f"{CODE}.txt").read_text(encoding="utf-8")
    for mark, kind in classes.items():
        if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
            raise refused(f"A {kind.__name__} of a script", "its class cannot be imported from elsewhere")
        text = text.replace(mark, f"{kind.__module__}:{kind.__name__}")
    (place / CODE).write_text(text, encoding="utf-8")
    spec: Any = importlib.util.spec_from_file_location(f"{place.name.replace('.', '_')}_modeling", place / CODE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # transformers looks a class's module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise refused("The network", f"its class cannot be extended ({one_line(error)})") from error
    return module.PalmetteModel


def _config(attempt: _Attempt, kind: Any) -> Any:
    """The config of the model that is written: the source's own kind, or that of the code beside it."""
    if attempt.standard:
        return attempt.config
    config = kind.config_class.from_dict({**attempt.config.to_dict(), "model_type": kind.config_class.model_type})
    config.palmette = {"linear": {k: list(v) for k, v in attempt.linear.items()}, "skip": attempt.skip}
    return config


def _fill(model: nn.Module, state: dict[str, Tensor], source: nn.Module, attempt: _Attempt) -> None:
    """Load the network's tensors; those that the network does not read (unused heads) stay as they are in `source`."""
    before, wanted = source.state_dict(), model.state_dict()
    old = {new: name for name in {**state, **before} if (new := renumbered(name, attempt.layers)) is not None}
    values: dict[str, Tensor] = {}
    for name, like in wanted.items():
        value = state.get(old.get(name, name), before.get(old.get(name, name)))
        if value is None or value.shape != like.shape:
            raise refused(f"'{name}'", "the network has no tensor of its shape for it")
        values[name] = value.detach().cpu().to(like.dtype)
    used = {old.get(name, name) for name in wanted}
    left = sorted(set(state) - used - set(before))
    if left:
        raise refused(f"'{left[0]}'", "the model has no place for this tensor of the network")
    model.load_state_dict(values)


def _finish_config(place: Path, attempt: _Attempt, source: nn.Module) -> None:
    """The class that the folder is for, and where its code stands."""
    config = read_json(place / "config.json")
    config["architectures"] = [type(source).__name__]
    config.pop("auto_map", None)
    if not attempt.standard:
        code = CODE.removesuffix(".py")
        names = _auto_classes(source) or ["AutoModel"]
        config["auto_map"] = {"AutoConfig": f"{code}.PalmetteConfig"} | dict.fromkeys(names, f"{code}.PalmetteModel")
    write_json(place / "config.json", config)


def _auto_classes(source: nn.Module) -> list[str]:
    """The Auto classes of transformers that know the model's class."""
    module = compat.transformers().models.auto.modeling_auto
    found = []
    for name in dir(module):
        mapping = getattr(getattr(module, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        known = mapping[type(source.config)] if mapping is not None and type(source.config) in mapping else ()
        if type(source) in (known if isinstance(known, tuple | list) else (known,)):
            found.append(name)
    return found


def _moved(report: HuggingFaceReport, source: nn.Module, place: Path, target: Path) -> HuggingFaceReport:
    """Put the proven folder in its place, with the tokenizer's files and a note of what it is."""
    name = str(getattr(source.config, "_name_or_path", "") or "")  # empty: built from a config, and of no folder
    for file in sorted(Path(name).iterdir()) if name and Path(name, "config.json").is_file() else ():
        known = any(fnmatch(file.name, pattern) for pattern in _COMPANIONS)
        if known and file.is_file() and not (place / file.name).exists():
            shutil.copyfile(file, place / file.name)
    shutil.rmtree(place / "__pycache__", ignore_errors=True)
    done = HuggingFaceReport(**{**vars(report), "folder": target})
    write_json(place / NOTE, done.to_dict())
    place.chmod(0o755)
    _put(place, target)
    return done


def _put(place: Path, target: Path) -> None:
    """Move a folder to `target`; an earlier one there is set aside before and removed after, so that none is lost."""
    if not target.exists():
        place.rename(target)
        return
    earlier = target.rename(target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{target.name}"))
    try:
        place.rename(target)
    except OSError:
        earlier.rename(target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers."""
    logging = compat.transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
