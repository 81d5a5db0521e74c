"""Tucker and SVD forms of activations: how a layer's input is kept in fewer numbers until the backward pass.

x is close to S x_0 U_0 x_1 U_1 ... with U_n [D_n, r_n] of orthonormal columns and the core S the projection of x on
them (AMC, NeurIPS 2024; ASI, ICML 2025). The factors come from Gram matrices of the unfoldings rather than from their
SVDs, one mode after the other on the tensor that the earlier ones have shrunk: the same quality, far less work.
Mode 0 is the batch. Halves are computed in float32; nothing here records gradients or touches a global generator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from palmette.errors import InputError, TrainingError

Bases = tuple[Tensor | None, ...]

_WIDE = 32  # a batched product over fewer columns is slower than one product over a copy of the unfolding
_SMALL = 64  # modes up to this size are decomposed exactly: at most twice a pass's time, and nothing more is lost
_LARGE = 1024  # the eigenvectors of a larger Gram matrix take seconds
_EIGH = 25  # eigenvectors of a D x D matrix cost about this many D^3 multiply-adds
_PASS = 4  # a pass's two thin products, counted at the half speed that such products reach
_SPARE = 8  # directions beyond the rank that the search in a large mode carries along
_PASSES = 4  # and how many passes it makes


class Tucker(NamedTuple):
    """A tensor in Tucker form: core [r_0, r_1, ...] and one factor [D_n, r_n] a mode.

    None stands for a mode that is not compressed: r_n == D_n, the identity, which costs nothing. The core may be the
    tensor given, or a view of it, where no mode is compressed.
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradients recorded and no autocast on this device: decompositions have no half-precision kernels."""
    with torch.no_grad():
        if torch.amp.is_autocast_available(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


def clamp_ranks(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """The ranks that can be used: none above its mode's size. InputError for one below 1 or a wrong number of them."""
    if len(ranks) != len(shape):
        raise InputError("there must be one rank for each mode", why=f"{len(ranks)} ranks, shape {tuple(shape)}")
    if min(ranks) < 1:
        raise InputError("a rank must be at least 1", why=f"the ranks are {tuple(ranks)}")
    return tuple(min(rank, size) for rank, size in zip(ranks, shape, strict=True))


