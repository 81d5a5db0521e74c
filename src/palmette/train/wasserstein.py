"""The max-sliced Wasserstein distance between what enters and what leaves a block, as a number and as a loss term.

Quétu, Liao, Hezbri, Pizzati, Tartaglione, "LaCoOT: Layer Collapse through Optimal Transport", ICCV 2025 (arXiv
2406.08933): pressed together during training, the two distributions let whole blocks go afterwards. Cost: sorting
[batch, projections] numbers twice per block and step, and two matrix products of the features with the directions;
measured, a step takes about a quarter longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from palmette.errors import InputError
from palmette.graph.blend import insert_blends, remove_blends
from palmette.graph.capture import is_captured


def max_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    projections: int = 50,
    p: float = 2.0,
    relative: bool = False,
    optimise: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The max-sliced p-Wasserstein distance of two samples of equal size, as a scalar with gradients to both.

    x, y: [batch, ...], flattened to one vector [features] per sample. Both are projected on `projections` random unit
    directions, drawn anew at each call from `generator` (default: the global one of the device), and sorted; the result
    is (max over directions of mean |sorted difference|^p)^(1/p). Directions are constants for the gradient. Features
    in half precision are taken to float32.

    optimise: so many steps of ascent on every direction first; a step goes all the way to the direction of the gradient
    (for p = 2 a power iteration with the pairing of the moment) and is undone where the distance does not grow. The
    result is then at least the one without, and nearer to the maximum over all directions.

    relative: divide by what a direction of that kind sees of the input, taken as a constant, so that the result depends
    neither on the scale of the features nor on their number d: it is about |x - y| / |x|. A random direction sees
    1/sqrt(d) of a vector's length, which is the root mean square of its coordinates; that of x is the divisor. A
    direction found by ascent may see all of it; the divisor is then the root mean square length of the samples of x.

    Raises InputError for samples of different shapes or sizes, no sample, or arguments out of bounds.
    """
    _check_arguments(projections, p, optimise)
    if x.shape != y.shape or x.dim() < 1 or x.shape[0] == 0 or x.numel() == 0:
        raise InputError(
            f"samples of shape {tuple(x.shape)} and {tuple(y.shape)} cannot be compared",
            fix="Give two batches of equal shape [batch, ...], with at least one sample",
        )
    x, y = _rows(x), _rows(y)
    directions = random_directions(x.shape[1], projections, like=x, generator=generator)
    with torch.no_grad():
        for _ in range(optimise):
            directions = _ascended(x, y, directions, p)
    largest = _costs(x, y, directions, p).max()
    equal = largest == 0  # the p-th root has no finite slope at 0, where the gradient is 0 in the mean of both sides
    distance = torch.where(equal, 0.0, torch.where(equal, 1.0, largest) ** (1 / p))
    return distance / _size(x, ascended=optimise > 0) if relative else distance


def _check_arguments(projections: int, p: float, optimise: int) -> None:
    for name, value, least in (("projections", projections, 1), ("p", p, 1), ("optimise", optimise, 0)):
        if not value >= least:
            raise InputError(f"{name}={value!r} is not allowed", where="max-sliced Wasserstein", fix=f"Use >= {least}")


def _rows(x: Tensor) -> Tensor:
    """[batch, ...] -> [batch, features] in float32 or float64; the batch size is never assumed."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return wide.flatten(1) if wide.dim() > 1 else wide.unsqueeze(1)


def random_directions(features: int, count: int, *, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Unit vectors, uniform on the sphere, as the columns of [features, count], of the type and device of `like`."""
    device = like.device if generator is None else generator.device
    drawn = torch.randn(features, count, generator=generator, device=device, dtype=like.dtype).to(like.device)
    return nn.functional.normalize(drawn, dim=0)


def _costs(x: Tensor, y: Tensor, directions: Tensor, p: float) -> Tensor:
    """W_p^p along each direction: [count]."""
    difference = (x @ directions).sort(dim=0).values - (y @ directions).sort(dim=0).values  # [batch, count]
    return difference.abs().pow(p).mean(dim=0)


