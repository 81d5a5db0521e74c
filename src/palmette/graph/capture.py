"""Capture any network into an editable graph of ordinary modules that computes bit for bit the same and still trains.

`torch.export` traces the network in eval mode with a dynamic batch; the exported operations are then raised back to
modules (raising.py). What acts only in training is found again: dropout stays in the exported graph, modules that
return their input in eval mode (stochastic depth in any implementation) are marked by a hook, attention dropout is
recorded in a training pass.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from palmette.errors import CaptureError, InputError, PalmetteError
from palmette.graph.blocks import find_blocks
from palmette.graph.inline import inline_regions
from palmette.graph.inputs import as_call, batch_size, call, map_tensors, tensors, with_batch
from palmette.graph.raising import Raiser

# Copying the nesting of inputs and outputs warns of a class that torch itself still uses.
warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)

_LIBRARY = torch.library.Library("palmette", "DEF")
_LIBRARY.define("mark(Tensor x, str path) -> Tensor")


@torch.library.impl(_LIBRARY, "mark", "CompositeExplicitAutograd")
def _mark(x: Tensor, _path: str) -> Tensor:
    return x.clone()


@torch.library.register_fake("palmette::mark")  # type: ignore[untyped-decorator]
def _mark_fake(x: Tensor, _path: str) -> Tensor:
    return torch.empty_like(x)


def is_captured(model: nn.Module) -> bool:
    """Whether `model` came from `capture` (edited or not)."""
    return isinstance(model, fx.GraphModule) and "palmette" in model.meta


def capture(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """An editable copy of `model` whose forward is bit-equal to it in eval mode.

    `example_inputs`: a tensor, tuple or dict of tensors [batch, ...]; a batch of one is repeated, for the batch stays
    dynamic. Convolutions, linears, norms and dropouts come back as modules at their original paths; a shared parameter
    stays one Parameter. Node metadata: `path` (stable name), `shape` and `dtype` at the example batch.
    `meta["palmette"]["lost"]` lists randomness of the training mode that could not be restored. A captured network is
    copied.
    Raises CaptureError (naming the line) if the network does not trace, InputError if it refuses the inputs.
    """
    if is_captured(model):
        return copy.deepcopy(model)  # type: ignore[return-value]
    if not isinstance(model, nn.Module):
        raise InputError(f"A {type(model).__name__} is no network", fix="Pass a trained nn.Module.")
    if not any(True for _ in model.parameters()):
        raise InputError("The model has no parameters", fix="Pass a trained nn.Module.")
    example = with_batch(example_inputs, max(2, batch_size(example_inputs)))
    modes = {path: module.training for path, module in model.named_modules()}
    source = copy.deepcopy(model).eval()
    try:
        with _slow_attention():
            reference = _run(source, example)
            attention = _attention_dropout(source, example)
            exported, program = _export(source, example)
            regions = inline_regions(exported)
            _plain_signature(exported.graph, example, reference)
            gm = Raiser(source, exported.graph, exported, attention).run()
            gm.eval()
            set_shapes(gm, example)
            find_blocks(gm)  # blocks get their stable names before any edit
            _check_equal(gm, example, reference)
            lost = _lost_randomness(source, gm, example) + regions + _absent_parameters(source, gm)
    except PalmetteError:
        raise
    except Exception as error:
        raise _explain(error, model) from error
    gm.meta["palmette"] = {"inputs": describe(example), "range": str(program.range_constraints), "lost": lost}
    for path, module in gm.named_modules():  # a batch norm that the user froze stays frozen
        module.training = modes.get(path, model.training)
    return gm


def set_shapes(gm: fx.GraphModule, example: Any) -> None:
    """Write `shape` and `dtype` of every tensor into the nodes' metadata, by running the graph in eval mode once."""
    _ShapeReader(gm).read(example)


