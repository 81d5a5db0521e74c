"""Networks from makers: palmette's own zoo, timm, torchvision, and local Hugging Face folders.

Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palmette import compat, models
from palmette.errors import InputError

Shape = tuple[int, int, int]  # channels, height, width
MAKERS = ("palmette", "timm", "torchvision", "hf")
MODEL_HELP = """Model: palmette:NAME | timm:NAME | torchvision:NAME | hf:PATH | path/file.py:function.
  palmette:NAME          a small network of palmette's own zoo, random weights
  timm:NAME              built by timm, random weights (give --weights)
  torchvision:NAME       built by torchvision, random weights (give --weights)
  hf:PATH                a local folder with config.json, and its weights where they are there
  path/file.py:function  your function: returns an nn.Module, or (module, example_inputs)"""
_HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HF_TASKS = {"ForImageClassification": "AutoModelForImageClassification"}
_HF_TASKS["ForSequenceClassification"] = "AutoModelForSequenceClassification"


def build_model(spec: str, *, num_classes: int | None, shape: Shape | None, trust: bool = False) -> nn.Module:
    """The network that `maker:name` names. Raises InputError for an unknown maker or name, suggesting the nearest."""
    maker, _, name = spec.partition(":")
    if maker not in MAKERS or not name:
        near = get_close_matches(maker, MAKERS, n=1) if name else []
        forms = "palmette:NAME, timm:NAME, torchvision:NAME, hf:PATH or path/file.py:function"
        raise InputError(
            "no such model", where=spec, fix=f"Did you mean {near[0]}:{name}?" if near else f"Write {forms}"
        )
    if maker == "palmette":
        return models.build(name, num_classes=num_classes or 10, shape=shape)
    if maker == "hf":
        return _hugging_face(Path(name).expanduser(), num_classes, trust=trust)
    _check_name(maker, name)
    sized = {} if num_classes is None else {"num_classes": num_classes}
    try:
        if maker == "timm":
            made = compat.timm().create_model(name, pretrained=False, **sized)
        else:
            made = compat.torchvision().models.get_model(name, weights=None, **sized)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{maker} cannot build {name}", where=spec, why=_line(error)) from error
    module: nn.Module = made
    return module


def declared_shape(spec: str) -> Shape | None:
    """(channels, height, width) that the maker says the network takes; None where it says nothing. Builds nothing."""
    maker, _, name = spec.partition(":")
    if maker == "palmette":
        return models.entry(name).shape
    if maker == "timm":
        _check_name(maker, name)
        found = compat.timm().get_pretrained_cfg(name, allow_unregistered=True)
        return _triple(found.input_size) if found is not None else (3, 224, 224)
    if maker == "torchvision":
        _check_name(maker, name)
        weights = list(compat.torchvision().models.get_model_weights(name))
        side = int(weights[-1].transforms().crop_size[0]) if weights else 224
        return 3, side, side
    if maker == "hf":
        config = _read_config(Path(name).expanduser())
        size = config.get("image_size")
        if size is None:
            return None
        sides = size if isinstance(size, list) else [size, size]
        return int(config.get("num_channels", 3)), int(sides[0]), int(sides[1])
    return None


def example_for(model: nn.Module, shape: Shape | None) -> Any:
    """Two random images of `shape`, or for a text model two sequences of 16 tokens; None where nothing is known."""
    generator = torch.Generator().manual_seed(0)
    if shape is not None:
        return torch.randn(2, *shape, generator=generator)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    tokens = torch.randint(
        vocabulary // 2, vocabulary, (2, 16), generator=generator
    )  # the upper half: no padding there
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _check_name(maker: str, name: str) -> None:
    if maker == "timm":
        package = compat.timm()
        known, found = package.list_models(), package.is_model(name.partition(".")[0])
    else:
        package = compat.torchvision().models
        known = package.list_models(module=package)
        found = name in known
    if not found:
        raise InputError(f"{maker} has no model {name!r}", fix=_nearest(name, known, maker))


def _nearest(name: str, known: Iterable[str], maker: str) -> str | None:
    near = get_close_matches(name, list(known), n=1)
    return f"Did you mean {maker}:{near[0]}?" if near else None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(
            "no config.json in the Hugging Face folder",
            where=str(folder),
            fix="Nothing is downloaded here: run hf download NAME --local-dir DIR first, then write hf:DIR",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("config.json cannot be read", where=str(file), why=_line(error)) from error
    if not isinstance(config, dict):
        raise InputError("config.json holds no object", where=str(file))
    return config


def _hugging_face(folder: Path, num_classes: int | None, *, trust: bool) -> nn.Module:
    """A classifier by transformers' Auto classes, with the folder's weights, or random ones where it has none."""
    raw = _read_config(folder)
    transformers = compat.transformers()
    architecture = next(iter(raw.get("architectures") or []), "")
    task = next((auto for ending, auto in _HF_TASKS.items() if architecture.endswith(ending)), None)
    if task is None:
        named = f"config.json names {architecture}" if architecture else "config.json names no architecture"
        raise InputError(
            "not a classifier",
            where=str(folder),
            why=named,
            fix=f"Its architecture must end in {' or '.join(_HF_TASKS)}",
        )
    auto = getattr(transformers, task)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
        if any((folder / name).is_file() for name in _HF_WEIGHTS):
            model, report = auto.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=trust, output_loading_info=True
            )
            _check_complete(report, folder)
        else:
            if num_classes is not None:
                config.num_labels = num_classes
            model = auto.from_config(config, trust_remote_code=trust)
    except InputError:
        raise
    except Exception as error:  # transformers and its validators raise exceptions of their own
        fix = "Add --trust if you trust its code" if "auto_map" in raw and not trust else None
        raise InputError("transformers cannot load the folder", where=str(folder), why=_line(error), fix=fix) from error
    module: nn.Module = model.float()
    return module


def _check_complete(report: dict[str, Any], folder: Path) -> None:
    """Raises InputError where transformers filled missing tensors with random numbers, which it only warns of."""
    missing = sorted(report.get("missing_keys") or [])
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(f"{len(missing)} of the model's tensors are not in the folder", where=str(folder), why=shown)


def _triple(shape: Iterable[int]) -> Shape:
    channels, height, width = (int(side) for side in shape)
    return channels, height, width


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
