"""Entropy against a twin that counts one number at a time, over every setting of the switches."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from palmette.depth import entropy
from palmette.depth.entropy import (
    EntropyRule,
    MaskTap,
    Scratch,
    StateCounter,
    binary_entropy,
    count_states,
    mean_abs_weight,
)
from palmette.errors import DataError

RULES = [
    EntropyRule(zeros=zeros, neurons=neurons, aggregation=aggregation, position_first=first)
    for zeros, neurons, aggregation, first in product(
        ("on", "off", "exclude"), ("all", "lively"), ("global", "batch"), (True, False)
    )
]


def _h(on: int, off: int) -> float:
    if on == 0 or off == 0:
        return 0.0
    p = on / (on + off)
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def _twin(batches: list[Tensor], rule: EntropyRule) -> float:
    """Brute force for [samples, channels, positions]: plain loops, plain numbers."""
    if rule.aggregation == "batch":
        once = EntropyRule(zeros=rule.zeros, neurons=rule.neurons, position_first=rule.position_first)
        return sum(_twin([batch], once) for batch in batches) / len(batches)
    counts: dict[tuple[int, int, int], list[int]] = {}
    for batch in batches:
        samples, channels, positions = batch.shape
        for n, c, p in product(range(samples), range(channels), range(positions)):
            key = (c, -1, -1) if rule.position_first else (c, p, positions)
            state = counts.setdefault(key, [0, 0])
            z = float(batch[n, c, p])
            if z > 0 or (z == 0 and rule.zeros == "on"):
                state[0] += 1
            elif z < 0 or rule.zeros == "off":
                state[1] += 1
    entropies = [_h(*state) for state in counts.values()]
    if rule.neurons == "lively":
        entropies = [h for h in entropies if h > 0]
    return sum(entropies) / len(entropies) if entropies else 0.0


def _batches() -> st.SearchStrategy[list[Tensor]]:
    """One to three batches of equal channels, of several sizes and resolutions, with many exact zeros."""

    def build(channels: int, shapes: list[tuple[int, int]], seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(-1, 2, (n, channels, p), generator=generator).float() for n, p in shapes]

    sizes = st.tuples(st.integers(1, 5), st.integers(1, 4))
    return st.builds(build, st.integers(1, 4), st.lists(sizes, min_size=1, max_size=3), st.integers(0, 2**31))


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=25, deadline=None)
@given(batches=_batches())
def test_every_switch_equals_brute_force(rule: EntropyRule, batches: list[Tensor]) -> None:
    counter = StateCounter(rule, channel_axis=1)
    for batch in batches:
        counter.add(batch)
    assert counter.entropy() == pytest.approx(_twin(batches, rule), abs=1e-12)


def test_the_channel_axis_may_be_the_last_one() -> None:
    z = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(count_states(z, 1), count_states(z.movedim(1, -1), -1))
    maps = z.unflatten(2, (7, 1))
    assert torch.equal(count_states(z, 1), count_states(maps.permute(0, 2, 3, 1), 3))


def test_vectors_have_one_position() -> None:
    assert count_states(torch.tensor([[1.0, -1.0], [0.0, -2.0]]), 1).tolist() == [[[1], [0]], [[0], [2]], [[1], [0]]]


def test_position_first_averaging_sees_what_per_position_entropy_does_not() -> None:
    z = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]]).repeat(8, 1, 1)
    values = {}
    for first in (True, False):
        counter = StateCounter(EntropyRule(position_first=first), 1)
        counter.add(z)
        values[first] = counter.entropy()
    assert values == {True: 1.0, False: 0.0}


def test_global_counts_do_not_depend_on_how_the_set_is_cut() -> None:
    z = torch.randn(24, 5, 3, generator=torch.Generator().manual_seed(2))
    found = set()
    for size in (1, 5, 24):
        counter = StateCounter(EntropyRule(), 1)
        for part in z.split(size):
            counter.add(part)
        found.add(counter.entropy())
    assert len(found) == 1


def test_padded_tokens_are_not_counted() -> None:
    z = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    tap = MaskTap([({"attention_mask": mask}, torch.zeros(4))])
    next(iter(tap))
    masked, cut = StateCounter(EntropyRule(), 2), StateCounter(EntropyRule(), 2)
    masked.add(z, tap.for_tokens(z, 2))
    cut.add(z[:, :4])
    assert masked.entropy() == cut.entropy()


def test_binary_entropy_at_its_ends_and_middle() -> None:
    assert binary_entropy(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() == [0.0, 1.0, 0.0]


def test_mean_abs_weight_looks_at_surviving_weights_only() -> None:
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    assert mean_abs_weight(layer) == 0.0
    with torch.no_grad():
        layer.weight[0, 0], layer.weight[1, 1] = -3.0, 1.0
    assert mean_abs_weight(layer) == 2.0


@pytest.mark.parametrize("aggregation", ["global", "batch"])
def test_nothing_seen_is_an_error(aggregation: str) -> None:
    with pytest.raises(DataError, match="no batch reached"):
        StateCounter(EntropyRule(aggregation=aggregation), 1).entropy()  # type: ignore[arg-type]


def test_a_pre_activation_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(DataError, match="not finite"):
        StateCounter(EntropyRule(), 1).add(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_counts_do_not_depend_on_the_precision(dtype: torch.dtype) -> None:
    z = torch.randint(-2, 3, (600, 3, 40), generator=torch.Generator().manual_seed(4)).float()
    for per_position in (True, False):
        found = count_states(z.to(dtype), 1, per_position=per_position)
        assert torch.equal(found, count_states(z, 1, per_position=per_position))
        assert found.dtype == torch.int64
        assert bool((found.sum(0) == (600 if per_position else 600 * 40)).all())


def test_memory_used_again_holds_nothing_of_the_layer_before() -> None:
    scratch, generator = Scratch(), torch.Generator().manual_seed(5)
    for shape in ((4, 3, 6), (2, 3, 5), (8, 7, 9), (3, 2)):
        z = torch.randn(shape, generator=generator)
        assert torch.equal(count_states(z, 1, scratch=scratch), count_states(z, 1))
    z = torch.randn(4, 6, 3, generator=generator).transpose(1, 2)
    assert torch.equal(count_states(z, 1, scratch=scratch), count_states(z.contiguous(), 1))


def test_the_sum_over_positions_may_come_first() -> None:
    z = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(6))
    mask = torch.arange(6)[None] < torch.tensor([6, 1, 4, 2, 3])[:, None]
    for tokens in (None, mask):
        counts = count_states(z, 2, tokens)
        assert torch.equal(counts.sum(2, keepdim=True), count_states(z, 2, tokens, per_position=False))


def test_large_values_are_finite_though_their_sum_is_not() -> None:
    counter = StateCounter(EntropyRule(), 1)
    counter.add(torch.full((3, 1000), 3e38))
    assert counter.entropy() == 0.0
    with pytest.raises(DataError, match="not finite"):
        counter.add(torch.tensor([[1.0, -math.inf, math.inf]]))


@pytest.mark.parametrize("tokens", [False, True])
def test_large_batches_are_counted_in_parts(tokens: bool) -> None:
    z = torch.randint(-1, 2, (70, 500, 18), generator=torch.Generator().manual_seed(8)).float()
    mask = torch.rand(70, 500, generator=torch.Generator().manual_seed(9)) < 0.7 if tokens else None
    assert z.numel() > 2 * entropy._IN_CACHE
    for per_position in (True, False):
        parts = [
            count_states(part, 2, None if mask is None else mask[i : i + 1], per_position=per_position)
            for i, part in enumerate(z.split(1))
        ]
        assert torch.equal(count_states(z, 2, mask, per_position=per_position), torch.stack(parts).sum(0))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_counts_of_several_processes_add_up(rule: EntropyRule) -> None:
    generator = torch.Generator().manual_seed(7)
    batches = [torch.randn(n, 3, p, generator=generator) for n, p in ((4, 5), (3, 2), (6, 5), (2, 2))]
    whole, halves = StateCounter(rule, 1), [StateCounter(rule, 1), StateCounter(rule, 1)]
    for index, batch in enumerate(batches):
        whole.add(batch)
        halves[index % 2].add(batch)
    parts = [half.totals() for half in halves]
    names = {name for part in parts for name in part}
    halves[0].take({name: sum(part[name] for part in parts if name in part) for name in names})
    assert halves[0].entropy() == pytest.approx(whole.entropy(), abs=1e-12)
