"""Apply edits to a captured graph: linearise an activation, take out or replace what lies elsewhere, move padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from palmette.errors import PlanError, RefusedEdit
from palmette.graph.activations import find_activations
from palmette.graph.linear_fit import fit_reason, linear_module
from palmette.graph.ops import ChannelAffine, module_of, remove_dead, set_module, tensor_inputs
from palmette.graph.parallel import make_parallel, parallel_reason
from palmette.graph.paths import Element, Path, Reader, conv_settings
from palmette.graph.sites import activation_sites, axis_of, convolution_sites, site_axis
from palmette.graph.spans import run_at, total

if TYPE_CHECKING:
    from palmette.graph.plan import Edit


def apply_edits(gm: fx.GraphModule, edits: Iterable[Edit], pad: str) -> None:
    """Do the edits in place, in order.

    Raises PlanError if a site is not there, RefusedEdit with the reason if it cannot be done.
    """
    removable = {s.path: s.reason for s in activation_sites(gm, pad)}
    for edit in edits:
        if edit.kind == "linearize":
            _linearize(gm, edit, removable)
        else:
            _EDITORS[edit.kind](gm, edit)
            remove_dead(gm)
    remove_dead(gm)


def _linearize(gm: fx.GraphModule, edit: Edit, reasons: dict[str, str]) -> None:
    activation = next((a for a in find_activations(gm) if a.path == edit.site), None)
    if activation is None:
        raise PlanError(
            f"No activation is called '{edit.site}'", fix="List the sites with `palmette sites` or pm.find_sites."
        )
    if not edit.force and reasons.get(edit.site):
        raise RefusedEdit(f"'{edit.site}' cannot be linearised", why=reasons[edit.site])
    axis = site_axis(gm, activation)
    channels = activation.output.meta["shape"][axis]
    reference: torch.Tensor = next(gm.parameters())
    slope = torch.ones(channels) if edit.slope is None else torch.tensor(edit.slope, dtype=torch.float64)
    offset = torch.zeros(channels) if edit.offset is None else torch.tensor(edit.offset, dtype=torch.float64)
    if slope.numel() != channels:
        raise PlanError(
            f"The edit of '{edit.site}' has {slope.numel()} slopes for {channels} channels",
            fix="Fit the plan on this model.",
        )
    module = ChannelAffine(slope.to(reference), offset.to(reference), axis, trainable=edit.fit == "affine")
    path = f"linearized.{_name(gm, edit.site, 'linearized')}"
    set_module(gm, path, module.train(gm.training))
    with gm.graph.inserting_after(activation.output):
        node = gm.graph.call_module(path, (activation.source,))
    node.meta.update(activation.output.meta, path=path)
    activation.output.replace_all_uses_with(node)
    for old in sorted(activation.region, reverse=True):
        gm.graph.erase_node(old)
    if not bool(slope.any()) and not _connected(gm):
        raise RefusedEdit(
            f"'{edit.site}' cannot be linearised with every channel off",
            why="it is a cut vertex: the output would be constant, disconnected from the input",
            fix="Use fit='affine', or leave this site alone.",
        )


def _name(gm: fx.GraphModule, site: str, room: str) -> str:
    """The site's path as an attribute, another for each site ever edited so: 'a.b' and 'a_b' both give 'a_b'."""
    names = gm.meta["palmette"].setdefault(room, {})
    name = site.replace(".", "_").replace("#", "_")
    while name in names.values():
        name += "_"
    names[site] = name
    return str(name)


def _connected(gm: fx.GraphModule) -> bool:
    """Whether the output still depends on the input, former activations of slope zero taken as cut."""
    reached: set[fx.Node] = set()
    for node in gm.graph.nodes:
        module = module_of(gm, node)
        cut = isinstance(module, ChannelAffine) and not bool(module.slope.any())
        if node.op == "placeholder" or (not cut and any(n in reached for n in tensor_inputs(node))):
            reached.add(node)
        if node.op == "output":
            return any(n in reached for n in node.all_input_nodes)
    return True


def _drop(gm: fx.GraphModule, edit: Edit) -> None:
    run = run_at(gm, edit.site)
    reason = next((b.reason for b in run if b.reason), "")
    if reason:
        raise RefusedEdit(f"Block '{edit.site}' cannot be dropped", why=reason)
    for block in reversed(run):
        block.output.replace_all_uses_with(block.source)


def _fit_linear(gm: fx.GraphModule, edit: Edit) -> None:
    run = run_at(gm, edit.site)
    reason = fit_reason(gm, run)
    if reason:
        raise RefusedEdit(f"'{edit.site}' cannot become a linear map", why=reason)
    source, end = run[0].source, total(run[-1])
    shape, axis = source.meta["shape"], axis_of(gm, source)
    matrix = edit.values()
    if matrix.shape[0] != shape[axis]:
        raise PlanError(
            f"The matrix of '{edit.site}' is for {matrix.shape[0]} channels, not for {shape[axis]}",
            fix="Fit the plan on this model.",
        )
    module = linear_module(matrix.double(), len(shape), axis, like=next(gm.parameters()))
    path = f"fitted.{_name(gm, edit.site, 'fitted')}"
    set_module(gm, path, module.train(gm.training))
    with gm.graph.inserting_before(end):
        node = gm.graph.call_module(path, (source,))
    node.meta.update({k: v for k, v in end.meta.items() if k != "block"}, path=path)
    end.replace_all_uses_with(node)


