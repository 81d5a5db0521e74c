"""The state of an adapted model between two epochs, as tensors and JSON, and the way back.

What a step leaves behind lies in many places: weights, the optimizer, the bases of codecs, random generators, the
memory of a selector. Each is a nest of dicts, lists and tuples around tensors, generators and plain values; one pair
of functions takes such a nest apart and puts it together again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from palmette.errors import RunError
from palmette.ondevice.adaptation import Adaptation
from palmette.ondevice.install import freeze, unfreeze
from palmette.ondevice.plan import MemoryPlan
from palmette.registry import MethodConfig
from palmette.train.checkpoint import load_model_tensors, model_tensors

Tensors = dict[str, Tensor]


def packed(value: Any, name: str, tensors: Tensors) -> Any:
    """JSON for a nest of containers; the tensors in it go into `tensors` under names that begin with `name`.

    Raises RunError for a value of another kind.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        strides = None if value.is_contiguous() else list(value.stride())
        return {"tensor": name, "strides": strides, "device": str(value.device)}
    if isinstance(value, torch.Generator):
        tensors[name] = value.get_state()
        return {"generator": name, "device": str(value.device)}
    if isinstance(value, list | tuple):
        parts = [packed(part, f"{name}.{place}", tensors) for place, part in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if isinstance(value, dict):
        pairs = [[packed(k, f"{name}.{place}.key", tensors), v] for place, (k, v) in enumerate(value.items())]
        return {"dict": [[k, packed(v, f"{name}.{place}", tensors)] for place, (k, v) in enumerate(pairs)]}
    raise RunError(
        f"A {type(value).__name__} cannot be stored",
        where=name,
        fix="Keep tensors, generators, numbers, texts, dicts, lists and tuples there; or train without run_dir.",
    )


def unpacked(form: Any, tensors: Tensors) -> Any:
    """The nest that `packed` took apart."""
    if not isinstance(form, dict):
        return form
    if "tensor" in form:
        stored, device = tensors[form["tensor"]], torch.device(form["device"])
        strides = form["strides"] or _contiguous(tuple(stored.shape))
        return torch.empty_strided(tuple(stored.shape), strides, dtype=stored.dtype, device=device).copy_(stored)
    if "generator" in form:
        generator = torch.Generator(device=form["device"])
        generator.set_state(tensors[form["generator"]].clone())
        return generator
    if "dict" in form:
        return {unpacked(k, tensors): unpacked(v, tensors) for k, v in form["dict"]}
    parts = [unpacked(part, tensors) for part in form["tuple" if "tuple" in form else "list"]]
    return tuple(parts) if "tuple" in form else parts


def _contiguous(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def packed_object(value: Any, name: str, tensors: Tensors) -> dict[str, Any]:
    """The attributes of an object, and of objects among them; its configuration and its functions are left out."""
    found: dict[str, Any] = {}
    for key, part in vars(value).items():
        if isinstance(part, MethodConfig) or callable(part):
            continue
        place = f"{name}.{key}"
        is_object = hasattr(part, "__dict__") and not isinstance(part, Tensor | torch.Generator | dict)
        found[key] = {"object": packed_object(part, place, tensors)} if is_object else packed(part, place, tensors)
    return found


def restore_object(value: Any, form: dict[str, Any], tensors: Tensors) -> None:
    """Give an object the attributes that `packed_object` took."""
    for key, part in form.items():
        if isinstance(part, dict) and "object" in part:
            restore_object(getattr(value, key), part["object"], tensors)
        else:
            setattr(value, key, unpacked(part, tensors))


# ---- an adapted model ------------------------------------------------------------------------------------------------


def state_of(adaptation: Adaptation, optimizer: Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """Everything that the next epoch depends on: tensors, and JSON. Raises RunError for a selector's odd attribute."""
    tensors = model_tensors(adaptation.model)
    names = _names(adaptation)
    slots = {names[id(p)]: s for p, s in optimizer.state.items() if id(p) in names}
    form: dict[str, Any] = {
        "plan": adaptation.plan.to_json(),
        "codecs": packed(adaptation.engine.states, "codecs", tensors),
        "tuned": packed({k: p.detach() for k, p in adaptation.engine.tuned.items()}, "tuned", tensors),
        "optimizer": packed(slots, "optimizer", tensors),
    }
    tuning = adaptation.tuning
    if tuning is not None:
        view = tuning.view
        seen = {"chosen": view.chosen, "gradients": view.gradients, "generator": view.generator, "epoch": tuning.epoch}
        form["view"] = packed(seen, "view", tensors)
        form["selector"] = packed_object(tuning.selector, "selector", tensors)
    if adaptation.swaps is not None:
        factored = [(part.state, part.residual) for *_, part in adaptation.swaps.modules]
        form["factored"] = packed(factored, "factored", tensors)
    return tensors, form


def restore(adaptation: Adaptation, tensors: Tensors, form: dict[str, Any], where: str) -> None:
    """Bring back all that `state_of` gave but the optimizer. Raises RunError when it belongs to another model."""
    load_model_tensors(adaptation.model, tensors, where)
    engine, tuning = adaptation.engine, adaptation.tuning
    if tuning is not None:
        unfreeze(adaptation.model, adaptation.before)
        adaptation.plan = engine.plan = MemoryPlan.from_json(form["plan"])
        freeze(adaptation.model, engine.plan.frozen, adaptation.before)
        tuning.begin(engine)
        seen = unpacked(form["view"], tensors)
        tuning.view.chosen, tuning.view.gradients = seen["chosen"], seen["gradients"]
        tuning.view.generator, tuning.epoch = seen["generator"], seen["epoch"]
        restore_object(tuning.selector, form["selector"], tensors)
    with torch.no_grad():
        for key, value in unpacked(form["tuned"], tensors).items():
            engine.tuned[key].copy_(value)
    engine.states.clear()
    engine.states.update(unpacked(form["codecs"], tensors))
    if adaptation.swaps is not None:
        for (*_, part), (state, residual) in zip(
            adaptation.swaps.modules, unpacked(form["factored"], tensors), strict=True
        ):
            part.state, part.residual = state, residual


def restore_optimizer(adaptation: Adaptation, optimizer: Optimizer, form: dict[str, Any], tensors: Tensors) -> None:
    """Give the parameters what the optimizer kept for them."""
    slots = unpacked(form["optimizer"], tensors)
    names = _names(adaptation)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if names.get(id(parameter)) in slots:
            optimizer.state[parameter] = slots[names[id(parameter)]]


def _names(adaptation: Adaptation) -> dict[int, str]:
    """A name for every parameter that is trained, which outlives the tensor."""
    named = {id(p): f"model.{name}" for name, p in adaptation.model.named_parameters()}
    return named | {id(p): f"tuned.{key}" for key, p in adaptation.engine.tuned.items()}