class _ShapeReader(fx.Interpreter):
    """Runs a graph node by node and writes down shapes; exported values that hold symbolic sizes are let go."""

    def read(self, example: Any) -> None:
        args, kwargs = as_call(example)
        training = {m: m.training for m in self.module.modules()}
        self.module.eval()
        try:
            with torch.no_grad():
                self.run(*_leaves((args, kwargs)), enable_io_processing=False)
        finally:
            for m, mode in training.items():
                m.training = mode

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for key in ("val", "tensor_meta", "unbacked_bindings", "from_node", "torch_fn", "custom"):
            n.meta.pop(key, None)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else None
        n.meta["dtype"] = result.dtype if isinstance(result, Tensor) else None
        return result


def describe(inputs: Any) -> Any:
    """JSON-able description of inputs: shapes and dtypes with their nesting."""
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, dict):
        return {"dict": {k: describe(v) for k, v in inputs.items()}}
    if isinstance(inputs, list | tuple):
        return {"tuple": [describe(v) for v in inputs]}
    return {"value": inputs}


def make_inputs(description: Any) -> Any:
    """Example inputs that fit a description: normal noise for floats, zeros for integers and booleans."""
    if "shape" in description:
        dtype = getattr(torch, description["dtype"])
        if dtype.is_floating_point:
            return torch.randn(description["shape"], generator=torch.Generator().manual_seed(0)).to(dtype)
        return torch.zeros(description["shape"], dtype=dtype)
    if "dict" in description:
        return {k: make_inputs(v) for k, v in description["dict"].items()}
    if "tuple" in description:
        return tuple(make_inputs(v) for v in description["tuple"])
    return description["value"]


def example_of(gm: fx.GraphModule) -> Any:
    """Example inputs of a captured network, made from their description in the network's present dtype and device."""
    weight = next((p for p in gm.parameters() if p.is_floating_point()), None)
    example = make_inputs(gm.meta["palmette"]["inputs"])
    return (
        example
        if weight is None
        else map_tensors(lambda t: t.to(weight) if t.is_floating_point() else t.to(weight.device), example)
    )


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """Fused inference attention is another function in float32: keep to the one that also trains."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _run(source: nn.Module, example: Any) -> Any:
    try:
        with torch.no_grad():
            return call(source, example)
    except Exception as error:
        shapes = [tuple(t.shape) for t in tensors(example)]
        raise InputError(
            f"The model refuses inputs of shape {shapes}",
            where=_user_line(error),
            why=_one_line(error),
            fix="Pass inputs that the model accepts.",
        ) from error


def _export(source: nn.Module, example: Any) -> tuple[fx.GraphModule, torch.export.ExportedProgram]:
    args, kwargs = as_call(example)
    size = batch_size(example)

    def dynamic(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: torch.export.Dim.AUTO} if value.dim() and value.shape[0] == size else None
        if isinstance(value, dict):
            return {k: dynamic(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(dynamic(v) for v in value)
        return None

    shapes: Any = {k: dynamic(v) for k, v in kwargs.items()} if kwargs else tuple(dynamic(v) for v in args)
    with _marked(source), _quiet():
        program = torch.export.export(source, args, kwargs, dynamic_shapes=shapes, strict=False)
        module = program.module(check_guards=False)
    if not program.range_constraints:
        raise CaptureError(
            "The model fixes the batch size",
            where=type(source).__name__,
            why="its forward only works for the example's batch",
            fix="Write the batch as x.shape[0] or -1.",
        )
    return module, program


def _plain_signature(graph: fx.Graph, example: Any, reference: Any) -> None:
    """Give a network of tensors in, one tensor out an ordinary forward instead of the exported nesting code."""
    args, kwargs = as_call(example)
    if kwargs or not isinstance(reference, Tensor) or not all(isinstance(a, Tensor) for a in args):
        return
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    result = output.args[0]
    output.args = (result[0] if isinstance(result, list | tuple) else result,)
    graph.set_codegen(fx.graph.CodeGen())


@contextlib.contextmanager
def _marked(source: nn.Module) -> Iterator[None]:
    """While exporting, leave a mark where a module without state returns its own input: it acts in training only."""
    handles = []
    versions: dict[nn.Module, int] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            versions[module] = args[0]._version

    def after(module: nn.Module, args: tuple[Any, ...], output: Any, path: str) -> Any:
        if args and output is args[0] and isinstance(output, Tensor) and output._version == versions.get(module):
            return torch.ops.palmette.mark(output, path)
        return None

    for path, module in source.named_modules():
        stateless = not module._modules and not module._parameters and not module._buffers
        if path and stateless and not isinstance(module, nn.Identity | nn.Sequential):
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(lambda m, a, o, p=path: after(m, a, o, p)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings, log and the graph it prints of a network that does not trace."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _restored_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def _attention_dropout(source: nn.Module, example: Any) -> list[float]:
    """Dropout probability of every scaled dot-product attention call of a training pass, in order; [] if it fails."""
    found: list[float] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(float(kwargs.get("dropout_p", args[1] if len(args) > 1 else 0.0)))
        return original(query, key, value, *args, **kwargs)

    probe = copy.deepcopy(source).train()
    torch.nn.functional.scaled_dot_product_attention = record
    try:
        with torch.no_grad(), _restored_random_state(), _quiet():
            call(probe, example)
    except Exception:  # noqa: BLE001 (what cannot train on this example has no attention dropout to restore)
        return []
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    return found if any(found) else []


class _RandomCounter(TorchDispatchMode):
    """Counts operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return func(*args, **(kwargs or {}))


