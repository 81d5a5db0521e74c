"""Training states on the disk: one safetensors file, whole or absent, with a checksum that is verified at load.

Tensors are stored once per identity, so shared parameters are no obstacle; everything else is one JSON text in the
metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from palmette.errors import RunError
from palmette.files import read_bytes, write_atomic

_KEY = "palmette"  # a single metadata key: the order of several would differ from file to file


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and JSON-able `meta` atomically; equal content gives equal bytes. Raises RunError."""
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**meta, "checksum": digest(stored, meta)}, sort_keys=True)
    write_atomic(path, safetensors.torch.save(stored, metadata={_KEY: text}))


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a checkpoint.

    Raises RunError naming the file when it is missing, truncated, altered or not one of ours.
    """
    data = read_bytes(path)
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        meta = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
        whole = meta.pop("checksum") == digest(tensors, meta)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    if not whole:
        raise _damaged(path, "its checksum does not agree with its content")
    return tensors, meta


def _damaged(path: str | Path, why: str) -> RunError:
    return RunError(
        "A checkpoint is damaged",
        where=str(path),
        why=why,
        fix="Delete it and resume: its stage starts from the beginning.",
    )


def digest(tensors: dict[str, Tensor], meta: dict[str, Any] | None = None) -> str:
    """Hex digest of names, types, shapes and values of `tensors` and of the JSON-able `meta`."""
    state = hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        state.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters and buffers, each object once, named model.<path>."""
    found = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    return found | {f"model.{name}": buffer.detach() for name, buffer in model.named_buffers()}


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy stored values into the model's parameters and buffers, in place.

    Raises RunError naming the first tensor that is missing, superfluous or of another shape.
    """
    own = model_tensors(model)
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    for name in sorted(own.keys() ^ stored.keys()):
        owner = "the model has no such tensor" if name in stored else "the file has no such tensor"
        raise RunError(f"{name.removeprefix('model.')!r} does not fit", where=where, why=owner)
    for name, tensor in own.items():
        if tensor.shape != stored[name].shape or tensor.dtype != stored[name].dtype:
            raise RunError(
                f"{name.removeprefix('model.')!r} does not fit",
                where=where,
                why=f"{stored[name].dtype} {tuple(stored[name].shape)} in the file, "
                f"{tensor.dtype} {tuple(tensor.shape)} in the model",
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors, named optimizer.<parameter number>.<key>, and JSON-able rest: plain values and layouts.

    The layout (strides) is kept because vectorised kernels may round another way on another layout.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    strides: dict[str, list[int]] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"optimizer.{index}.{key}"
            if not isinstance(value, Tensor):
                plain[name] = value
                continue
            tensors[name] = value
            if not value.is_contiguous():
                strides[name] = list(value.stride())
    return tensors, {"plain": plain, "strides": strides}


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any], where: str) -> None:
    """Bring back what `optimizer_tensors` returned. Raises RunError when it belongs to another set of parameters."""
    parameters = _parameters(optimizer)
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")} | rest["plain"]
    for name, value in sorted(stored.items(), key=lambda item: item[0]):
        _, index, key = name.split(".", 2)
        if int(index) >= len(parameters):
            raise RunError("The checkpoint belongs to another optimizer", where=where, why=f"it stores {name!r}")
        parameter = parameters[int(index)]
        if isinstance(value, Tensor):
            device = torch.device("cpu") if key == "step" else parameter.device  # torch keeps step counts on the CPU
            layout = rest["strides"].get(name, _contiguous_strides(value))
            fresh = torch.empty_strided(tuple(value.shape), tuple(layout), dtype=value.dtype, device=device)
            value = fresh.copy_(value)  # own memory, aligned as torch aligns it
        optimizer.state[parameter][key] = value


def _contiguous_strides(tensor: Tensor) -> list[int]:
    shape = tuple(tensor.shape)
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
