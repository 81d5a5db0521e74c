"""The best configuration of a supernet within a device's bounds, exactly, when the value of choices adds up.

What is alive at a step is linear in the code of a configuration, so "the peak is within the budget" is one linear
constraint for each step; parameters, and what a training step holds, are products of choices, which a binary variable
for each product makes linear. The rest is an integer program, solved to optimality by HiGHS through scipy.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palmette import compat
from palmette.device import parse_latency
from palmette.supernet.codes import Floats, Ints
from palmette.supernet.memory import MemoryModel
from palmette.supernet.moments import Product
from palmette.supernet.resolution import RESOLUTION

SLACK = 0.5
"""Bytes are whole numbers: half a byte keeps rounding inside the solver from deciding."""


@dataclass(frozen=True)
class Optimum:
    """The configuration of the largest value within the bounds, and that value."""

    config: dict[str, int]
    value: float


class Optimizer:
    """Solves for the best configuration under the bounds of a memory model's profile, each resolution on its own.

    Raises MissingDependency without scipy.
    """

    def __init__(self, memory: MemoryModel) -> None:
        self.memory, self.codes = memory, memory.codes
        self._scipy: Any = compat.optional("scipy.optimize", package="palmette[search]")
        self._sparse: Any = compat.optional("scipy.sparse", package="palmette[search]")
        self._bounds = [self._bounded(place) for place in range(len(memory.resolutions))]

    def best(
        self, weights: Floats, *, excluded: Ints | None = None, gap: float = 0.0, seconds: float | None = None
    ) -> Optimum | None:
        """The configuration whose code has the largest product with `weights`; None if none keeps the bounds.

        weights: [codes.width]; what a choice that does not matter in a configuration weighs is left out. excluded:
        codes [n, choices] that must not be the answer. gap: the share of the value by which the answer may miss the
        best; seconds: for each resolution, after which the best that is known is taken, or None.
        """
        found = []
        for bounds in self._bounds:
            program = bounds.copy()
            for code in () if excluded is None else excluded:
                columns = self._said(code)
                program.at_most({(column,): 1.0 for column in columns}, len(columns) - 1)
            options = {"mip_rel_gap": gap} | ({} if seconds is None else {"time_limit": seconds})
            found.append(program.maximum(self._objective(weights), self._scipy, self._sparse, options))
        answers = [answer for answer in found if answer is not None]
        if not answers:
            return None
        onehot, value = max(answers, key=lambda answer: answer[1])
        code = np.array([int(onehot[span].argmax()) for span in self.codes.spans])
        return Optimum(self.memory.net.space.canonical(self.codes.decode(code)), value)

    def _bounded(self, place: int) -> _Program:
        """One value for every choice, that number of the resolutions, within the profile's bounds."""
        program = _Program(self.codes.spans)
        for span in self.codes.spans:
            program.equal({(column,): 1.0 for column in span}, 1.0)
        if RESOLUTION in self.codes.first:
            program.equal({(self.codes.first[RESOLUTION] + place,): 1.0}, 1.0)
        self._bound_ram(program, place)
        self._bound_flash(program)
        self._bound_latency(program)
        return program

    def _said(self, code: Ints) -> list[int]:
        """The columns that tell a configuration from others: what does not matter in it may have any value."""
        space, config = self.memory.net.space, self.codes.decode(code)
        pairs = zip(self.codes.choices, code, strict=True)
        return [self.codes.first[c.name] + int(i) for c, i in pairs if space.active(config, c)]

    def _objective(self, weights: Floats) -> dict[Product, float]:
        """The value as a sum of products: a choice that hangs on a depth counts where its block is there."""
        terms: dict[Product, float] = {(): float(weights[0])}
        for choice in self.codes.choices:
            first = self.codes.first[choice.name]
            for i in range(len(choice.values)):
                if choice.owner is None:
                    _add(terms, (first + i,), float(weights[first + i]))
                    continue
                depth = self.memory.net.space[choice.owner[0]]
                for j, blocks in enumerate(depth.values):
                    if blocks >= choice.owner[1]:
                        pair = tuple(sorted((first + i, self.codes.first[depth.name] + j)))
                        _add(terms, pair, float(weights[first + i]))
        return terms

    def _bound_ram(self, program: _Program, place: int) -> None:
        profile = self.memory.profile
        if profile.ram_bytes is None:
            return
        room = profile.ram_bytes - profile.reserve_bytes + SLACK
        held = None if profile.weights_in == "flash" else program.quantity(self.memory.weights.terms())
        for row in self.memory.rows(place):
            terms = dict(row.terms)
            for column in np.flatnonzero(row.gone):  # a step that does not run binds nothing
                _add(terms, (int(column),), -float(row.gone[column]) * row.most)
            if held is not None:
                terms[held] = 1.0
            if row.most > room or held is not None:
                program.at_most(terms, room)

    def _bound_flash(self, program: _Program) -> None:
        if self.memory.profile.flash_bytes is not None:
            program.at_most(self.memory.weights.terms(), self.memory.profile.flash_bytes + SLACK)

    def _bound_latency(self, program: _Program) -> None:
        bound, table = self.memory.profile.latency_ms, self.memory.latency
        if bound is None or table is None:
            return
        terms = self._objective(table.vector(self.codes))
        weights = self.memory.weights
        for rate, work in ((table.ms_per_mac, weights.mac_terms), (table.ms_per_byte, weights.float_terms)):
            for product, amount in work().items() if rate else ():
                _add(terms, product, rate * amount)
        whole = parse_latency(bound)  # the solver's tolerance is one of rows near 1
        program.at_most({product: amount / whole for product, amount in terms.items()}, 1.0)


