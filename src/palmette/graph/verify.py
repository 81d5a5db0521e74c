"""Prove that the collapsed network computes what the edited one does."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.graph.capture import is_captured
from palmette.graph.collapse import collapse_again
from palmette.graph.dead import remove_again
from palmette.graph.inputs import call, inputs_of, main_output, map_tensors, tensors, to_device, with_batch

EXACT = 1e-10
"""A merge that claims to be exact may differ by no more than this, relatively, in float64."""


@dataclass(frozen=True)
class Verification:
    """Largest relative error over all batches, max |y - y'| / max |y|, in float32 and float64; top-1 agreement.

    `resolutions`: the input sizes tried, with the reason where the network allows only one; `exact`: the bound holds in
    the float64 twin.
    """

    max_relative_error: float
    max_relative_error_float64: float
    top1_agreement: float
    samples: int
    resolutions: list[str] = field(default_factory=list)
    exact: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def __str__(self) -> str:
        errors = f"{self.max_relative_error:.1e} (float32), {self.max_relative_error_float64:.1e} (float64)"
        agreement = f"{100 * self.top1_agreement:.2f} % of {self.samples} samples"
        return f"max relative error {errors}, top-1 agreement {agreement}, at {', '.join(self.resolutions)}"


def verify(
    edited: nn.Module,
    collapsed: nn.Module,
    batches: Iterable[Any] = (),
    *,
    example_inputs: Any,
    random_batches: int = 2,
) -> Verification:
    """Compare both networks in eval mode on `batches` and on noise, at two resolutions where possible.

    `batches`: inputs shaped like `example_inputs`, or what a loader yields. Both networks stay untouched.
    """
    pair = (_eval(edited), _eval(collapsed))
    twins = _twins(*pair)
    device = next((p.device for p in edited.parameters()), torch.device("cpu"))
    trials = [noise_like(example_inputs, seed) for seed in range(random_batches)]
    trials += [inputs_of(b, example_inputs) for b in batches]
    trials = [to_device(t, device) for t in trials]
    worst, worst64, agree, samples, sizes = 0.0, 0.0, 0, 0, []
    other = resized(trials[0])
    second = other is not None and _runs(pair[0], other)
    for inputs in [*trials, *([other] if second else [])]:
        e, e64, same, n = _compare(pair, twins, inputs)
        worst, worst64, agree, samples = max(worst, e), max(worst64, e64), agree + same, samples + n
        sizes.append("x".join(str(s) for s in tensors(inputs)[0].shape[1:]))
    sizes = list(dict.fromkeys(sizes))
    if not second:
        sizes.append(
            "no second size: the network fixes its input size"
            if other is not None
            else "no second size: inputs have no spatial axes"
        )
    return Verification(worst, worst64, agree / max(samples, 1), samples, sizes, worst64 <= EXACT)


def _twins(edited: nn.Module, collapsed: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both networks in float64; the collapsed one by repeating its merges there, without rounding to float32.

    A collapsed network whose weights are not those of its merges is taken as it is.
    """
    twin: Any = float64_twin(edited)
    if not (is_captured(edited) and is_captured(collapsed)):
        return twin, float64_twin(collapsed)
    before, after = (_steps(network) for network in (edited, collapsed))
    again = _repeated(twin, after[len(before) :])
    return twin, again if again is not None and _same_weights(again, collapsed) else float64_twin(collapsed)


def _repeated(twin: Any, steps: list[dict[str, Any]]) -> nn.Module | None:
    """The twin after the same merges and narrowings, None if it was also edited in between."""
    for step in steps:
        if "decisions" in step:
            twin = collapse_again(twin, step["decisions"])
        elif "resize" in step:
            twin = remove_again(twin, step["resize"])
        else:
            return None
    return twin.eval()  # type: ignore[no-any-return]


def _same_weights(twin: nn.Module, network: nn.Module) -> bool:
    """Whether `network` holds the twin's weights up to rounding, so that the twin speaks for it."""
    ours, theirs = twin.state_dict(), network.state_dict()
    if ours.keys() != theirs.keys():
        return False
    for name, value in theirs.items():
        exact = ours[name].to(value.device)
        if value.shape != exact.shape:
            return False
        if value.is_floating_point() and value.numel():
            bound = 8 * torch.finfo(value.dtype).eps * exact.abs().max()
            if not bool(((value.double() - exact).abs() <= bound).all()):
                return False
    return True


def _steps(network: Any) -> list[dict[str, Any]]:
    """What was done so far to a captured network."""
    return list(network.meta["palmette"].get("steps", []))


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| / max |a|; infinite if nothing is finite, or if what is not finite differs."""
    finite = torch.isfinite(a)
    same = torch.equal(finite, torch.isfinite(b)) and torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
    if not same or (a.numel() and not bool(finite.any())):
        return float("inf")
    a, b = a[finite].double(), b[finite].double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) if a.numel() else 0.0


def float64_twin(model: nn.Module) -> nn.Module:
    """A copy that computes in float64 throughout, casts written into the graph included."""
    twin = copy.deepcopy(model).double()
    if isinstance(twin, fx.GraphModule):
        for node in twin.graph.nodes:
            if node.op == "call_function":
                node.args = fx.node.map_aggregate(node.args, _widened)
                node.kwargs = fx.node.map_aggregate(node.kwargs, _widened)
        twin.recompile()
    return twin.eval()


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def noise_like(example: Any, seed: int) -> Any:
    """Inputs of the same shapes: normal noise for floats, the example's own values for integers and booleans."""
    generator = torch.Generator().manual_seed(seed)

    def draw(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t

    return map_tensors(draw, with_batch(example, 4))


def resized(inputs: Any) -> Any:
    """The same inputs at another, odd resolution, None where no input has spatial axes."""
    if not any(t.dim() >= 3 and t.is_floating_point() for t in tensors(inputs)):
        return None

    def grow(t: Tensor) -> Tensor:
        if t.dim() < 3 or not t.is_floating_point():
            return t
        size = [s + 9 if s % 2 == 0 else s + 8 for s in t.shape[2:]]
        return torch.nn.functional.interpolate(t, size=size)

    return map_tensors(grow, inputs)


def _eval(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval()


def _runs(model: nn.Module, inputs: Any) -> bool:
    try:
        with torch.no_grad():
            call(model, inputs)
    except Exception:  # noqa: BLE001 (whatever a fixed-size network raises at another size)
        return False
    return True


def _compare(
    pair: tuple[nn.Module, nn.Module], twins: tuple[nn.Module, nn.Module], inputs: Any
) -> tuple[float, float, int, int]:
    wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, inputs)
    with torch.no_grad():
        a, b = (main_output(call(m, inputs)) for m in pair)
        a64, b64 = (main_output(call(m, wide)) for m in twins)
    votes = a.argmax(-1) == b.argmax(-1) if a.dim() > 1 else torch.ones(len(a), dtype=torch.bool)
    per_sample = votes.reshape(len(votes), -1).all(1) if votes.dim() > 1 else votes
    return relative_error(a, b), relative_error(a64, b64), int(per_sample.sum()), len(per_sample)