def elements(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """How many numbers the Tucker form of such a tensor holds: its core's, and D_n r_n for each compressed mode."""
    kept = clamp_ranks(shape, ranks)
    factors = sum(size * rank for size, rank in zip(shape, kept, strict=True) if rank < size)
    return math.prod(kept) + factors


def dense(tucker: Tucker) -> Tensor:
    """The tensor [D_0, D_1, ...] that a Tucker form stands for, in float32 at least."""
    with exact_arithmetic(tucker.core.device):
        x = _computable(tucker.core)
        for mode, factor in enumerate(tucker.factors):
            if factor is not None:
                x = mode_product(x, factor.to(x.dtype), mode)
        return x


def mode_product(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Product along one mode: [..., D, ...] and [p, D] give [..., p, ...], laid out in whichever way is fastest."""
    before, size, after = _split(x, mode)
    shape = (*x.shape[:mode], matrix.shape[0], *x.shape[mode + 1 :])
    if before == 1:
        return (matrix @ x.reshape(size, after)).reshape(shape)
    if after == 1:
        return (x.reshape(before, size) @ matrix.T).reshape(shape)
    if after >= _WIDE:
        return torch.matmul(matrix, x.reshape(before, size, after)).reshape(shape)
    flat = x.reshape(before, size, after).transpose(0, 1).reshape(size, -1)
    return (matrix @ flat).view(-1, before, after).transpose(0, 1).reshape(shape)


@lru_cache(maxsize=4096)
def cheapest_order(numel: int, steps: tuple[tuple[int, int, int], ...]) -> tuple[int, tuple[int, ...]]:
    """(cost, order) of the cheapest order of steps that resize modes of a tensor of `numel` numbers.

    A step is (size before, size after, cost per number held when it is taken). The order indexes `steps`.
    """
    best: tuple[int, tuple[int, ...]] | None = None
    for order in itertools.permutations(range(len(steps))):
        held, total = numel, 0
        for step in order:
            before, after, each = steps[step]
            total += held * each
            held = held // before * after
        if best is None or total < best[0]:
            best = total, order
    return best or (0, ())


def hosvd(x: Tensor, ranks: Sequence[int], *, sequential: bool = True, dtype: torch.dtype | None = None) -> Tucker:
    """Tucker form of x by the eigenvectors of its Gram matrices; lost energy <= the sum of what each mode leaves out.

    sequential: each mode sees the tensor that the modes before it have shrunk, the cheapest mode first, the batch
    last; otherwise every factor comes from the whole tensor, as published. Modes whose two sides both exceed 1024 are
    searched by randomised subspace iteration. dtype: of what is returned; None for that computed in, never a half.
    InputError for ranks that do not fit, TrainingError where x is not finite (or NaN in the form: LAPACK does not
    always notice). Source: AMC; truncation in sequence: Vannieuwenhoven et al., 2012.
    """
    with exact_arithmetic(x.device):
        x, kept = checked(x, ranks)
        generator = torch.Generator().manual_seed(0)
        core = x
        factors: list[Tensor | None] = [None] * x.ndim
        for mode in _modes(x.shape, kept, iterated=False):
            factor = _leading(core if sequential else x, mode, kept[mode], generator)
            core = mode_product(core, factor.T, mode)
            factors[mode] = factor
        return _stored(core, factors, dtype)


def svd_hosvd(x: Tensor, ranks: Sequence[int]) -> Tucker:
    """Tucker form by a full thin SVD of every unfolding, as AMC's code does: the slow reference to compare with."""
    with exact_arithmetic(x.device):
        core, kept = checked(x, ranks)
        whole = core
        factors: list[Tensor | None] = [None] * x.ndim
        for mode, rank in enumerate(kept):
            if rank < x.shape[mode]:
                try:
                    left = torch.linalg.svd(unfold(whole, mode), full_matrices=False)[0]
                except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                    raise not_finite() from error
                factor = left[:, :rank].clone() if rank <= left.shape[1] else _orthonormal(left, rank)
                core = mode_product(core, factor.T, mode)
                factors[mode] = factor
        return _stored(core, factors, None)


def subspace_iteration(
    x: Tensor,
    ranks: Sequence[int],
    bases: Bases | None,
    *,
    generator: torch.Generator,
    published: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tucker, Bases]:
    """Tucker form of x by one pass from the bases of the last step, and the bases for the next one (ASI).

    published: every mode, the batch too, is iterated on the whole tensor, from Gaussian numbers at first or where the
    sizes have changed. Otherwise in sequence; modes where one pass costs more than the exact factor get the exact one
    and no basis, as does the batch, last, on the shrunk core: its samples change with every step. There a cold start
    is exact. A basis that would not be finite is replaced by the one before it. dtype and errors as for `hosvd`.
    """
    with exact_arithmetic(x.device):
        x, kept = checked(x, ranks)
        former: Bases = bases if bases is not None and len(bases) == x.ndim else (None,) * x.ndim
        core = x
        factors: list[Tensor | None] = [None] * x.ndim
        later: list[Tensor | None] = [None] * x.ndim
        for mode in _modes(x.shape, kept, iterated=True, in_order=published):
            basis = former[mode]
            if basis is not None:
                basis = basis.to(x) if basis.shape == (x.shape[mode], kept[mode]) else None
            iterated = published or (mode > 0 and _iterates(core, mode, kept[mode]))
            if iterated and basis is not None:
                factor = _one_pass(x if published else core, mode, basis)
            else:
                start = _cold if published else _leading
                factor = start(x if published else core, mode, kept[mode], generator)
            later[mode] = _finite(factor, basis) if iterated else None
            core = mode_product(core, factor.T, mode)
            factors[mode] = factor
        return _stored(core, factors, dtype), tuple(later)


def svd(x: Tensor, rank: int, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """A matrix x [B, ...] of B rows in two factors, left = U S [B, K] and right = V^T [K, rest]; K <= min(B, rest).

    By the Gram matrix of the smaller side. Errors and dtype as for `hosvd`. Source: AMC's SVD variant.
    """
    with exact_arithmetic(x.device):
        x = checked(x, None)[0].reshape(x.shape[0], -1)
        kept = min(clamp_ranks((x.shape[0],), (rank,))[0], x.shape[1])
        generator = torch.Generator().manual_seed(0)
        if x.shape[1] < x.shape[0]:
            right = _leading(x, 1, kept, generator).T
            return (x @ right.T).to(dtype or x.dtype), right.to(dtype or x.dtype)
        directions = _leading(x, 0, kept, generator)
        scaled = directions.T @ x
        sizes = torch.linalg.vector_norm(scaled, dim=1)
        right = scaled / sizes.clamp_min(torch.finfo(x.dtype).tiny)[:, None]
        return (directions * sizes).to(dtype or x.dtype), right.to(dtype or x.dtype)


# ---- what the decompositions are made of -----------------------------------------------------------------------------


def finest(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def not_finite() -> TrainingError:
    """The error for an activation with NaN or infinite numbers."""
    return TrainingError(
        "an activation cannot be decomposed",
        why="it holds NaN, an infinity, or values too large to be squared",
        fix="Lower the learning rate, or clip gradients.",
    )


def _computable(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def checked(x: Tensor, ranks: Sequence[int] | None) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor without its graph, contiguous, in the type to compute in, and the ranks to use."""
    if x.ndim < 2 or x.numel() == 0 or not x.is_floating_point():
        raise InputError(
            "only real tensors of two modes or more can be compressed", why=f"this one is {x.dtype} {tuple(x.shape)}"
        )
    return _computable(x).contiguous(), clamp_ranks(x.shape, ranks if ranks is not None else x.shape)


def _stored(core: Tensor, factors: list[Tensor | None], dtype: torch.dtype | None) -> Tucker:
    kind = dtype or core.dtype
    return Tucker(core.to(kind), tuple(None if factor is None else factor.to(kind) for factor in factors))


def _split(x: Tensor, mode: int) -> tuple[int, int, int]:
    return math.prod(x.shape[:mode]), x.shape[mode], math.prod(x.shape[mode + 1 :])


def unfold(x: Tensor, mode: int) -> Tensor:
    """The matrix [D_mode, rest]."""
    return x.movedim(mode, 0).reshape(x.shape[mode], -1)


def gram_of(x: Tensor, mode: int) -> Tensor:
    """X X^T [D, D] of an unfolding; batched, without a copy of x, where the sum over the batch is no larger than x."""
    before, size, after = _split(x, mode)
    if before > 1 and after >= max(size, _WIDE):
        blocks = x.reshape(before, size, after)
        return torch.bmm(blocks, blocks.transpose(1, 2)).sum(0)
    flat = unfold(x, mode)
    return flat @ flat.T


def _modes(shape: Sequence[int], kept: tuple[int, ...], *, iterated: bool, in_order: bool = False) -> list[int]:
    """The modes to compress in the order to take them: by cost, the batch last."""
    compressed = [mode for mode, rank in enumerate(kept) if rank < shape[mode]]
    if in_order:
        return compressed
    inner = [mode for mode in compressed if mode > 0]
    each = [3 * kept[mode] if iterated and shape[mode] > _SMALL else shape[mode] + kept[mode] for mode in inner]
    steps = tuple((shape[mode], kept[mode], cost) for mode, cost in zip(inner, each, strict=True))
    order = cheapest_order(math.prod(shape), steps)[1]
    return [inner[step] for step in order] + compressed[: len(compressed) - len(inner)]


def _iterates(x: Tensor, mode: int, rank: int) -> bool:
    """Whether a pass of subspace iteration costs less than the exact factor."""
    numel, size = x.numel(), x.shape[mode]
    side = min(size, numel // size)
    return side > _SMALL and numel * side + _EIGH * side**3 > _PASS * numel * rank


def _orthonormal(columns: Tensor, rank: int) -> Tensor:
    """Orthonormal columns [D, rank] that span these, completed where there are fewer, in a storage of their own."""
    missing = rank - columns.shape[1]
    if missing > 0:
        columns = F.pad(columns, (0, missing))  # a reflector of a zero column is the identity: Q stays orthonormal
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis.contiguous()


def _top(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, largest first; `flip` also lets go of the others' storage."""
    try:
        vectors: Tensor = torch.linalg.eigh(gram)[1]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        if not torch.isfinite(gram).all():
            raise not_finite() from error
        # LAPACK gives up on some matrices of low rank in float32
        vectors = torch.linalg.eigh(gram.to(finest(gram.device)) / gram.abs().max())[1].to(gram.dtype)
    return vectors[:, -rank:].flip(1)


def _leading(x: Tensor, mode: int, rank: int, generator: torch.Generator) -> Tensor:
    """The leading left singular vectors [D, rank] of an unfolding."""
    size = x.shape[mode]
    others = x.numel() // size
    if min(size, others) > _LARGE:
        return _searched(unfold(x, mode), rank, generator)
    if others >= size:
        return _top(gram_of(x, mode), rank)
    flat = unfold(x, mode)
    if others > rank:
        flat = flat @ _top(flat.T @ flat, rank)
    return _orthonormal(flat, rank)  # dividing by the singular values instead would not survive small ones


def _searched(flat: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The leading left singular vectors of a matrix with two long sides, by randomised subspace iteration."""
    carried = min(rank + _SPARE, *flat.shape)
    basis = _gaussian((flat.shape[0], carried), flat, generator)
    for _ in range(_PASSES):
        basis = _orthonormal(flat @ (flat.T @ basis), carried)
    inner = basis.T @ flat
    if carried < rank:
        return _orthonormal(basis, rank)
    return basis @ _top(inner @ inner.T, rank)


def _gaussian(shape: tuple[int, int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn where the generator lives, so that one seed gives one start on every device."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _cold(x: Tensor, mode: int, rank: int, generator: torch.Generator) -> Tensor:
    """The published first step: the span of X times Gaussian numbers."""
    flat = unfold(x, mode)
    return _orthonormal(flat @ _gaussian((flat.shape[1], rank), flat, generator), rank)


def _one_pass(x: Tensor, mode: int, basis: Tensor) -> Tensor:
    """The span of X X^T basis."""
    before, size, after = _split(x, mode)
    rank = basis.shape[1]
    if before > 1 and after >= max(rank, _WIDE):
        blocks = x.reshape(before, size, after)
        columns = torch.bmm(blocks, torch.matmul(basis.T, blocks).transpose(1, 2)).sum(0)
    else:
        flat = unfold(x, mode)
        columns = flat @ (flat.T @ basis)
    return _orthonormal(columns, rank)


def _finite(basis: Tensor, former: Tensor | None) -> Tensor:
    """The basis for the next step: one bad batch must not spoil every step after it. No number is read back."""
    if former is None:
        former = torch.eye(basis.shape[0], basis.shape[1], dtype=basis.dtype, device=basis.device)
    return torch.where(torch.isfinite(basis).all(), basis, former)
