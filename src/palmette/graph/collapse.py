"""Turn a network with edits into the physically smaller one, and record what each merge is worth."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from palmette.errors import InputError
from palmette.graph.affine import (
    Affine,
    can_carry_edge,
    compose,
    diagonal,
    inexact_reason,
    plus_skip,
    skip_reason,
    with_edge,
)
from palmette.graph.capture import example_of, is_captured, make_inputs, set_shapes
from palmette.graph.dead import narrow_where_it_pays
from palmette.graph.narrowing import narrowings
from palmette.graph.ops import ChannelAffine, module_of, op_name, remove_dead
from palmette.graph.paths import Element, Path, Reader
from palmette.graph.record import CollapseRecord, MergeRecord
from palmette.graph.rewrite import absorb, absorb_target, describe_map, merge, narrow, widen
from palmette.graph.segments import GAIN, Merged, for_timing, input_shape, signature, unmerged
from palmette.graph.sites import element_macs, macs_saved, positions
from palmette.graph.widen import Strand, Wide, groups

if TYPE_CHECKING:
    from palmette.meter.table import CostTable


@dataclass
class _Choice:
    elements: Path
    merged: Affine
    exactness: str
    before: float
    after: float


def collapse(
    edited: nn.Module,
    cost: str | CostTable = "onnxruntime",
    force: bool = False,
    allow_inexact: bool = False,
    dead: bool = True,
) -> tuple[fx.GraphModule, CollapseRecord]:
    """The smaller plain module that computes what `edited` computes in eval mode, and a record of every merge.

    Uses the current (healed) weights of `edited`, which stays untouched. `cost`: "macs", a runtime ("eager",
    "onnxruntime") that is timed at batch 1, or a stored cost table; merges that do not lower it are refused unless
    `force`. Merges that would change border pixels are refused unless `allow_inexact`. `dead`: channels that carry
    nothing go from all layers that write or read them, unless that is measured to be no faster. Algebra in float64.
    Raises InputError if `edited` did not come from Plan.apply.
    """
    if not is_captured(edited):
        raise InputError(
            "collapse needs a network that Plan.apply returned", fix="Call plan.apply(model, example_inputs) first."
        )
    gm: fx.GraphModule = copy.deepcopy(edited)  # type: ignore[assignment]
    table = None if cost == "macs" or force else _table(cost)
    record = CollapseRecord(
        cost="forced" if force else cost if isinstance(cost, str) else table.runtime if table else "macs"
    )
    worker = _Worker(gm, record, table, force, allow_inexact)
    _finish(gm, worker.run())
    if dead:
        gm, found = narrow_where_it_pays(gm, table)
        record.narrowed += found.narrowed
        record.dead_kept = found.refused
    return gm, record


def collapse_again(edited: fx.GraphModule, decisions: list[dict[str, Any]]) -> fx.GraphModule:
    """Collapse `edited` by decisions already taken, with algebra: the float64 twin of a collapsed network."""
    gm = copy.deepcopy(edited)
    wanted = {_mark(d) for d in decisions if d["type"] in ("merge", "widen")}
    _finish(gm, _Worker(gm, CollapseRecord(), None, True, True, wanted).run())
    return gm


def _mark(decision: dict[str, Any]) -> tuple[str, ...]:
    """What tells a merge from others: the paths of all that it replaces."""
    if decision["type"] == "merge":
        return tuple(decision["nodes"])
    return (*(n for level in decision["levels"] for n in level["nodes"]), *decision["leaves"])


def _finish(gm: fx.GraphModule, decisions: list[dict[str, Any]]) -> None:
    remove_dead(gm)
    info = gm.meta["palmette"]
    info["decisions"] = [*info.get("decisions", []), *decisions]
    info["steps"] = [*info.get("steps", []), {"decisions": decisions}]
    info["collapsed"] = True
    set_shapes(gm, example_of(gm))


def _table(cost: str | CostTable) -> CostTable:
    from palmette.meter.table import CostTable

    return CostTable(cost) if isinstance(cost, str) else cost


class _Worker:
    def __init__(
        self,
        gm: fx.GraphModule,
        record: CollapseRecord,
        table: CostTable | None,
        force: bool,
        allow_inexact: bool,
        wanted: set[tuple[str, ...]] | None = None,
    ) -> None:
        self.gm, self.record, self.table, self.wanted = gm, record, table, wanted
        self.force, self.allow_inexact, self.pad = force, allow_inexact, gm.meta["palmette"].get("pad", "exact")

    def run(self) -> list[dict[str, Any]]:
        decisions: list[dict[str, Any]] = []
        reader = Reader(self.gm)
        chosen = [choice for path in reader.paths() if len(path) > 1 for choice in self._choose(reader, path)]
        for choice in chosen:
            decisions.append(self._merge(reader, choice))
            reader = Reader(self.gm)
        decisions += self._widen()
        for decision in narrowings(Reader(self.gm)):
            narrow(self.gm, decision)
            decisions.append(decision)
            self.record.narrowed.append(
                {"producer": decision["producer"], "kept": len(decision["keep"]), "of": decision["of"]}
            )
        for node in list(self.gm.graph.nodes):
            if isinstance(module_of(self.gm, node), ChannelAffine):
                decision = {"type": "absorb", "affine": node.meta["path"], "into": absorb_target(Reader(self.gm), node)}
                absorb(self.gm, decision)
                decisions.append(decision)
                self.record.absorbed.append(str(decision["affine"]))
        return decisions

    # -- which merges --------------------------------------------------------------------------------------------------

    def _choose(self, reader: Reader, run: Path) -> list[_Choice]:
        """The best set of disjoint merges of neighbouring elements: most gain, or with `force` most operations gone.

        Neighbours that nothing separated before any edit are merged only where that is exact and pays, silently.
        """
        n = len(run)
        options: dict[tuple[int, int], _Choice] = {}
        worth: dict[tuple[int, int], float] = {}
        refused: list[MergeRecord] = []
        for i in range(n):
            for j in range(i + 1, n):
                if (
                    self.wanted is not None
                    and tuple(n.meta["path"] for e in run[i : j + 1] for n in e.nodes) not in self.wanted
                ):
                    continue
                edited = all(e.linear_link for e in run[i:j])
                if not edited and macs_saved(reader, run[i : j + 1], self.pad) < 0:
                    continue
                choice, why = self._option(reader, run[i : j + 1], inexact=self.allow_inexact and edited)
                forced = self.wanted is not None or (self.force and edited)
                if isinstance(choice, _Choice) and (forced or self._pays(choice)):
                    options[i, j] = choice
                    worth[i, j] = float(j - i) if self.force else choice.before - choice.after
                elif edited and ((i, j) == _edited_around(run, i) or j == i + 1):
                    refused.append(self._refusal(reader, run[i : j + 1], choice, why))
        best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])]
        for j in range(n):
            candidates = [best[j]]
            candidates += [(best[i][0] + worth[i, j], [*best[i][1], (i, j)]) for i in range(j) if (i, j) in options]
            best.append(max(candidates, key=lambda c: c[0]))
        taken = best[n][1]
        covered = {k for i, j in taken for k in range(i, j + 1)}
        paths = {e.path: k for k, e in enumerate(run)}
        self.record.merges += [r for r in refused if not {paths[m] for m in r.members} <= covered]
        return [options[t] for t in taken]

    def _option(self, reader: Reader, elements: Path, *, inexact: bool) -> tuple[_Choice | None, str]:
        maps = [reader.affine(e) for e in elements]
        merged, exactness = (
            maps[0],
            "exact" if self.pad != "repad" or maps[0].rank == 0 or not maps[0].padded else "repad",
        )
        for m in maps[1:]:
            why = inexact_reason(merged, m)
            if why and self.pad == "bias_map" and can_carry_edge(merged):
                merged, exactness, why = with_edge(merged), "bias_map", ""
            if why and not inexact:
                return None, why
            exactness = "approx" if why else exactness
            merged = compose(merged, m)
        before, after = (
            float(sum(element_macs(reader, e) for e in elements)),
            float(merged.weight.numel() * positions(elements[-1])),
        )
        if self.table is not None and self.table.runtime != "macs":
            key = f"{signature(reader, elements)} -> {describe_map(merged)}"
            twins = for_timing(unmerged(reader, elements)), Merged(merged, like=_like(reader, elements)).eval()
            example = make_inputs(
                {"shape": input_shape(elements[0]), "dtype": str(_like(reader, elements).dtype).removeprefix("torch.")}
            )
            before, after = self.table.compare(key, *twins, example)
        return _Choice(elements, merged, exactness, before, after), ""

    def _pays(self, choice: _Choice) -> bool:
        timed = self.table is not None and self.table.runtime != "macs"
        return choice.after < GAIN * choice.before if timed else choice.after <= choice.before

    def _refusal(self, reader: Reader, elements: Path, choice: _Choice | None, why: str) -> MergeRecord:
        macs = sum(element_macs(reader, e) for e in elements)
        members = tuple(e.path for e in elements)
        if choice is None:
            return MergeRecord(members, "", False, why, "", 0.0, 0.0, macs, macs)
        after = choice.merged.weight.numel() * positions(elements[-1])
        timed = self.table is not None and self.table.runtime != "macs"
        unit = "ms" if timed else "MACs"
        reason = f"it would not pay: {choice.before:.4g} -> {choice.after:.4g} {unit}"
        ms = (choice.before, choice.after) if timed else (None, None)
        return MergeRecord(members, "", False, reason, choice.exactness, 0.0, 0.0, macs, after, *ms)

    # -- doing it ------------------------------------------------------------------------------------------------------

    def _merge(self, reader: Reader, choice: _Choice) -> dict[str, Any]:
        elements, merged = choice.elements, choice.merged
        nodes = [n for e in elements for n in e.nodes]
        worst, worst32 = errors(
            unmerged(reader, elements),
            Merged(merged, like=merged.weight),
            input_shape(elements[0]),
            _like(reader, elements),
        )
        macs_before = sum(element_macs(reader, e) for e in elements)
        macs_after = merged.weight.numel() * positions(elements[-1])
        skip = self._skip(nodes, merged)
        if skip is not None:
            merged = plus_skip(merged)
        norm = None if merged.rank else self._norm(nodes[0])
        if norm is not None:
            module: Any = module_of(self.gm, norm)
            offset = torch.zeros_like(module.weight) if module.bias is None else module.bias
            merged = compose(diagonal(module.weight.detach(), offset.detach(), 0), merged)
        result = self._result(elements[0])
        decision = {
            "type": "merge",
            "nodes": [n.meta["path"] for n in nodes],
            "map": describe_map(merged),
            "result": result,
            "skip": skip.meta["path"] if skip else None,
            "norm": norm.meta["path"] if norm else None,
        }
        merge(self.gm, decision, merged)
        timed = self.table is not None and self.table.runtime != "macs"
        ms = (choice.before, choice.after) if timed else (None, None)
        members = tuple(e.path for e in elements)
        reason = "skip absorbed" if skip else ""
        self.record.merges.append(
            MergeRecord(members, result, True, reason, choice.exactness, worst, worst32, macs_before, macs_after, *ms)
        )
        return decision

    def _result(self, first: Element) -> str:
        """Name of the module that takes the place of a run: that of its first module, else one that is free."""
        if first.main.op == "call_module":
            return str(first.main.target)
        name, taken = "merged." + first.path.replace(".", "_").replace("#", "_"), dict(self.gm.named_modules())
        while name in taken:
            name += "_"
        return name

    def _widen(self) -> list[dict[str, Any]]:
        """Make every parallel sum wide where that pays; its branches may have been merged before."""
        decisions: list[dict[str, Any]] = []
        tried: set[tuple[fx.Node, ...]] = set()
        while True:
            left = (g for g in groups(self.gm) if tuple(s.output for s in g) not in tried)
            strands = next(left, None)
            if strands is None:
                return decisions
            tried.add(tuple(s.output for s in strands))
            decision = self._wide(strands)
            if decision is not None:
                decisions.append(decision)

    def _wide(self, strands: list[Strand]) -> dict[str, Any] | None:
        wide = Wide(self.gm, strands)
        if self.wanted is not None and _mark(wide.decision) not in self.wanted:
            return None
        before, after, inputs = wide.modules()
        macs_before, macs_after = wide.macs
        like = _like(wide.reader, list(strands[0].elements))
        ms: tuple[float, float] | tuple[None, None] = (None, None)
        pays, unit = macs_after <= macs_before, f"{macs_before:.4g} -> {macs_after:.4g} MACs"
        if self.table is not None and self.table.runtime != "macs":
            ms = self.table.compare(wide.key, before, copy.deepcopy(after).to(like.dtype), inputs)
            pays, unit = ms[1] < GAIN * ms[0], f"{ms[0]:.4g} -> {ms[1]:.4g} ms"
        if not pays and not self.force:
            reason = f"it would not pay: {unit}"
            self.record.merges.append(
                MergeRecord(wide.members, "", False, reason, "exact", 0.0, 0.0, macs_before, macs_after, *ms)
            )
            return None
        worst, worst32 = errors(before, after, list(inputs[0].shape), like)
        wide.absorb_skip()
        widen(self.gm, wide.decision, wide.maps)
        result, reason = wide.decision["levels"][-1]["result"], f"{len(strands)} branches side by side"
        self.record.merges.append(
            MergeRecord(wide.members, result, True, reason, "exact", worst, worst32, macs_before, macs_after, *ms)
        )
        return wide.decision

    def _skip(self, nodes: list[fx.Node], merged: Affine) -> fx.Node | None:
        """The addition x + run(x) behind the run, if the identity can go into the kernel."""
        users = list(nodes[-1].users)
        if (
            len(users) != 1
            or op_name(users[0]) != "add"
            or len(users[0].args) != 2
            or users[0].kwargs
            or skip_reason(merged)
        ):
            return None
        other = [a for a in users[0].args if a is not nodes[-1]]
        return users[0] if other == [nodes[0].args[0]] else None

    def _norm(self, first: fx.Node) -> fx.Node | None:
        """A layer norm over the last axis that only the merged linear reads, with a scale to fold."""
        source: Any = first.args[0]
        module = module_of(self.gm, source)
        if (
            not isinstance(module, nn.LayerNorm)
            or getattr(module, "weight", None) is None
            or len(module.normalized_shape) != 1
            or len(source.users) != 1
        ):
            return None
        calls = sum(str(n.target) == str(source.target) for n in self.gm.graph.nodes if n.op == "call_module")
        return source if calls == 1 else None


def _edited_around(run: Path, i: int) -> tuple[int, int]:
    """First and last element of the stretch around element `i` that former activations join."""
    first, last = i, i
    while first > 0 and run[first - 1].linear_link:
        first -= 1
    while last < len(run) - 1 and run[last].linear_link:
        last += 1
    return first, last


def _like(reader: Reader, elements: Path) -> Tensor:
    for e in elements:
        if reader.is_affine(e.main):
            return reader.parameters(e.main)[0]
    return next(reader.gm.parameters())


def errors(before: nn.Module, after: nn.Module, shape: list[int], like: Tensor) -> tuple[float, float]:
    """Largest relative error of `after` against `before` on noise, in float64 and in float32."""
    x = torch.randn([2, *shape[1:]], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like.device)
    result = []
    for dtype in (torch.float64, torch.float32):
        with torch.no_grad():
            a = copy.deepcopy(before).to(like.device, dtype).eval()(x.to(dtype))
            b = copy.deepcopy(after).to(like.device, dtype).eval()(x.to(dtype))
        result.append(float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)))
    return result[0], result[1]