def _lost_randomness(source: nn.Module, gm: fx.GraphModule, example: Any) -> list[str]:
    """Says so when a training pass of the original draws more random tensors than one of the captured network."""
    counts = []
    for network in (source, gm):
        probe = copy.deepcopy(network).train()
        try:
            with _RandomCounter() as counter, torch.no_grad(), _restored_random_state(), _quiet():
                call(probe, example)
        except Exception:  # noqa: BLE001 (e.g. batch norm over a single value: neither can train on this example)
            return []
        counts.append(counter.count)
    if counts[0] > counts[1]:
        missing = f"{counts[0] - counts[1]} of {counts[0]} random operations of training mode"
        return [f"{missing} are written as functions and were not restored"]
    return []


def _absent_parameters(source: nn.Module, gm: fx.GraphModule) -> list[str]:
    """Says so when trainable parameters are not in the graph: eval mode does not read them, or reads a cached copy."""
    kept = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    absent = [name for name, p in source.named_parameters() if name not in kept and p.requires_grad]
    if not absent:
        return []
    shown = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
    return [f"{len(absent)} parameters that only training mode reads are left out: {shown}"]


def _check_equal(gm: fx.GraphModule, example: Any, reference: Any) -> None:
    with torch.no_grad():
        ours = call(gm, example)
    for a, b in zip(tensors(_leaves(ours)), tensors(_leaves(reference)), strict=True):
        if not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            error = (a.double() - b.double()).abs().max().item()
            raise CaptureError(
                f"The captured graph differs from the model by {error:.1e}",
                why="its forward depends on something other than its inputs and weights "
                "(random numbers, state, the clock)",
                fix="Make the forward deterministic in eval mode.",
            )


def _leaves(output: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(output)


def _user_line(error: BaseException) -> str | None:
    """File and line of the innermost frame outside torch and palmette."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if "/torch/" not in f.filename and "/palmette/graph/" not in f.filename and not f.filename.startswith("<")
    ]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def _explain(error: Exception, model: nn.Module) -> CaptureError:
    where = _user_line(error)
    return CaptureError(
        f"{type(model).__name__} does not trace into a graph",
        where=where,
        why=_one_line(error),
        fix="Rewrite that line without control flow on tensor values (torch.where instead of if), "
        "or wrap the model around it.",
    )
