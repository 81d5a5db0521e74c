"""From a budget in bytes to a memory plan: lossless forms first, then the codecs that cost the least gradient.

Everything is counted by formula over the trace, per storage; the plan's sum is what the meter finds. Items of the
knapsack are storages: layers that read the same one share what is kept of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from palmette.device import format_bytes
from palmette.errors import BudgetError
from palmette.ondevice.codec import Codec, Keep, Recompute, Skip
from palmette.ondevice.knapsack import Choice, choose
from palmette.ondevice.plan import MemoryPlan
from palmette.ondevice.probe import Findings
from palmette.ondevice.trace import Call, Trace, holders, saved_bytes

_NORM_SHARE = 1e-4  # of all gradient energy, for a norm's own parameters: they are not probed


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What beside the kept tensors counts in the scope: bytes per trained parameter's byte, and every parameter's size.

    copies: 0 for "saved"; 1 for its gradient plus what the optimizer keeps, for "saved+gradients+optimizer".
    """

    copies: int
    sizes: Mapping[str, int]
    trained: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, copies: int) -> Costs:
        """For this model's trainable parameters."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return cls(
            copies=copies,
            sizes={name: p.numel() * p.element_size() for name, p in named.items()},
            trained=frozenset(named),
        )

    def bytes(self, names: Iterable[str]) -> int:
        """Gradients and optimizer state of these parameters."""
        return self.copies * sum(self.sizes[name] for name in set(names) & self.trained)


@dataclass(frozen=True)
class Item:
    """A storage that trainable layers read: the layers, and for each choice their codecs."""

    layers: tuple[Call, ...]
    choices: tuple[Choice, ...]
    """Choice.what: {layer key: codec}"""


@dataclass(frozen=True)
class Draft:
    """Codecs for all layers, with the bytes of the scope and the sum of squared gradient errors."""

    codecs: dict[str, Codec]
    stock: tuple[str, ...]
    nbytes: int
    saved: int
    error: float
    frozen: tuple[str, ...] = ()
    folds: Mapping[str, Any] = field(default_factory=dict)


def always_kept(found: Trace) -> set[int]:
    """Storages that operations other than layers keep under any plan."""
    kept: set[int] = set()
    for entry in found.calls:
        if entry.kind in ("other", "recipe") or entry.stays or (entry.kind == "smooth" and entry.x_grad):
            kept |= {entry.storage} if entry.kind == "smooth" and entry.own_bytes else set(entry.stock)
    return kept


def lossless(found: Trace) -> dict[str, Codec]:
    """The exact codec with the fewest bytes for each layer."""
    kept = always_kept(found)
    return {entry.key: Recompute() if _can_recompute(entry, kept) else Keep() for entry in found.layers()}


def _can_recompute(entry: Call, kept: set[int]) -> bool:
    return entry.kind == "layer" and entry.source in kept and entry.storage not in kept


def stock_of(found: Trace, codecs: Mapping[str, Codec]) -> tuple[str, ...]:
    """Activations whose output a layer keeps anyway: torch's own form, which shares it, then needs no mask."""
    kept = {entry.storage for entry in found.layers() if codecs[entry.key].keeps_input} | always_kept(found)
    return tuple(e.key for e in found.calls if e.kind == "masked" and e.name == "relu" and e.out_storage in kept)


def draft(
    found: Trace, codecs: Mapping[str, Codec], costs: Costs, error: float = 0.0, frozen: Sequence[str] = ()
) -> Draft:
    """The plan's figures for these codecs."""
    kept = dict(codecs)
    skipped = [entry for entry in found.layers() if kept[entry.key].name == "skip"]
    names = {name for entry in skipped for name in parameters_of(found, entry)}
    stock = stock_of(found, kept)
    saved = saved_bytes(found, kept, stock)
    total = saved + costs.bytes(costs.trained - names - set(frozen))
    return Draft(kept, stock, total, saved, error, tuple(sorted(names | set(frozen))), found.folds)


def parameters_of(found: Trace, entry: Call) -> tuple[str, ...]:
    """The parameters of a layer and of the norm that is computed with it."""
    return (*entry.weights, *found.folded_weights.get(entry.key, ()))


def items(
    found: Trace, findings: Mapping[str, Findings], costs: Costs, *, may_skip: bool, may_keep: bool = True
) -> list[Item]:
    """The items of the knapsack, in the order of the forward pass."""
    kept = always_kept(found)
    masks = {e.out_storage: e.own_bytes for e in found.calls if e.kind == "masked" and e.name == "relu"}
    groups: dict[int, list[Call]] = {}
    for entry in found.layers():
        groups.setdefault(entry.storage, []).append(entry)
    return [
        Item(tuple(group), tuple(_choices(found, group, findings, costs, kept, masks, may_skip, may_keep)))
        for group in groups.values()
    ]


