"""The figures of a run of `adapt`: who holds what before and after, layer by layer, and what else the budget leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from palmette.errors import PalmetteError
from palmette.graph.inputs import batch_size, tensors
from palmette.meter.training import Holder, TrainingMemory, measure_training
from palmette.ondevice.adaptation import Adaptation
from palmette.ondevice.plan import MemoryPlan
from palmette.stats import paired_difference
from palmette.train.evaluate import Evaluation


def vanilla_memory(
    model: nn.Module, x: Any, y: Any, loss: Callable[[Any, Any], Tensor], *, freeze_bn: bool
) -> TrainingMemory | None:
    """One step of the model without Palmette, on tensors without data: nothing of its size is allocated.

    None for a model that asks for values on its way.
    """
    fake = FakeTensorMode()
    try:
        with FakeCopyMode(fake):
            shadow, fake_x, fake_y = copy.deepcopy((model, x, y))
        for module in shadow.modules():
            if freeze_bn and isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.eval()
        with fake:
            return measure_training(shadow, fake_x, fake_y, loss)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, PalmetteError):
        return None


def memory_figures(adaptation: Adaptation, vanilla: TrainingMemory | None) -> dict[str, Any]:
    """Bytes before and after, and their holders; taken while the model is adapted."""
    measured = adaptation.measured or adaptation.measure()
    named = list(adaptation.model.parameters())
    remembered = [
        part for state in adaptation.engine.states.values() for value in state.values() for part in tensors(value)
    ]
    trained = sum(p.numel() for p in adaptation.parameters())
    if adaptation.swaps is not None:
        trained += sum(part.left.numel() + part.right.numel() for *_, part in adaptation.swaps.modules)
    return {
        "bytes": {
            "vanilla": adaptation.vanilla_saved,
            "predicted": adaptation.plan.predicted_bytes,
            "vanilla_measured": None if vanilla is None else vanilla.saved_bytes,
            "measured": measured.saved_bytes,
        },
        "peak": {
            "vanilla": None if vanilla is None else vanilla.peak_bytes,
            "vanilla_where": None if vanilla is None else vanilla.peak_where,
            "adapted": measured.peak_bytes,
            "adapted_where": measured.peak_where,
        },
        "gradients": {
            "vanilla": None if vanilla is None else vanilla.gradient_bytes,
            "adapted": measured.gradient_bytes,
        },
        "parameters": {"bytes": measured.param_bytes, "numbers": sum(p.numel() for p in named), "trained": trained},
        "remembered_bytes": sum(t.numel() * t.element_size() for t in remembered),
        "holders": {"before": _holders(vanilla), "after": _holders(measured)},
        "layers": layer_rows(adaptation, vanilla, measured),
    }


def described(adaptation: Adaptation) -> dict[str, Any]:
    """What was asked for."""
    request = adaptation.request
    return {
        "method": adaptation.plan.method,
        "options": None if request.config is None else dataclasses.asdict(request.config),
        "scope": adaptation.plan.scope,
        "budget": adaptation.plan.budget,
        "batch": batch_size(request.x),
        "inputs": [list(shape) for shape in adaptation.plan.inputs],
        "dtype": str(next(iter(tensors(request.x))).dtype).removeprefix("torch."),
    }


def _holders(found: TrainingMemory | None) -> list[dict[str, Any]] | None:
    if found is None:
        return None
    return [{"operations": name, "bytes": size, "share": share} for name, size, share in found.by_operation()]


def layer_rows(
    adaptation: Adaptation, vanilla: TrainingMemory | None, measured: TrainingMemory
) -> list[dict[str, Any]]:
    """A row for each module that holds something, before or after, or has parameters; in the order of the model.

    What several modules hold is counted with the first of them that the plan has a codec for, else the first of all.
    """
    model, plan = adaptation.model, adaptation.plan
    codecs = _by_module(plan)
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    before = None if vanilla is None else _shares(vanilla.holders, order, codecs)
    after = _shares(measured.holders, order, codecs)
    owners = {path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    paths = sorted({*(before or {}), *after, *owners}, key=lambda path: (order.get(path, len(order)), path))
    return [
        {
            "layer": path or "(model)",
            "before": None if before is None else before.get(path, 0),
            "after": after.get(path, 0),
            "codec": ", ".join(codecs.get(path, ())),
            "trained": _trained(adaptation, path),
            "error": max((e for key, e in plan.errors.items() if _path(key) == path), default=None),
        }
        for path in paths
    ]


def _shares(holders: tuple[Holder, ...], order: Mapping[str, int], codecs: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for holder in holders:
        paths = [held.module for held in holder.holders]
        home = min(paths, key=lambda path: (path not in codecs, order.get(path, len(order))))
        found[home] = found.get(home, 0) + holder.bytes
    return found


def _by_module(plan: MemoryPlan) -> dict[str, tuple[str, ...]]:
    """Names of the codecs of each module."""
    found: dict[str, tuple[str, ...]] = {}
    for key, codec in plan.codecs.items():
        found[_path(key)] = tuple(dict.fromkeys((*found.get(_path(key), ()), codec.name)))
    return found


def _path(key: str) -> str:
    return key.partition("#")[0]


def _trained(adaptation: Adaptation, path: str) -> str:
    """What of a module is trained: "all", "none", "12 of 64 inputs", "in factors"; "" where it has no parameters."""
    if adaptation.swaps is not None and any(path == swap_path for swap_path in _swapped(adaptation)):
        return "in factors"
    try:
        module = adaptation.model.get_submodule(path)
    except AttributeError:
        return ""
    own = list(module.parameters(recurse=False))
    part = adaptation.plan.slices.get(path)
    if part is not None:
        size = module.get_parameter("weight").shape[part.axis]
        return f"{len(part.index)} of {size} {'inputs' if part.axis else 'outputs'}"
    if not own:
        return ""
    return {0: "none", len(own): "all"}.get(sum(p.requires_grad for p in own), "some")


def _swapped(adaptation: Adaptation) -> list[str]:
    factored = {id(part) for *_, part in adaptation.swaps.modules} if adaptation.swaps is not None else set()
    return [path for path, module in adaptation.model.named_modules() if id(module) in factored]


def accuracy_figures(before: Evaluation, after: Evaluation, split: str) -> dict[str, Any]:
    """Accuracy before and after with intervals, and their paired difference in points."""
    return {
        "split": split,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "difference": list(paired_difference(after.correct, before.correct)),
    }
