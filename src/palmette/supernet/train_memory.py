"""What a training step of every configuration needs, from tables: forward, loss, backward, gradients until the step.

One step of the largest network is followed, storage by storage. What a storage takes in another configuration is a
share of its bytes: that of the channels, heads and blocks that are kept, for the gradient of a weight a product of such
shares. Which share it is shows in a few further steps, of networks in which no two choices go together; where none
fits, the storage counts whole. A block that is left out takes its storages along, and its input stands in for its
output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from weakref import WeakKeyDictionary

import numpy as np
from torch import fx

from palmette.supernet.codes import Codes, Floats, Ints
from palmette.supernet.moments import Moments, Shares, assembled
from palmette.supernet.resolution import RESOLUTION
from palmette.supernet.space import Config, key_of
from palmette.supernet.supernet import Supernet
from palmette.supernet.train_trace import Birth, StepTrace, parameters_in, trace_step
from palmette.supernet.weights import Weights, parameters_of

_STEPS: WeakKeyDictionary[Supernet, dict[tuple[int, str], StepTrace]] = WeakKeyDictionary()
"""The steps that were followed, by batch and configuration: weights do not change them."""

Form = tuple[int, ...]
"""A product of shares, by their numbers; () is the number one."""


class TrainingMemory:
    """Bytes alive in a training step of any configuration at `batch`.

    size: what a node's result takes by code, up to a factor. gone [steps, width]: 1 where a step does not run. item:
    bytes of an element on the device. Raises InputError when the step cannot be followed without data.
    """

    def __init__(
        self,
        net: Supernet,
        codes: Codes,
        weights: Weights,
        size: Callable[[fx.Node], Floats],
        gone: Floats,
        item: int,
        batch: int,
    ) -> None:
        self.net, self.codes, self.gone, self.item, self.batch = net, codes, gone, item, batch
        self._nodes = list(net.network.graph.nodes)
        self._at = {node: place for place, node in enumerate(self._nodes)}
        self._shares = Shares(codes.onehot(codes.encode([net.max()]))[0])
        self._parameters = [self._shares.form(axes) for axes, _ in weights.elements]
        self._absent = [absent for _, absent in weights.elements]
        self._sized = [self._shares.form([size(node)]) if "dtype" in node.meta else () for node in self._nodes]
        numbers = {id(t): number for number, t in enumerate(parameters_in(net.network))}
        held = [[numbers[id(t)] for _, t in parameters_of(net.network, node)] for node in self._nodes]
        self._near = [self._candidates(node, held) for node in self._nodes]
        edges: Sequence[int | None] = net.sites.resolution or (None,)
        self.tables = [self._table(edge) for edge in edges]

    def live(self, onehot: Floats, places: Ints) -> Floats:
        """Bytes alive [n, moments] of one-hot codes at these numbers of resolutions; -1 for what does not come."""
        live = np.full((len(onehot), max(len(table.names) for table in self.tables)), -1.0)
        for place in np.unique(places):
            table, here = self.tables[place], places == place
            live[here, : len(table.names)] = table.live(onehot[here])
        return live

    # -- one resolution ------------------------------------------------------------------------------------------------

    def _table(self, edge: int | None) -> Moments:
        fixed = {} if edge is None else {RESOLUTION: edge}
        largest, smallest = {**self.net.max(), **fixed}, {**self.net.min(), **fixed}
        apart = list(self._apart(largest))
        whole, least, *others = (self._step(c) for c in (largest, smallest, *apart))
        onehot = self.codes.onehot(self.codes.encode([largest, smallest, *apart]))
        forms = self._forms(whole, others, onehot[2:])
        gone = np.stack([self._gone(birth) for birth in whole.births])
        moments = _turns(whole, gone)
        alive, gone = _alive(whole, moments), gone[moments]
        births = list(whole.births)
        for number, extra, when in self._stand_ins(whole, moments, alive, gone):
            births.append(births[number])
            forms.append((*forms[number], when))
            alive = np.concatenate([alive, extra[:, None]], axis=1)
        names = [self._name(whole.births[moment]) for moment in moments]
        peaks = np.array([step.peak_bytes for step in (whole, least, *others)], dtype=float)
        return assembled(self._shares, births, forms, alive, gone, names, self.item / whole.item, (onehot, peaks))

    def _step(self, config: Config) -> StepTrace:
        known, key = _STEPS.setdefault(self.net, {}), (self.batch, key_of(config))
        if key not in known:
            known[key] = trace_step(self.net.extract(config), self.batch)
        return known[key]

    def _apart(self, largest: Config) -> Iterator[Config]:
        """Configurations with all blocks in which no two choices go together: the digits of their numbers."""
        free = [c for c in self.net.space.choices if c.kind not in ("depth", "resolution", "bits")]
        for digit in range(len(free).bit_length()):
            small = {c.name: c.values[0] for number, c in enumerate(free, start=1) if number >> digit & 1}
            yield {**largest, **small}

    def _forms(self, whole: StepTrace, others: Sequence[StepTrace], onehot: Floats) -> list[Form]:
        """What share of its bytes each storage of the largest network takes."""
        sizes = [{birth.key: birth.bytes for birth in step.births} for step in others]
        everything = list(dict.fromkeys((*self._sized, *self._parameters)))
        known = {form: self._shares.values(form, onehot) for form in ((), *everything)}
        found = []
        for birth in whole.births:
            if birth.parameter >= 0:
                kept = self._shares.number(self.codes.constant(1.0) - self._absent[birth.parameter])
                found.append((*self._parameters[birth.parameter], *kept))
                continue
            amounts = [size.get(birth.key, birth.bytes) for size in sizes]
            near = self._near[birth.place] if birth.place >= 0 else []
            fits = (f for f in ((), *near, *everything) if _same(birth.bytes * known[f], amounts))
            form = next(fits, ())
            absent = self._gone(birth)
            if not birth.backward and absent.any():  # a gradient that outlives the block is that of its input
                form = (*form, *self._shares.number(self.codes.constant(1.0) - absent))
            found.append(form)
        return found

    def _candidates(self, node: fx.Node, held: Sequence[Sequence[int]]) -> list[Form]:
        """The shares that what a node makes may follow: its result's, its operands', its parameters'."""
        around = [self._at[n] for n in (node, *node.all_input_nodes)]
        sized = [self._sized[place] for place in around]
        return list(dict.fromkeys((*sized, *(self._parameters[number] for place in around for number in held[place]))))

    def _stand_ins(
        self, whole: StepTrace, moments: Ints, alive: Floats, gone: Floats
    ) -> Iterator[tuple[int, Floats, int]]:
        """What changes beside what goes when blocks go: whose size, at which moments it is added or not, which share.

        The input of the first block that goes lives on where an output did, and is let go of where only they held it.
        """
        for name, (stage, values) in self.net.sites.stages.items():
            for place, kept in enumerate(values):
                column = self.codes.first[name] + place
                blocks = [b for b in stage.blocks[kept * stage.period :] if self._at[b.output] in whole.made]
                source = whole.made.get(self._at[blocks[0].source]) if blocks else None
                if source is None:
                    continue
                (when,) = self._shares.number(np.eye(self.codes.width)[column])
                region = {node for b in blocks for node in b.region}
                made = [number for b in blocks if (number := whole.made[self._at[b.output]]) != source]
                outputs = [number for number in made if not self._only_in(whole, number, region)]
                runs, held = gone[:, column] == 0, alive[:, source] > 0
                stands = np.zeros(len(moments), dtype=bool)
                for number in outputs:
                    extra = (alive[:, number] > 0) & runs & ~held & ~stands
                    stands |= alive[:, number] > 0
                    if extra.any():
                        yield number, extra.astype(float), when
                if outputs and self._only_in(whole, source, region):
                    idle = held & runs & ~stands & (moments >= min(made))
                    if idle.any():
                        yield source, -idle.astype(float), when

    def _only_in(self, whole: StepTrace, number: int, region: Collection[fx.Node]) -> bool:
        """Whether nothing outside a region reads a storage or is the last to let go of it."""
        last = whole.births[number].last
        same = {self._nodes[place] for place, made in whole.made.items() if made == number}
        users = {user for node in same for user in node.users}
        return last >= 0 and self._nodes[last] in region and users <= same | set(region)

    def _gone(self, birth: Birth) -> Floats:
        return self.gone[birth.place] if birth.place >= 0 else np.zeros(self.codes.width)

    def _name(self, birth: Birth) -> str:
        node = self._nodes[birth.place]
        path = str(node.meta.get("path", node.name)) if birth.place >= 0 else "loss"
        return f"{path}, {'backward' if birth.backward else 'forward'}"


def _turns(step: StepTrace, gone: Floats) -> Ints:
    """The moments after which something dies, or another block goes on: at no others is most alive."""
    ends = {birth.death - 1 for birth in step.births} | {len(step.births) - 1}
    ends |= set((np.flatnonzero((gone[1:] != gone[:-1]).any(1))).tolist())
    return np.array(sorted(ends), dtype=np.int64)


def _alive(step: StepTrace, moments: Ints) -> Floats:
    """Which storages are alive at these moments, [moments, storages]."""
    births = np.arange(len(step.births))
    deaths = np.array([birth.death for birth in step.births])
    return ((births <= moments[:, None]) & (moments[:, None] < deaths)).astype(float)


def _same(expected: Floats, found: Sequence[int]) -> bool:
    return bool(np.allclose(expected, np.asarray(found, dtype=float), rtol=1e-9, atol=0.0))
