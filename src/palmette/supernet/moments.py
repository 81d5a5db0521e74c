"""Bytes that are alive at the moments of a training step, as sums of products of shares that a code keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from palmette.supernet.codes import Floats
from palmette.supernet.train_trace import Birth
from palmette.supernet.weights import times

Product = tuple[int, ...]
"""Columns of a one-hot code whose product is meant, ascending; () is the number one."""


class Row(NamedTuple):
    """Bytes at one moment as a sum of products of columns of a one-hot code; gone [width]: 1 where it does not come.

    most: at least what any code needs there.
    """

    terms: dict[Product, float]
    gone: Floats
    most: float


class Shares:
    """Numbers for vectors [width] that times a code are the share of something that is kept, each vector once."""

    def __init__(self, largest: Floats) -> None:
        """`largest`: the one-hot code that keeps all."""
        self._largest = largest
        self._numbers: dict[bytes, int] = {}
        self.vectors: list[Floats] = []

    def number(self, vector: Floats) -> tuple[int, ...]:
        """The number of a vector, up to a factor; () if it is the same for all codes."""
        if not vector[1:].any():
            return ()
        share = vector / (float(vector @ self._largest) or 1.0)
        key = np.round(share, 12).tobytes()
        if key not in self._numbers:
            self._numbers[key] = len(self.vectors)
            self.vectors.append(share)
        return (self._numbers[key],)

    def form(self, vectors: Sequence[Floats]) -> tuple[int, ...]:
        """The product of vectors, by their numbers."""
        return tuple(sorted(number for vector in vectors for number in self.number(vector)))

    def values(self, form: tuple[int, ...], onehot: Floats) -> Floats:
        """The product [n] for codes [n, width]."""
        product = np.ones(len(onehot))
        for number in form:
            product *= onehot @ self.vectors[number]
        return product


@dataclass(frozen=True)
class Moments:
    """What a code needs at the moments of a training step that may be its peak.

    Shapes: shares [width, vectors]; forms: the products of them that occur; bytes [moments, forms], of a code that
    keeps all; gone [groups, width]: 1 where the moments of a group do not come; group [moments]. names: of the moments.
    """

    shares: Floats
    forms: tuple[tuple[int, ...], ...]
    bytes: Floats
    gone: Floats
    group: np.ndarray[tuple[int], np.dtype[np.int64]]
    names: tuple[str, ...]

    def live(self, onehot: Floats) -> Floats:
        """Bytes alive [n, moments] of one-hot codes [n, width]; -1 where the moment does not come."""
        shares = onehot @ self.shares
        kept = np.ones((len(onehot), len(self.forms)))
        for place, form in enumerate(self.forms):
            for number in form:
                kept[:, place] *= shares[:, number]
        away = (onehot @ self.gone.T > 0)[:, self.group]
        return np.where(away, -1.0, np.rint(kept @ self.bytes.T))

    def rows(self) -> Iterator[Row]:
        """Each moment as a sum of products."""
        one = np.zeros(len(self.shares))
        one[0] = 1.0
        products: list[dict[Product, float]] = []
        for form in self.forms:
            product: dict[Product, float] = {(): 1.0}
            for vector in (one, *(self.shares[:, number] for number in form)):
                product = times(product, vector)
            products.append(product)
        for amounts, group in zip(self.bytes, self.group, strict=True):
            terms: dict[Product, float] = {}
            for place in np.flatnonzero(amounts):
                for columns, share in products[place].items():
                    terms[columns] = terms.get(columns, 0.0) + float(amounts[place]) * share
            yield Row(terms, self.gone[group], float(amounts.clip(min=0.0).sum()))


def assembled(
    shares: Shares,
    births: Sequence[Birth],
    forms: Sequence[tuple[int, ...]],
    alive: Floats,
    gone: Floats,
    names: Sequence[str],
    scale: float,
    known: tuple[Floats, Floats],
) -> Moments:
    """The tables of storages whose bytes follow `forms` and that are alive [moments, storages].

    gone [moments, width]. scale: bytes of an element on the device over those of the trace. known: one-hot codes and
    their peaks as they were traced; where the tables said less, all of them would say so much more.
    """
    places = {form: place for place, form in enumerate(dict.fromkeys(((), *forms)))}
    spread = {floating: np.zeros((len(births), len(places))) for floating in (False, True)}
    for number, (birth, form) in enumerate(zip(births, forms, strict=True)):
        spread[birth.floating][number, places[form]] = birth.bytes
    integers, floats = (alive @ spread[floating] for floating in (False, True))
    groups, group = np.unique(gone, axis=0, return_inverse=True)
    vectors = np.stack(shares.vectors, axis=1) if shares.vectors else np.zeros((gone.shape[1], 0))

    def made(amounts: Floats, kept: Sequence[int]) -> Moments:
        which = np.asarray(group.reshape(-1)[kept], dtype=np.int64)
        return Moments(vectors, tuple(places), amounts[kept], groups, which, tuple(names[k] for k in kept))

    said = made(integers + floats, range(len(names))).live(known[0]).max(1)
    floats[:, 0] += max(0.0, float((known[1] - said).max()))
    amounts = integers + scale * floats
    return made(amounts, highest(amounts, gone))


def highest(amounts: Floats, gone: Floats, slack: float = 0.0) -> list[int]:
    """The rows of amounts [rows, terms] that no other, which comes whenever they do, reaches in every term, ascending.

    gone [rows, width]: 1 where a row does not come. slack: by how much another may miss a term and still reach it.
    """
    kept: list[int] = []
    for moment in np.argsort(-amounts.sum(1), kind="stable"):
        above = (amounts[kept] + slack >= amounts[moment]).all(1) & (gone[kept] <= gone[moment]).all(1)
        if not above.any():
            kept.append(int(moment))
    return sorted(kept)
