"""The knapsack against brute force, and what a user relies on: a tighter target never gives a slower plan."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palmette.depth.knapsack import Item, front, least_loss
from palmette.errors import InputError


@st.composite
def _items(draw, most=9):
    found = []
    for index in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, 8))
        end = start + draw(st.integers(1, 4))
        gain, loss = draw(st.integers(-2, 9)), draw(st.integers(-2, 40)) / 8
        found.append(Item(key=f"i{index}", start=start, end=end, gain=gain, loss=loss))
    return found


def _brute(items, gain):
    """Least loss of all disjoint subsets that save at least `gain`, None when there is none."""
    best = None
    for size in range(len(items) + 1):
        for subset in itertools.combinations(items, size):
            ordered = sorted(subset, key=lambda i: i.start)
            if any(a.end > b.start for a, b in itertools.pairwise(ordered)) or sum(i.gain for i in subset) < gain:
                continue
            loss = sum(i.loss for i in subset)
            best = loss if best is None else min(best, loss)
    return best


@given(_items(), st.integers(0, 30))
def test_equals_brute_force(items, gain) -> None:
    pick = least_loss(front(items), gain)
    best = _brute(items, gain)
    assert (pick is None) == (best is None)
    if pick is not None:
        assert pick.loss == pytest.approx(best, abs=1e-12)


@given(_items())
def test_every_pick_is_a_disjoint_set_with_its_sums(items) -> None:
    by_key = {i.key: i for i in items}
    for pick in front(items):
        chosen = [by_key[k] for k in pick.keys]
        assert len(set(pick.keys)) == len(chosen)
        assert all(a.end <= b.start for a, b in itertools.pairwise(chosen))
        assert pick.gain == sum(i.gain for i in chosen)
        assert pick.loss == pytest.approx(sum(i.loss for i in chosen), abs=1e-12)


@given(_items(), st.integers(0, 30), st.integers(0, 30))
def test_a_tighter_target_is_never_slower(items, one, other) -> None:
    found = front(items)
    loose, tight = least_loss(found, min(one, other)), least_loss(found, max(one, other))
    if tight is not None:
        assert loose is not None
        assert (loose.gain, loose.loss) <= (tight.gain, tight.loss)
        assert loose.loss <= tight.loss


def test_the_front_rises_in_both() -> None:
    items = [Item(key=str(i), start=i, end=i + 1, gain=i % 4 + 1, loss=(i * 7 % 5 + 1) / 4) for i in range(12)]
    found = front(items)
    assert found[0].keys == ()
    assert all(a.gain < b.gain and a.loss < b.loss for a, b in itertools.pairwise(found))
    assert found[-1].gain == sum(i.gain for i in items)


def test_a_hundred_items_take_a_moment() -> None:
    items = [
        Item(key=f"{i}-{k}", start=3 * i, end=3 * i + 3 * k, gain=17 * k + i % 5, loss=k * (1 + i % 7) / 3)
        for i in range(40)
        for k in (1, 2, 3)
    ]
    assert len(front(items)) > 40


def test_an_empty_reach_is_refused() -> None:
    with pytest.raises(InputError, match="changes nothing"):
        front([Item(key="a", start=2, end=2, gain=1, loss=0.0)])
