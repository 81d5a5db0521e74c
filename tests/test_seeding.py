"""Random states: derived from names, put aside and brought back."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from palmette.seeding import derive_seed, generators, global_state, preserved, restore_globals, seed_loader, seeded


def draw() -> tuple:
    uniform = (random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()))  # noqa: NPY002
    return *uniform, *torch.rand(3).tolist()


def test_seeds_depend_on_every_part_and_their_order():
    seeds = {derive_seed(*parts) for parts in [(0, "a"), (0, "b"), (1, "a"), ("a", 0), (0, "a", 0), (0, "a0")]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a") == derive_seed(0, "a") == 787122455340873193  # as in any run made before


def test_states_come_back_with_their_spare_gaussians():
    random.gauss(0, 1)  # leaves a spare value behind, which is part of the state
    np.random.randn()  # noqa: NPY002
    state = global_state()
    first = draw()
    draw()
    restore_globals(state)
    assert draw() == first


def test_a_seeded_block_repeats_and_leaves_no_trace():
    before = global_state()
    with seeded(3, "stage"):
        inside = draw()
    untouched = draw()
    with seeded(3, "stage"):
        assert draw() == inside
    with seeded(3, "other"):
        assert draw() != inside
    restore_globals(before)
    assert draw() == untouched


def loader_of_all_kinds() -> DataLoader:
    dataset = TensorDataset(torch.arange(20.0))
    dataset.numpy = np.random.default_rng(0)
    dataset.legacy = np.random.RandomState(0)
    dataset.python = random.Random(0)
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
    return DataLoader(dataset, batch_size=5, sampler=sampler, generator=torch.Generator())


def order(loader: DataLoader) -> list:
    extras = [loader.dataset.numpy.random(), loader.dataset.legacy.rand(), loader.dataset.python.random()]
    return [batch[0].tolist() for batch in loader] + extras


def test_every_generator_of_a_loader_is_found_and_seeded():
    loader = loader_of_all_kinds()
    assert len(generators(loader)) == 5
    seed_loader(loader, 4)
    first = order(loader)
    assert order(loader) != first
    seed_loader(loader, 4)
    assert order(loader) == first
    seed_loader(loader, 5)
    other = order(loader)
    assert all(a != b for a, b in zip(first[-3:], other[-3:], strict=True))


def test_a_loader_s_own_generators_are_put_back():
    loader, twin = loader_of_all_kinds(), loader_of_all_kinds()
    with preserved(loader):
        seed_loader(loader, 9)
        order(loader)
    assert order(loader) == order(twin)


def test_samplers_hear_of_the_epoch():
    class Sampler:
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter(range(2))

        def __len__(self):
            return 2

    loader = DataLoader(TensorDataset(torch.zeros(2)), sampler=Sampler())
    seed_loader(loader, 0, epoch=6)
    assert loader.sampler.epoch == 6


def test_samples_dealt_out_to_processes_come_in_an_order_of_the_seed():
    data = TensorDataset(torch.arange(12))

    def order(rank: int, seed: int) -> list[int]:
        sampler = DistributedSampler(data, num_replicas=2, rank=rank)
        loader = DataLoader(data, batch_size=3, sampler=sampler)
        seed_loader(loader, seed, epoch=1)
        return [value for (batch,) in loader for value in batch.tolist()]

    assert order(0, 7) == order(0, 7) != order(0, 8)
    assert sorted(order(0, 7) + order(1, 7)) == list(range(12))
