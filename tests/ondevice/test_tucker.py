"""Tucker forms: what they hold, what they lose, how bases are carried from step to step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from palmette.errors import InputError, TrainingError
from palmette.ondevice import tucker as tucker_module
from palmette.ondevice.spectra import ranks_for_energy, spectra
from palmette.ondevice.tucker import (
    Tucker,
    cheapest_order,
    clamp_ranks,
    dense,
    elements,
    hosvd,
    mode_product,
    subspace_iteration,
    svd,
    svd_hosvd,
)

SHAPES = [(6, 5), (9, 4, 7), (5, 8, 6, 4), (3, 4, 5, 4, 3), (1, 12, 2, 2), (40, 70, 5, 5), (4, 90, 40)]


def private(seed=0):
    return torch.Generator().manual_seed(seed)


def decaying(shape, *, seed=0, subspaces=99, dtype=torch.float64):
    """A tensor whose modes, all but the batch, keep their subspaces from seed to seed, with spectra like 1/n."""
    numbers, shared = private(seed), private(subspaces)
    x = torch.randn(shape, generator=numbers, dtype=torch.float64)
    for mode, size in enumerate(shape):
        source = numbers if mode == 0 else shared
        basis = torch.linalg.qr(torch.randn(size, size, generator=source, dtype=torch.float64))[0]
        x = mode_product(x, basis * (torch.arange(size) + 1.0) ** -1.0 @ basis.T, mode)
    return x.to(dtype)


def lost(x, kept):
    return float((x.double() - dense(kept).double()).square().sum() / x.double().square().sum())


def half(shape):
    return tuple(max(1, size // 2) for size in shape)


def orthonormal(factor):
    return torch.allclose(factor.T @ factor, torch.eye(factor.shape[1], dtype=factor.dtype), atol=1e-5)


def forms(x, ranks, **options):
    """Every way of compressing, by name."""
    yield "sequential", hosvd(x, ranks, **options)
    yield "published", hosvd(x, ranks, sequential=False, **options)
    yield "iterated", subspace_iteration(x, ranks, None, generator=private(), **options)[0]
    yield "asi", subspace_iteration(x, ranks, None, generator=private(), published=True, **options)[0]
    if not options:
        yield "svd", svd_hosvd(x, ranks)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_orthonormal_factors_and_the_numbers_held(shape, dtype):
    for ranks in (half(shape), tuple(1 for _ in shape), shape, (*half(shape)[:-1], 99), (1, *shape[1:])):
        kept = clamp_ranks(shape, ranks)
        for name, form in forms(decaying(shape, dtype=dtype), ranks):
            assert form.core.shape == kept, name
            for size, rank, factor in zip(shape, kept, form.factors, strict=True):
                assert (factor is None) == (rank == size), name
                assert factor is None or (factor.shape == (size, rank) and orthonormal(factor)), name
            held = [tensor for tensor in form.factors if tensor is not None] + [form.core]
            assert sum(tensor.numel() for tensor in held) == elements(shape, ranks), name
            assert {tensor.dtype for tensor in held} == {dtype}
            stored = sum(tensor.untyped_storage().nbytes() for tensor in held)
            assert stored == elements(shape, ranks) * dtype.itemsize, f"{name} keeps the storage of something larger"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_lost_is_bounded_by_the_discarded_energies(shape):
    x = decaying(shape)
    energies = spectra(x)
    for ranks in (half(shape), tuple(min(2, size) for size in shape)):
        whole = float(energies[0].sum())
        bound = sum(float(part[rank:].sum()) for part, rank in zip(energies, ranks, strict=True)) / whole
        for form in (hosvd(x, ranks), hosvd(x, ranks, sequential=False), svd_hosvd(x, ranks)):
            assert lost(x, form) <= bound + 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grams_in_the_published_order_are_the_svd(shape):
    x = decaying(shape)
    exact, found = svd_hosvd(x, half(shape)), hosvd(x, half(shape), sequential=False)
    assert torch.allclose(dense(exact), dense(found), atol=1e-8 * float(x.norm()))


@given(shape=st.lists(st.integers(1, 7), min_size=2, max_size=5), data=st.data())
def test_any_shape_at_any_ranks(shape, data):
    x = torch.randn(shape, generator=private(), dtype=torch.float64)
    ranks = [data.draw(st.integers(1, size + 1)) for size in shape]
    whole = x.square().sum()
    bound = sum(float(part[rank:].sum()) for part, rank in zip(spectra(x), ranks, strict=True)) / whole
    for name, form in forms(x, ranks):
        assert form.core.shape == clamp_ranks(shape, ranks)
        if name != "asi":
            assert lost(x, form) <= bound + 1e-12, name
        # The core is the projection of x, so that what is kept and what is lost share the energy.
        assert math.isclose(lost(x, form) + float(form.core.square().sum() / whole), 1, abs_tol=1e-9), name


def test_a_tensor_of_low_rank_is_kept_whole():
    core = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    x = core
    for mode, size in enumerate((12, 70, 9, 8)):
        x = mode_product(x, torch.randn(size, x.shape[mode], dtype=torch.float64), mode)
    assert ranks_for_energy(x, 1.0) == (2, 3, 2, 2)
    assert ranks_for_energy(x.float(), 1.0) == (2, 3, 2, 2)
    for name, form in forms(x, (2, 3, 2, 2)):
        assert lost(x, form) < 1e-20, name


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_spectra_are_squared_singular_values():
    x = torch.randn(4, 70, 3, dtype=torch.float64)
    for mode, spectrum in enumerate(spectra(x)):
        values = torch.linalg.svdvals(x.movedim(mode, 0).reshape(x.shape[mode], -1))
        assert torch.allclose(spectrum, values.square())


@pytest.mark.parametrize("energy", [0.4, 0.8, 0.9, 0.999, 1.0])
def test_ranks_are_the_smallest_that_reach_the_energy(energy):
    x = decaying((6, 9, 5))
    for rank, spectrum in zip(ranks_for_energy(x, energy), spectra(x), strict=True):
        share = spectrum.cumsum(0) / spectrum.sum()
        assert share[rank - 1] >= energy - 1e-12
        assert rank == 1 or share[rank - 2] < energy


def test_ranks_of_a_tensor_without_energy():
    assert ranks_for_energy(torch.zeros(3, 4, 5), 0.9) == (1, 1, 1)


def test_an_energy_that_falls_exactly_on_a_rank():
    x = torch.diag(torch.tensor([2.0, 1.0, 0.0]))
    assert ranks_for_energy(x, 0.8) == (1, 1)
    assert ranks_for_energy(x, 0.8001) == (2, 2)
    assert ranks_for_energy(x, 1) == (2, 2)


@pytest.mark.parametrize("energy", [0, -1, 1.01])
def test_energies_outside_are_refused(energy):
    with pytest.raises(InputError, match="energy"):
        ranks_for_energy(torch.ones(2, 2), energy)


def test_ranks_and_tensors_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="at least 1"):
        hosvd(torch.ones(2, 2), (0, 1))
    with pytest.raises(InputError, match="one rank for each mode"):
        elements((2, 3), (1,))
    for x in (torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(0, 2)):
        with pytest.raises(InputError, match="can be compressed"):
            hosvd(x, [1] * x.ndim)


# ---- subspace iteration ----------------------------------------------------------------------------------------------

WARM = ((16, 80, 9, 9), (6, 8, 4, 4))


@pytest.mark.parametrize("published", [False, True])
def test_passes_over_one_tensor_converge_to_the_exact_form(published):
    shape, ranks = WARM
    x = decaying(shape)
    exact = lost(x, hosvd(x, ranks, sequential=not published))
    bases = None
    losses = []
    for _ in range(40):
        form, bases = subspace_iteration(x, ranks, bases, generator=private(), published=published)
        losses.append(lost(x, form))
    assert losses[-1] <= exact * 1.005
    assert losses[0] >= losses[-1] - 1e-3


def test_warm_bases_lose_less_than_cold_ones_on_the_next_batch():
    shape, ranks = WARM
    bases = None
    for seed in range(8):
        bases = subspace_iteration(decaying(shape, seed=seed), ranks, bases, generator=private(), published=True)[1]
    x = decaying(shape, seed=20)
    warm = lost(x, subspace_iteration(x, ranks, bases, generator=private(), published=True)[0])
    cold = lost(x, subspace_iteration(x, ranks, None, generator=private(), published=True)[0])
    ours = None
    for seed in range(8):
        ours = subspace_iteration(decaying(shape, seed=seed), ranks, ours, generator=private())[1]
    best = lost(x, subspace_iteration(x, ranks, ours, generator=private())[0])
    assert best < warm < cold
    assert best < 1.05 * lost(x, hosvd(x, ranks))


def test_only_modes_that_are_worth_it_carry_a_basis_and_never_the_batch():
    shape, ranks = WARM
    bases = subspace_iteration(decaying(shape), ranks, None, generator=private())[1]
    assert [None if basis is None else tuple(basis.shape) for basis in bases] == [None, (80, 8), None, None]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("last", [3, 7])
def test_a_smaller_last_batch(published, last):
    shape, ranks = WARM
    bases = None
    for batch in (16, 16, last, 16):
        x = decaying((batch, *shape[1:]), seed=batch)
        form, bases = subspace_iteration(x, ranks, bases, generator=private(), published=published)
        assert form.core.shape == clamp_ranks(x.shape, ranks)
        assert lost(x, form) < 0.6


def test_bases_of_other_ranks_or_modes_start_afresh():
    x = decaying((40, 70, 6))
    bases = subspace_iteration(x, (3, 5, 2), None, generator=private())[1]
    assert bases[1].shape == (70, 5)
    assert subspace_iteration(x, (3, 6, 2), bases, generator=private())[1][1].shape == (70, 6)
    assert subspace_iteration(x, (3, 6, 2), bases[:2], generator=private())[1][1].shape == (70, 6)


def test_a_batch_that_is_not_finite_does_not_spoil_the_bases():
    x = decaying((40, 70, 80), dtype=torch.float32)
    bad = x.clone()
    bad[0, 0, 0] = torch.nan
    for published in (False, True):
        ranks = (40, 5, 4)  # the batch whole, so that no exact factor finds the NaN
        bases = subspace_iteration(x, ranks, None, generator=private(), published=published)[1]
        form, after = subspace_iteration(bad, ranks, bases, generator=private(), published=published)
        assert not torch.isfinite(form.core).all()
        assert all(torch.equal(one, two) for one, two in zip(bases[1:], after[1:], strict=True))
        first = subspace_iteration(bad, ranks, None, generator=private(), published=True)[1]
        assert all(basis is None or orthonormal(basis) for basis in first)


def test_passes_in_batched_and_in_flat_layout_agree():
    x = torch.randn(6, 70, 8, 8, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(70, 5, dtype=torch.float64))[0]
    flat = x.movedim(1, 0).reshape(70, -1)
    columns = torch.linalg.qr(flat @ (flat.T @ basis))[0]
    assert torch.allclose(tucker_module._one_pass(x, 1, basis), columns, atol=1e-9)


# ---- large modes -----------------------------------------------------------------------------------------------------


def test_a_large_mode_is_searched_when_both_sides_are_long(monkeypatch):
    monkeypatch.setattr(tucker_module, "_LARGE", 20)
    x = decaying((6, 60, 50))
    for sequential in (True, False):
        searched = lost(x, hosvd(x, (4, 5, 6), sequential=sequential))
        assert searched <= 1.001 * lost(x, svd_hosvd(x, (4, 5, 6)))
    kept = hosvd(x, (4, 58, 6))
    assert orthonormal(kept.factors[1])


def test_a_search_for_more_directions_than_there_are():
    flat = torch.randn(30, 4, dtype=torch.float64)
    found = tucker_module._searched(flat, 6, private())
    assert orthonormal(found)
    assert torch.allclose(found @ (found.T @ flat), flat)


def test_the_smaller_side_of_a_tall_mode():
    x = torch.randn(2, 500, 3, dtype=torch.float64)
    exact, found = svd_hosvd(x, (2, 4, 3)), hosvd(x, (2, 4, 3))
    assert torch.allclose(dense(exact), dense(found), atol=1e-9)


# ---- the matrix form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5, 4, 4), (30, 7), (4, 300)], ids=str)
def test_svd_is_the_best_of_its_rank(shape):
    x = decaying(shape)
    for rank in (1, 3, 99):
        left, right = svd(x, rank)
        matrix = x.reshape(shape[0], -1)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        kept = min(rank, *matrix.shape)
        assert left.shape == (shape[0], kept)
        assert right.shape == (kept, matrix.shape[1])
        assert torch.allclose(left @ right, u[:, :kept] * s[:kept] @ v[:kept], atol=1e-8)
        assert torch.allclose(left.norm(dim=0), s[:kept], atol=1e-8)
        assert torch.allclose(right @ right.T, torch.eye(kept, dtype=x.dtype), atol=1e-6)


def test_svd_of_zeros_is_finite():
    left, right = svd(torch.zeros(3, 4), 2)
    assert not (left @ right).any()


# ---- how it is computed ----------------------------------------------------------------------------------------------


def test_deterministic_and_no_global_random_number():
    x = decaying((8, 70, 6, 6), dtype=torch.float32).requires_grad_()
    before = torch.get_rng_state()
    first, second = (dict(forms(x, (3, 4, 3, 3))) for _ in range(2))
    svd(x, 3)
    ranks_for_energy(x, 0.9)
    assert torch.equal(before, torch.get_rng_state())
    for name, form in first.items():
        again = second[name]
        assert torch.equal(form.core, again.core), name
        assert not form.core.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(form.factors, again.factors, strict=True)), name
    assert not hosvd(x, x.shape).core.requires_grad
    assert not dense(Tucker(x, (None,) * 4)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32_and_stored_as_asked(dtype):
    x = decaying((8, 20, 6, 6)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {form.core.dtype for _, form in forms(x, (3, 4, 3, 3))} == {torch.float32}
        assert lost(x, hosvd(x, (3, 4, 3, 3))) == lost(x, hosvd(x.float(), (3, 4, 3, 3)))
        for _, form in forms(x, (3, 4, 3, 3), dtype=dtype):
            assert {form.core.dtype, *(factor.dtype for factor in form.factors)} == {dtype}
        assert [part.dtype for part in svd(x, 2, dtype=dtype)] == [dtype, dtype]


def test_any_memory_format():
    x = decaying((8, 20, 6, 6))
    for name, form in forms(x.to(memory_format=torch.channels_last), (3, 4, 3, 3)):
        assert torch.allclose(dense(form), dense(dict(forms(x, (3, 4, 3, 3)))[name]), atol=1e-12), name


def test_shapes_without_data():
    with FakeTensorMode():
        x = torch.empty(8, 80, 9, 2000)
        for _, form in forms(x, (4, 5, 6, 7)):
            assert form.core.shape == (4, 5, 6, 7)
        form, bases = subspace_iteration(x, (4, 5, 6, 7), None, generator=private())
        assert subspace_iteration(x, (4, 5, 6, 7), bases, generator=private())[0].core.shape == form.core.shape
        assert [part.shape for part in svd(x, 3)] == [(8, 3), (3, 80 * 9 * 2000)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(bad):
    x = torch.randn(8, 6, 5)
    x[1, 2, 3] = bad
    for compress in (
        lambda: hosvd(x, (3, 3, 3)),
        lambda: svd_hosvd(x, (3, 3, 3)),
        lambda: subspace_iteration(x, (3, 3, 3), None, generator=private())[0],
        lambda: svd(x, 2),
    ):
        try:
            found = compress()
        except TrainingError as error:
            assert "cannot be decomposed" in str(error)  # noqa: PT017 - LAPACK does not always notice
        else:
            assert not torch.isfinite(found[0]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_no_rank_is_chosen_for_values_that_are_not_finite(bad):
    x = torch.randn(8, 60, 50, dtype=torch.float64)
    x[1, 2, 3] = bad
    with pytest.raises(TrainingError, match="cannot be decomposed"):
        ranks_for_energy(x, 0.9)
    with pytest.raises(TrainingError, match="cannot be decomposed"):
        hosvd(torch.full((4, 3), math.nan), (2, 2))


@given(data=st.data())
def test_the_order_is_the_cheapest(data):
    sizes = data.draw(st.lists(st.tuples(st.integers(2, 9), st.integers(1, 9)), min_size=0, max_size=4))
    steps = tuple((before, after, before + after) for before, after in sizes)
    numel = math.prod(before for before, _ in sizes) * 3
    cost, order = cheapest_order(numel, steps)
    held, total = numel, 0
    for step in order:
        before, after, each = steps[step]
        total += held * each
        held = held // before * after
    assert total == cost
    assert sorted(order) == list(range(len(steps)))