def _choices(
    found: Trace,
    group: list[Call],
    findings: Mapping[str, Findings],
    costs: Costs,
    kept: set[int],
    masks: Mapping[int, int],
    may_skip: bool,
    may_keep: bool,
) -> list[Choice]:
    storage = group[0].storage
    known = [findings.get(entry.key, Findings(0.0, ())) for entry in group]
    extra = costs.bytes(name for entry in group for name in parameters_of(found, entry))
    found_choices: list[Choice] = []
    lossless_bytes = group[0].storage_bytes - masks.get(storage, 0)
    if not may_keep and all(entry.choices for entry in known):
        pass  # the method takes every layer that it has a form for
    elif storage in kept:
        found_choices.append(Choice(extra, 0.0, {e.key: Keep() for e in group}))
    elif all(_can_recompute(entry, kept) for entry in group):
        found_choices.append(Choice(extra, 0.0, {e.key: Recompute() for e in group}))
    else:
        found_choices.append(Choice(lossless_bytes + extra, 0.0, {e.key: Keep() for e in group}))
    if may_skip:
        energy = sum(entry.energy for entry in known) or _NORM_SHARE * sum(f.energy for f in findings.values())
        found_choices.append(Choice(0, energy, {e.key: Skip() for e in group}))
    rungs = min((len(entry.choices) for entry in known), default=0)
    for rung in range(rungs):
        picked = {e.key: _rung(f, rung, rungs) for e, f in zip(group, known, strict=True)}
        payloads = {(e.tensor, c): c.nbytes(e.shape, e.itemsize) for e in group for c, _ in (picked[e.key],)}
        found_choices.append(
            Choice(
                sum(payloads.values()) + extra,
                sum(error for _, error in picked.values()),
                {key: codec for key, (codec, _) in picked.items()},
            )
        )
    return found_choices


def _skips(choice: Choice) -> bool:
    return all(codec.name == "skip" for codec in choice.what.values())


def _unused(item: Item) -> float:
    """The error of leaving the item out; a codec that is worse is never chosen."""
    return next((choice.error for choice in item.choices if _skips(choice)), 0.0)


def _rung(findings: Findings, rung: int, rungs: int) -> tuple[Codec, float]:
    """The choice at this height of the layer's own ladder."""
    return findings.choices[rung * len(findings.choices) // rungs]


def solve(
    found: Trace,
    findings: Mapping[str, Findings],
    costs: Costs,
    budget: int,
    *,
    may_skip: bool,
    may_keep: bool = True,
    frozen: Sequence[str] = (),
) -> Draft | int:
    """The best draft within the budget, or the fewest bytes that any choice needs."""
    offered = items(found, findings, costs, may_skip=may_skip, may_keep=may_keep)
    smallest: dict[str, Codec] = {}
    for item in offered:
        smallest |= min(item.choices, key=lambda c: (c.nbytes, c.error)).what
    least = draft(found, smallest, costs, frozen=frozen)
    fixed = least.nbytes - sum(min(c.nbytes for c in item.choices) for item in offered)
    chosen = choose([item.choices for item in offered], budget - fixed)
    if may_skip:  # a plan that trains nothing is none
        trains = min((c.nbytes for item in offered for c in item.choices if c.error < _unused(item)), default=0)
        least = replace(least, nbytes=fixed + trains)
    if chosen is None or all(_skips(item.choices[i]) for item, i in zip(offered, chosen, strict=True)):
        return least.nbytes
    codecs = {k: c for item, i in zip(offered, chosen, strict=True) for k, c in item.choices[i].what.items()}
    error = sum(item.choices[i].error for item, i in zip(offered, chosen, strict=True))
    result = draft(found, codecs, costs, error, frozen)
    return result if result.nbytes <= budget else least.nbytes


def memory_plan(result: Draft, like: MemoryPlan, findings: Mapping[str, Findings]) -> MemoryPlan:
    """The plan of a draft, with the relative gradient error of each layer."""
    errors = {}
    for key, codec in result.codecs.items():
        known = findings.get(key)
        if known is not None and known.energy > 0 and not codec.lossless:
            made = next((e for c, e in known.choices if c == codec), known.energy)
            errors[key] = (made / known.energy) ** 0.5
    return replace(
        like,
        codecs={key: codec for key, codec in result.codecs.items() if codec.name != "skip"},
        folds=dict(result.folds),
        stock=result.stock,
        frozen=result.frozen,
        predicted_bytes=result.saved,
        errors=errors,
    )


def infeasible(budget: int, least: int, binds: str, request: Any) -> BudgetError:
    """The error that says what the smallest budget is and what stands in its way."""
    other = "" if request.method == "auto" else ", or take method='auto', which may freeze layers"
    return BudgetError(
        f"{format_bytes(budget)} are not enough",
        where=f"scope {request.scope!r}, method {request.method!r}",
        why=f"the smallest for this model and sample is {least:,} bytes ({format_bytes(least)}); {binds}",
        fix=f"Raise the budget, make the sample's batch smaller, or freeze more of the model{other}.",
    )


def what_binds(found: Trace, codecs: Mapping[str, Codec], stock: Sequence[str]) -> str:
    """The largest things that stay kept under these codecs, in words."""
    kept = holders(found, dict(codecs), stock)
    largest = sorted(kept.items(), key=lambda pair: -pair[1])[:3]
    names = [f"{_holder_name(found, key)} keeps {format_bytes(size)}" for key, size in largest]
    return "what binds: " + ", ".join(names) if names else "nothing is kept"


def _holder_name(found: Trace, key: Any) -> str:
    for index, entry in enumerate(found.calls):
        if key in entry.stock or key == (index, entry.kind) or (isinstance(key, tuple) and key[0] == entry.tensor):
            return f"{entry.name} at {entry.key}" if entry.key else entry.name
    return "an activation"