def _identity(gm: fx.GraphModule, edit: Edit) -> None:
    found = (n for n in gm.graph.nodes if n.op in ("call_module", "call_function") and n.meta["path"] == edit.site)
    node = next((n for n in found if Reader(gm).is_affine(n)), None)
    if node is None:
        raise PlanError(
            f"No convolution is called '{edit.site}'", fix="List the sites with `palmette sites` or pm.find_sites."
        )
    if edit.site not in {s.path for s in convolution_sites(gm)}:
        why = "it changes the shape of its input, or is the network's first or last operation with weights"
        raise RefusedEdit(f"'{edit.site}' cannot be replaced by the identity", why=why)
    node.replace_all_uses_with(node.all_input_nodes[0])


def _parallelize(gm: fx.GraphModule, edit: Edit) -> None:
    run = run_at(gm, edit.site)
    reason = parallel_reason(gm, run)
    if reason:
        raise RefusedEdit(f"'{edit.site}' cannot be parallelised", why=reason)
    make_parallel(gm, run)


_EDITORS = {"drop": _drop, "fit_linear": _fit_linear, "identity": _identity, "parallelize": _parallelize}


def repad(gm: fx.GraphModule) -> None:
    """Move the zero padding of every run joined by linearised activations to its first operation."""
    reader = Reader(gm)
    for path in reader.paths():
        for run in linear_runs(path):
            _repad_run(reader, run)
    gm.recompile()


def linear_runs(path: Path) -> list[Path]:
    """Maximal stretches of at least two elements joined by linearised activations."""
    runs: list[Path] = []
    current: Path = []
    for element in path:
        current.append(element)
        if not element.linear_link:
            runs.append(current)
            current = []
    runs.append(current)
    return [r for r in runs if len(r) > 1]


def _repad_run(reader: Reader, run: Path) -> None:
    shapes = [reader.shape_of(e) for e in run]
    if run[0].rank == 0 or not any(s.padded for s in shapes[1:]):
        return
    before, after = list(shapes[0].before), list(shapes[0].after)
    stride = [1] * run[0].rank
    for previous, shape in itertools.pairwise(shapes):
        for d in range(run[0].rank):
            stride[d] *= previous.stride[d]
            before[d] += stride[d] * shape.before[d]
            after[d] += stride[d] * shape.after[d]
    first = run[0] if reader.is_affine(run[0].main) else None
    for element in run[1:]:
        set_padding(reader, element, (0,) * element.rank, (0,) * element.rank)
    if first is not None:
        set_padding(reader, first, tuple(before), tuple(after))
    else:
        insert_pad(reader.gm, run[0].nodes[0], before, after)


def set_padding(reader: Reader, element: Element, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Give a convolution this zero padding and no other; uneven padding becomes a padding node in front of it."""
    gm, node = reader.gm, element.main
    for pad in element.pads:
        pad.replace_all_uses_with(pad.all_input_nodes[0])
        gm.graph.erase_node(pad)
        element.nodes.remove(pad)
    element.pads.clear()
    if not reader.is_affine(node):
        return
    even = before == after
    _write_padding(gm, node, element.rank, before if even else (0,) * element.rank)
    if not even:
        element.pads.append(insert_pad(gm, node, list(before), list(after)))
    reader.forget(element)


def insert_pad(gm: fx.GraphModule, node: fx.Node, before: list[int], after: list[int]) -> fx.Node:
    """A zero-padding node in front of `node`."""
    source: Any = node.args[0]
    sizes = [v for pair in zip(reversed(before), reversed(after), strict=True) for v in pair]
    with gm.graph.inserting_before(node):
        pad = gm.graph.call_function(torch.ops.aten.constant_pad_nd.default, (source, sizes, 0.0))
    spatial = [n + b + a for n, b, a in zip(source.meta["shape"][2:], before, after, strict=True)]
    pad.meta.update(
        shape=(*source.meta["shape"][:2], *spatial), dtype=node.meta["dtype"], path=f"{node.meta['path']}.pad"
    )
    node.replace_input_with(source, pad)
    return pad


def _write_padding(gm: fx.GraphModule, node: fx.Node, rank: int, padding: tuple[int, ...]) -> None:
    module: Any = module_of(gm, node)
    if module is not None:
        module.padding = padding
        module._reversed_padding_repeated_twice = [p for p in reversed(padding) for _ in range(2)]
        return
    stride, _, _, dilation, groups = conv_settings(gm, node, rank)
    args: list[Any] = [*node.args[:3], *[None][len(node.args) - 2 :]] if len(node.args) < 3 else list(node.args[:3])
    node.args = (*args, list(stride), list(padding), list(dilation), groups)
