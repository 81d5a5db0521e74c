"""What a shrunk network lacks of the model that it was made from, in terms of that model's modules.

Read from the two graphs: whole layers that are gone, modules that are gone inside the layers that stay, linears of
another size. A module is known by its path only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.deploy.hf_config import Kept
from palmette.errors import ExportError
from palmette.graph.blocks import Block
from palmette.graph.layers import with_feeders
from palmette.graph.ops import ChannelAffine, module_of, skip_transparent
from palmette.graph.plan import Edit, Plan
from palmette.graph.spans import run_at, total

_FIX = "Use the network that was saved beside it (model.safetensors, or its exports) instead."


def refused(what: str, why: str) -> ExportError:
    """The error for a change that the model's class cannot express."""
    return ExportError(f"{what} cannot be written as a Hugging Face model", why=why, fix=_FIX)


@dataclass
class Difference:
    """What became of a model's modules, by their paths in it.

    layers: containers that lost whole layers. gone: the layers' own paths. linear: [inputs, outputs, bias] of linears
    of another size. zero: modules whose output is zero now. through: those that hand their input on. fitted: [inputs,
    outputs] of modules that became a linear map. state: tensors of the network by their names in the model.
    """

    layers: list[Kept] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    linear: dict[str, tuple[int, int, bool]] = field(default_factory=dict)
    zero: set[str] = field(default_factory=set)
    through: set[str] = field(default_factory=set)
    fitted: dict[str, tuple[int, int]] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


class _Owners:
    """Which modules of the model own which nodes of its graph, by the nodes' stable paths."""

    def __init__(self, gm: fx.GraphModule, source: nn.Module) -> None:
        self.modules = dict(source.named_modules(remove_duplicate=False))
        self.nodes: dict[str, set[fx.Node]] = {}
        for node in gm.graph.nodes:
            if node.op not in ("placeholder", "get_attr", "output") and node.meta.get("shape") is not None:
                for path in _upwards(str(node.meta["path"]).split("#")[0]):
                    self.nodes.setdefault(path, set()).add(node)

    def within(self, path: str, region: Iterable[fx.Node]) -> bool:
        """Whether the module does something, and all of it in `region`."""
        return path in self.modules and path in self.nodes and self.nodes[path] <= set(region)

    def largest(self, node: fx.Node, region: frozenset[fx.Node]) -> str | None:
        """The path of the outermost module around `node` that does all its work in `region`."""
        around = _upwards(str(node.meta["path"]).split("#")[0])
        return next((path for path in reversed(around) if self.within(path, region)), None)


