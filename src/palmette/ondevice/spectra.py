"""How the energy of a tensor is spread over the directions of its modes: what ranks are chosen by."""

from __future__ import annotations

import torch
from torch import Tensor

from palmette.errors import InputError
from palmette.ondevice.tucker import checked, exact_arithmetic, finest, gram_of, not_finite, unfold

_SLICE = 2**20  # numbers that are put into the finest type at a time


def spectra(x: Tensor) -> list[Tensor]:
    """Energy of every direction of every mode: the squared singular values of the unfoldings, descending, in float64.

    As many a mode as the smaller side of its unfolding. TrainingError where x is not finite.
    """
    with exact_arithmetic(x.device):
        x = checked(x, None)[0]
        found = []
        for mode in range(x.ndim):
            size = x.shape[mode]
            if x.numel() // size < size:
                flat = unfold(x, mode).to(finest(x.device))
                gram = flat.T @ flat
            else:
                gram = _exact_gram(x, mode)
            # NaN compares false with everything, so that it would pass below for a direction without energy.
            if not bool(torch.isfinite(gram).all()):
                raise not_finite()
            found.append(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0))
        return found


def ranks_for_energy(x: Tensor, energy: float) -> tuple[int, ...]:
    """Smallest rank of each mode, taken by itself, that keeps this share of the tensor's energy (AMC's rule).

    Energy is uncentred and each mode loses its own part: the form of these ranks may lose the sum of the parts. At
    energy 1 the ranks are those of the unfoldings, up to the rounding of x. InputError outside 0 < energy <= 1.
    """
    if not 0 < energy <= 1:
        raise InputError("the energy to keep must be above 0 and at most 1", why=f"it is {energy}")
    rounding = torch.finfo(x.dtype).eps ** 2
    ranks = []
    for spectrum in spectra(x):
        tails = spectrum.flip(0).cumsum(0).flip(0)  # tails[r]: what rank r leaves out, summed from the smallest up
        noise = max(rounding, 4 * len(spectrum) * torch.finfo(spectrum.dtype).eps)
        ranks.append(1 + int((tails[1:] > tails[0] * (1 - energy + noise)).sum()))
    return tuple(ranks)


def _exact_gram(x: Tensor, mode: int) -> Tensor:
    """The same in the finest type, slice by slice along another mode: planning needs no second copy of a large x."""
    axis = max((other for other in range(x.ndim) if other != mode), key=lambda other: x.shape[other])
    step = max(1, _SLICE * x.shape[axis] // x.numel())
    parts = (gram_of(part.contiguous().to(finest(x.device)), mode) for part in x.split(step, axis))
    total = next(parts)
    for part in parts:
        total += part
    return total
