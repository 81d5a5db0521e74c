"""The memory plan: for each place where autograd keeps something, how it is kept; plain JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from palmette.errors import InputError, PlanError
from palmette.ondevice.codec import Codec, codecs

_FORMAT = 1


@dataclass(frozen=True)
class Fold:
    """The batch norm in eval mode that alone reads a layer's output, by the names of its tensors in the model."""

    mean: str
    var: str
    eps: float
    weight: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Slice:
    """The part of a layer's weight that is trained: `index` along `axis` (0 outputs, 1 inputs)."""

    axis: int
    index: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a model trains within a budget.

    codecs: per trainable layer (name of its parameters; "#1" for a second use), how its input is kept. folds: batch
    norms computed with the layer before them. stock: activations left to torch, because their output is kept anyway.
    frozen: parameters that the plan takes out of training. slices: layers of which only a part is trained.
    recompute: modules that keep their input alone and run again in the backward pass. inputs: shapes of the sample;
    no batch may be larger. predicted_bytes: kept for backward, by formula. floor_bytes: the smallest any plan needs.
    """

    method: str
    scope: str
    budget: int | None
    inputs: tuple[tuple[int, ...], ...]
    codecs: Mapping[str, Codec] = field(default_factory=dict)
    folds: Mapping[str, Fold] = field(default_factory=dict)
    stock: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    slices: Mapping[str, Slice] = field(default_factory=dict)
    recompute: tuple[str, ...] = ()
    predicted_bytes: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """The plan as text."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts["codecs"] = {key: codec.to_dict() for key, codec in self.codecs.items()}
        parts["folds"] = {key: dataclasses.asdict(fold) for key, fold in self.folds.items()}
        parts["slices"] = {key: dataclasses.asdict(part) for key, part in self.slices.items()}
        return json.dumps({"memory_plan": _FORMAT, **parts}, indent=1, default=dict)

    @classmethod
    def from_json(cls, text: str) -> MemoryPlan:
        """The plan that `to_json` wrote. Raises PlanError for anything else."""
        try:
            parts = json.loads(text)
            if parts.pop("memory_plan") != _FORMAT:
                raise PlanError("The memory plan is of another version", fix="Make it anew with adapt().")
            parts["codecs"] = {key: codec_from(entry) for key, entry in parts["codecs"].items()}
            parts["folds"] = {key: Fold(**entry) for key, entry in parts["folds"].items()}
            parts["slices"] = {
                key: Slice(entry["axis"], tuple(entry["index"])) for key, entry in parts["slices"].items()
            }
            parts["inputs"] = tuple(tuple(shape) for shape in parts["inputs"])
            parts |= {name: tuple(parts[name]) for name in ("stock", "frozen", "recompute")}
            return cls(**parts)
        except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
            raise PlanError(
                "The text is no memory plan",
                why=str(error),
                fix="Pass what to_json() wrote; of a file, its text: Path('plan.json').read_text().",
            ) from error


def codec_from(entry: Mapping[str, Any]) -> Codec:
    """The codec that `Codec.to_dict` wrote. Raises PlanError for a name that is not known."""
    options = dict(entry)
    name = options.pop("codec")
    known = codecs()
    if name not in known:
        raise PlanError(f"no codec is named {name!r}", fix=f"Known are {', '.join(sorted(known))}.")
    return known[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()})