def _ascended(x: Tensor, y: Tensor, directions: Tensor, p: float) -> Tensor:
    """One step of ascent on every direction; those that gain nothing by it stay."""
    (along_x, order_x), (along_y, order_y) = (x @ directions).sort(dim=0), (y @ directions).sort(dim=0)
    difference = along_x - along_y
    slope = difference.abs().pow(p - 1) * difference.sign()  # [batch, count], in sorted order
    gradient = x.T @ slope.new_zeros(slope.shape).scatter(0, order_x, slope)
    gradient -= y.T @ slope.new_zeros(slope.shape).scatter(0, order_y, slope)
    moved = nn.functional.normalize(gradient, dim=0)
    better = _costs(x, y, moved, p) > difference.abs().pow(p).mean(dim=0)
    return torch.where(better, moved, directions)


def _size(x: Tensor, *, ascended: bool) -> Tensor:
    """Root mean square of the coordinates or of the lengths of x [batch, features], a constant; 1 where x is 0."""
    size = x.detach().square().mean().sqrt() * (x.shape[1] ** 0.5 if ascended else 1.0)
    return torch.where(size > 0, size, torch.ones_like(size))


class LacootTerm:
    """`weight` times the mean over blocks of the max-sliced Wasserstein distance between a block's input and output.

    A term for `palmette.heal(loss_terms=[term])`; in a loop of one's own, add `term()` to the loss after each forward
    pass in training mode. It keeps nothing from one step to the next. Made by `lacoot_term`.
    """

    def __init__(self, measure: Callable[[Tensor, Tensor], Tensor], weight: float) -> None:
        self.measure, self.weight = measure, weight
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, model: Any = None, inputs: Any = None, output: Any = None) -> Tensor:  # noqa: ARG002
        """The term for the forward pass just made; the arguments are those of a loss term and are not looked at.

        Raises InputError when no block was passed in training mode since the last call.
        """
        if not self.seen:
            raise InputError("no block was passed since the last step", fix="Run the network in training mode first")
        distances = [self.measure(before, after) for before, after in self.seen.values()]
        self.seen.clear()
        home = distances[0].device  # a network may be spread over several devices
        return self.weight * torch.stack([distance.to(home) for distance in distances]).mean()


class _Tap(nn.Module):
    """Passes a block's output on, and hands input and output to a term in training mode."""

    def __init__(self, term: LacootTerm, path: str) -> None:
        super().__init__()
        self.path = path
        self._seen = term.seen

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """The output as it is."""
        if self.training:
            self._seen[self.path] = (before, after)
        return after


@contextmanager
def lacoot_term(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    weight: float = 1.0,
    projections: int = 50,
    p: float = 2.0,
    relative: bool = True,
    optimise: int = 0,
) -> Iterator[LacootTerm]:
    """Watch blocks of a network and yield the loss term of LaCoOT on them; afterwards the network is as it was.

    model: a captured network, whose blocks are named by the paths of its sites, or any other module, whose blocks are
    the names of submodules that take one tensor and return one of the same shape (of several calls in one pass the last
    counts). The other arguments are those of `max_sliced_wasserstein`; directions come from the global generator, which
    `heal` seeds and stores, so that a resumed training is bit-identical.

    Raises InputError for no block, a name that is no module, arguments out of bounds, and, during training, a block
    that changes its input's shape; PlanError for a path that is no site.
    """
    _check_arguments(projections, p, optimise)
    if not blocks:
        raise InputError("no block is named", fix="Name at least one block whose input and output have the same shape")

    def measure(before: Tensor, after: Tensor) -> Tensor:
        return max_sliced_wasserstein(before, after, projections=projections, p=p, relative=relative, optimise=optimise)

    term = LacootTerm(measure, weight)
    taps = {path: _Tap(term, path) for path in blocks}
    if is_captured(model):
        insert_blends(model, taps)  # type: ignore[arg-type]
        try:
            yield term
        finally:
            remove_blends(model, taps)  # type: ignore[arg-type]
        return
    handles = [_module(model, path).register_forward_hook(_hook(taps[path])) for path in blocks]
    try:
        yield term
    finally:
        for handle in handles:
            handle.remove()


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise InputError(
            f"the model has no module {path!r}", where=type(model).__name__, fix="See model.named_modules()"
        ) from error


def _hook(tap: _Tap) -> Callable[..., None]:
    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            raise InputError(f"{tap.path!r} does not turn one tensor into one tensor", fix="Name another module")
        tap.train(module.training)(args[0], output)

    return watch