class _Program:
    """Constraints over binary columns and their products.

    `spans`: the columns of each choice, of which exactly one is 1. The products of one value each of some choices come
    as a family: summed over one choice they are the product of the others. With that the relaxation is nearly exact,
    and products need not be declared integral.
    """

    def __init__(self, spans: Sequence[range]) -> None:
        self.width = 1 + sum(len(span) for span in spans)
        self.spans = spans
        self.choice = {column: number for number, span in enumerate(spans) for column in span}
        self.products: dict[Product, int] = {}
        self.most: dict[int, float] = {}
        self.rows: list[tuple[dict[int, float], float, float]] = []

    def copy(self) -> _Program:
        """The same constraints, to which others can be added."""
        other = _Program(self.spans)
        other.products, other.rows, other.most = dict(self.products), list(self.rows), dict(self.most)
        return other

    def equal(self, terms: Mapping[Product, float], total: float) -> None:
        """The sum of the terms is `total`."""
        self._row(terms, total, total)

    def at_most(self, terms: Mapping[Product, float], bound: float) -> None:
        """The sum of the terms is at most `bound`."""
        self._row(terms, -np.inf, bound)

    def quantity(self, terms: Mapping[Product, float]) -> Product:
        """A product that stands for a sum of terms that is not negative, so that many rows can hold it."""
        product = (-1 - len(self.most),)
        column = self.products[product] = self.width + len(self.products)
        self.most[column] = sum(max(0.0, amount) for amount in terms.values())
        self._row({**terms, product: -1.0}, 0.0, 0.0)
        return product

    def _row(self, terms: Mapping[Product, float], low: float, high: float) -> None:
        constant = terms.get((), 0.0)
        self.rows.append((self._columns(terms), low - constant, high - constant))

    def _columns(self, terms: Mapping[Product, float]) -> dict[int, float]:
        """The terms by column; two values of one choice have a product of zero."""
        return {
            self._column(product): amount
            for product, amount in terms.items()
            if product and amount and len({self.choice.get(c) for c in product}) == len(product)
        }

    def _column(self, product: Product) -> int:
        if product not in self.products:
            if len(product) == 1:
                return product[0]
            self._family([self.choice[column] for column in product])
        return self.products[product]

    def _family(self, choices: Sequence[int]) -> None:
        """The columns of all products of one value each of some choices, ascending, and what they sum up to."""
        span = self.spans[choices[-1]]
        heads = list(itertools.product(*(self.spans[choice] for choice in choices[:-1])))
        wholes = [self._column(head) for head in heads]
        for head in heads:
            for column in span:
                self.products[*head, column] = self.width + len(self.products)
        for head, whole in zip(heads, wholes, strict=True):
            self.rows.append(({whole: -1.0, **{self.products[*head, c]: 1.0 for c in span}}, 0.0, 0.0))
        for column in span:
            self.rows.append(({column: -1.0, **{self.products[*head, column]: 1.0 for head in heads}}, 0.0, 0.0))

    def maximum(
        self, terms: Mapping[Product, float], scipy: Any, sparse: Any, options: dict[str, float]
    ) -> tuple[Floats, float] | None:
        """The columns [width] of a maximum and its value, None if no columns keep the constraints."""
        value = self._columns(terms)
        width = self.width + len(self.products)
        entries = [(i, c, a) for i, (row, _, _) in enumerate(self.rows) for c, a in row.items()]
        i, c, a = zip(*entries, strict=True)
        matrix = sparse.csr_matrix((a, (i, c)), shape=(len(self.rows), width))
        objective = np.zeros(width)
        objective[list(value)] = [-amount for amount in value.values()]
        largest, integral = np.ones(width), np.zeros(width)
        largest[list(self.most)], integral[: self.width] = list(self.most.values()), 1
        low, high = (np.array([row[k] for row in self.rows]) for k in (1, 2))
        found = scipy.milp(
            objective,
            constraints=scipy.LinearConstraint(matrix, low, high),
            bounds=scipy.Bounds(0, largest),
            integrality=integral,
            options=options,
        )
        if found.x is None:
            return None
        return np.round(found.x[: self.width]), float(-found.fun + terms.get((), 0.0))


def _add(terms: dict[Product, float], product: Product, amount: float) -> None:
    terms[product] = terms.get(product, 0.0) + amount