def _upwards(path: str) -> list[str]:
    """The path and those of its owners, innermost first."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def difference(network: fx.GraphModule, dense: fx.GraphModule, source: nn.Module) -> Difference:
    """How `network` differs from `source`, the model that it was made from; `dense`: that model, captured.

    Raises ExportError for what no module of the model can stand for: a linearised activation that was not collapsed, an
    activation called as a function, edits of other kinds, replaced convolutions.
    """
    found = Difference()
    owners = _Owners(dense, source)
    edits = list(Plan.from_json(network.meta["palmette"].get("plan") or Plan().to_json()))
    runs = {edit.site: run_at(dense, edit.site) for edit in edits if edit.kind in ("drop", "fit_linear")}
    fits = {edit.site: runs[edit.site][-1] for edit in edits if edit.kind == "fit_linear"}
    blocks = [block for run in runs.values() for block in run if block not in fits.values()]
    found.state = _state(network, source)
    _whole_layers(found, owners, with_feeders(dense, blocks))
    for block in blocks:
        if not any(_below(str(total(block).meta["path"]), path) for path in found.gone):
            found.zero |= _block(found, owners, dense, block)
    for site, block in fits.items():
        _fitted(found, network, site, _block(found, owners, dense, block, norm=False))
    for edit in edits:
        if edit.kind == "linearize":
            _activation(found, owners, network, edit)
        elif edit.kind not in ("drop", "fit_linear", "identity"):
            raise refused(f"'{edit.kind}' of '{edit.site}'", "its class has no place for what was put there")
    _modules(found, owners, network, dense)
    return found


def _below(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")


def _whole_layers(found: Difference, owners: _Owners, region: frozenset[fx.Node]) -> None:
    """Numbered children of a list of modules that did all their work in what was dropped."""
    for path, module in owners.modules.items():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(_below(path, p) for p in found.gone):
            continue
        gone = [i for i in range(len(module)) if owners.within(f"{path}.{i}", region)]
        if gone:
            kept = tuple(i for i in range(len(module)) if i not in gone)
            found.layers.append(Kept(path, len(module), kept))
            found.gone |= {f"{path}.{i}" for i in gone}


def _block(found: Difference, owners: _Owners, dense: fx.GraphModule, block: Block, *, norm: bool = True) -> set[str]:
    """Empty a block inside a layer that stays; returns the modules that its branch ends in.

    What is before them hands its input on and costs nothing; so does the norm behind the sum, unless told otherwise.
    """
    end = total(block)
    behind = {block.output} if block.output is not end else set()
    branch = with_feeders(dense, [block]) - behind - {end}
    exits = [n for n in end.all_input_nodes if skip_transparent(dense, n) is not skip_transparent(dense, block.source)]
    if len(exits) != 1:
        raise refused(f"Dropping '{block.path}'", "it adds two branches, neither of which is its input")
    ends = _ends(owners, dense, exits[0], branch)
    if not ends:
        raise refused(f"Dropping '{block.path}'", "no module of its branch ends in the sum")
    found.through |= {path for n in branch if (path := owners.largest(n, branch)) is not None} - ends
    if norm:
        found.through |= {path for n in behind if (path := owners.largest(n, frozenset(behind))) is not None}
    return ends


def _fitted(found: Difference, network: fx.GraphModule, site: str, ends: set[str]) -> None:
    """Put a fitted map x -> W x + b at the end of the last branch of its run, where x is added: as (W - 1) x + b."""
    name = network.meta["palmette"].get("fitted", {}).get(site)
    weight, bias = (found.state.pop(f"fitted.{name}.{part}", None) for part in ("weight", "bias"))
    if len(ends) != 1 or weight is None or bias is None or weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        raise refused(f"The linear map of '{site}'", "it was merged with others, or its branch has several ends")
    (path,) = ends
    found.fitted[path] = (weight.shape[1], weight.shape[0])
    found.state |= {f"{path}.linear.weight": _less_one(weight), f"{path}.linear.bias": bias}


def _less_one(weight: Tensor) -> Tensor:
    """A square matrix less the identity, in float64 on the way."""
    return (weight.double() - torch.eye(len(weight), dtype=torch.float64, device=weight.device)).to(weight)


def _ends(owners: _Owners, dense: fx.GraphModule, exit_: fx.Node, branch: frozenset[fx.Node]) -> set[str]:
    """The modules that give a branch its value, whatever is multiplied, reshaped or left out at random behind them."""
    waiting, found = [skip_transparent(dense, exit_)], set[str]()
    while waiting:
        node = waiting.pop()
        path = owners.largest(node, branch)
        if path is not None:
            found.add(path)
        else:
            waiting += [skip_transparent(dense, n) for n in node.all_input_nodes if n in branch]
    return found


def _activation(found: Difference, owners: _Owners, network: fx.GraphModule, edit: Edit) -> None:
    """A linearised activation: the identity, its slope having gone into the linears around it."""
    path = edit.site.split("#")[0]
    if path not in owners.modules or list(owners.modules[path].parameters()):
        raise refused(f"Linearising '{edit.site}'", "the activation is called as a function, and is no module")
    for node in network.graph.nodes:
        if isinstance(module_of(network, node), ChannelAffine):
            raise ExportError("The network holds activations made linear but not merged", fix="Call pm.collapse first.")
        if node.op not in ("get_attr", "output") and _below(str(node.meta.get("path", "")).split("#")[0], path):
            raise refused(f"Linearising '{edit.site}'", "its module is called elsewhere too, where it stays")
    if not any(_below(path, gone) for gone in found.gone):
        found.through.add(path)


def _modules(found: Difference, owners: _Owners, network: fx.GraphModule, dense: fx.GraphModule) -> None:
    """Modules of the layers that stay: linears of another size, and those that were merged into one before them."""
    after = {str(n.target): module_of(network, n) for n in network.graph.nodes if n.op == "call_module"}
    covered = found.gone | found.zero | found.through | set(found.fitted)
    for node in dense.graph.nodes:
        path, old = str(node.target), module_of(dense, node)
        if old is None or path not in owners.modules or any(_below(path, owner) for owner in covered):
            continue
        new: Any = after.get(path)
        if new is None:
            found.through.add(path)
        elif isinstance(new, nn.Linear) and isinstance(old, nn.Linear):
            if (new.in_features, new.out_features) != (old.in_features, old.out_features) or (
                (new.bias is None) != (old.bias is None)
            ):
                found.linear[path] = (new.in_features, new.out_features, new.bias is not None)
        elif _shapes(new) != _shapes(old) and not isinstance(new, nn.LayerNorm):
            raise refused(f"'{path}'", f"a {type(old).__name__} was replaced by another {type(new).__name__}")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _state(network: fx.GraphModule, source: nn.Module) -> dict[str, Tensor]:
    """The network's tensors under the model's names: tied ones under each, a norm's absorbed scale written as ones."""
    state = {name: value.detach() for name, value in network.state_dict().items()}
    for decision in network.meta["palmette"].get("decisions", []):
        if decision.get("skip"):  # x + run(x) became one kernel; the model's own code adds x
            name = f"{decision['result']}.weight"
            state[name] = _less_one(state[name])
        if decision.get("norm"):
            for part, value in (("weight", 1.0), ("bias", 0.0)):
                old = source.state_dict().get(f"{decision['norm']}.{part}")
                if old is not None:
                    state[f"{decision['norm']}.{part}"] = torch.full_like(old, value)
    tied: dict[int, list[str]] = {}
    for name, value in source.state_dict(keep_vars=True).items():
        tied.setdefault(id(value), []).append(name)
    for names in tied.values():
        known = next((state[name] for name in names if name in state), None)
        if known is not None:
            state.update({name: known for name in names if name not in state})
    return state


def structures(source: nn.Module, paths: Iterable[str], run: Any) -> Mapping[str, tuple[int | None, int]]:
    """What each module returns when `run(source)` calls the model: (None, 0) a tensor, else (place, length) of a tuple.

    Raises ExportError for a module that returns anything else, or is not called.
    """
    seen: dict[str, tuple[int | None, int]] = {}

    def look(path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[path] = (None, 0)
        elif isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            seen[path] = (0, len(output))
        else:
            raise refused(f"Taking out '{path}'", f"it returns a {type(output).__name__}")

    handles = [source.get_submodule(path).register_forward_hook(partial(look, path)) for path in set(paths)]
    try:
        with torch.no_grad():
            run(source)
    finally:
        for handle in handles:
            handle.remove()
    for path in paths:
        if path not in seen:
            raise refused(f"Taking out '{path}'", "the model does not call it as a module")
    return seen
