"""What every configuration of a supernet needs of a device, from tables: bytes of RAM and of flash.

The graph of the largest network is followed once, for each resolution of its images. A tensor has one axis that a
configuration narrows, so its size is a sum over the choices, and what is alive at a step is a sum over its tensors: a
hundred thousand configurations are one product of matrices. Weights are products of what is written and what is read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from torch import fx

from palmette.device import DeviceProfile, parse_latency
from palmette.errors import InputError
from palmette.graph.capture import example_of
from palmette.graph.channel_rules import ELEMENTWISE
from palmette.graph.ops import BATCH_NORMS, CONVOLUTIONS, ChannelAffine, module_of, op_name
from palmette.meter.memory import Step, follow
from palmette.supernet.codes import Codes, Floats, Ints
from palmette.supernet.moments import Row, highest
from palmette.supernet.resolution import RESOLUTION, at_edge, edge_of
from palmette.supernet.space import Config
from palmette.supernet.supernet import Supernet
from palmette.supernet.train_memory import TrainingMemory
from palmette.supernet.weights import Weights

if TYPE_CHECKING:
    from palmette.supernet.latency import LatencyTable

Mode = Literal["infer", "train"]
_CHUNK = 8192
ROUNDING = 1e-3
"""Bytes by which sums of shares of whole bytes may be off."""
CLOSE = 1e-5
"""Share of a bound on latency by which rounding may pass it."""


@dataclass(frozen=True)
class Binding:
    """The step at which a configuration needs most: its path, and the bytes that are alive there."""

    path: str
    peak_bytes: int


@dataclass(frozen=True)
class _Tables:
    """What a code needs at one resolution: sizes of storages, when they are alive, what kernels take for themselves.

    Shapes: sizes [width, storages], alive [steps, storages], scratch [width, steps].
    """

    sizes: Floats
    alive: Floats
    scratch: Floats

    def live(self, onehot: Floats) -> Floats:
        """Bytes alive [n, steps] of one-hot codes [n, width], for steps that run."""
        return (onehot @ self.sizes) @ self.alive.T + onehot @ self.scratch

    def steps(self) -> Floats:
        """For each step the vector that times a code gives the bytes alive, [steps, width]."""
        return (self.sizes @ self.alive.T + self.scratch).T


class MemoryModel:
    """Bytes of RAM for activations, and of weights, of any configuration of a supernet under a device profile.

    Activations are planned: a tensor lives from the step that makes it to the last that reads it, the input too. What a
    kernel allocates for itself counts as it does in `palmette.meter.memory`. With `profile.inplace_elementwise` an
    activation, a norm or a sum takes the place of an operand that nothing reads afterwards; with
    `profile.inplace_depthwise` a depthwise convolution does too. Weights in 8 bits are dequantised as they are read.

    mode: "train" counts a training step at `batch` in place of an inference: forward in training mode, a cross entropy,
    backward with gradients of all parameters, held until plain SGD steps; never less than `measure_training` finds for
    the extracted network. Operators then run as PyTorch runs them, whatever the profile says of places and operators.

    latency: what `measure_latencies` found on the device; needed where the profile bounds the latency. Raises
    InputError for a bound on latency without a table, a table of another space, another mode or batch, and where a
    training step cannot be followed without data.
    """

    def __init__(
        self,
        net: Supernet,
        profile: DeviceProfile | None = None,
        *,
        latency: LatencyTable | None = None,
        mode: Mode = "infer",
        batch: int = 1,
    ) -> None:
        if mode not in get_args(Mode) or batch < 1 or (mode == "infer" and batch > 1):
            raise InputError(
                f"mode = {mode!r} with batch = {batch} cannot be counted",
                fix='Give "infer", which is of one sample, or "train" and a batch of 1 or more.',
            )
        self.mode, self.batch = mode, batch
        self.net, self.profile, self.latency = net, profile or DeviceProfile(), latency
        self._item = self.profile.element_bytes
        self.codes = Codes(net.sites, net.space.choices)
        if self.profile.latency_ms is not None and latency is None:
            raise InputError(
                "A bound on latency needs a table of latencies",
                where=f"profile {self.profile.name!r}",
                why="times cannot be computed, only measured",
                fix="Measure one with measure_latencies(net) or `palmette profile`, and pass it as latency.",
            )
        self._nodes = list(net.network.graph.nodes)
        self.resolutions = net.sites.resolution or (edge_of(example_of(net.network)),)
        graphs = [at_edge(net.network, edge) for edge in net.sites.resolution] or [net.network]
        inside, beside = self.codes.gone()
        gone, stays = {**inside, **beside}, np.zeros(self.codes.width)
        self.gone = np.stack([gone.get(n, stays) for n in self._nodes])
        """For each step the vector [steps, width] that times a code is 1 where the step does not run, else 0."""
        self._tables = [
            self._follow(follow(graph, 1, self.profile.operators), edge, beside)
            for graph, edge in zip(graphs, self.resolutions, strict=True)
        ]
        self.weights = Weights(net, self.codes, self._item, graphs)
        if latency is not None:
            latency.check(self)
        self._training: TrainingMemory | None = None
        if mode == "train":
            self._training = TrainingMemory(
                net, self.codes, self.weights, lambda node: self._size(node, 1, {}), self.gone, self._item, batch
            )

    def bounded(self, *, ram: int) -> MemoryModel:
        """The same model with another bound on RAM; nothing is followed again."""
        other = copy.copy(self)
        other.profile = replace(self.profile, ram=ram)
        return other

    # -- answers -------------------------------------------------------------------------------------------------------

    def peak_bytes(self, codes: Ints) -> Ints:
        """Largest number of bytes of activations that are alive at once, [n], of codes [n, choices]."""
        parts = [self._peaks(codes[i : i + _CHUNK]) for i in range(0, len(codes), _CHUNK)]
        peaks = np.concatenate(parts) if parts else np.zeros(0)
        return np.ceil(peaks - ROUNDING).astype(np.int64)

    def param_bytes(self, codes: Ints) -> Ints:
        """Bytes of the parameters [n]."""
        return self.weights(codes)

    def ram_bytes(self, codes: Ints) -> Ints:
        """Bytes of RAM [n]: activations, the profile's reserve, and the weights where they live there."""
        ram = self.peak_bytes(codes) + self.profile.reserve_bytes
        return ram if self.profile.weights_in == "flash" else ram + self.param_bytes(codes)

    def latency_ms(self, codes: Ints) -> Floats:
        """Milliseconds [n] by the table of latencies. Raises InputError where none was given."""
        if self.latency is None:
            raise InputError("No table of latencies was given", fix="Pass one: MemoryModel(net, profile, latency=...).")
        return self.latency.predict(self, codes)

    def fits(self, codes: Ints, ram: Ints | None = None) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each configuration [n] keeps the bounds of the profile. ram: bounds [n] in place of the profile's."""
        ok = np.ones(len(codes), dtype=bool)
        bound = self.profile.ram_bytes if ram is None else ram
        if bound is not None:
            ok &= self.ram_bytes(codes) <= bound
        if self.profile.flash_bytes is not None:
            ok &= self.param_bytes(codes) <= self.profile.flash_bytes
        if self.profile.latency_ms is not None:
            ok &= self.latency_ms(codes) <= (1 + CLOSE) * parse_latency(self.profile.latency_ms)
        return ok

    def binding(self, config: Config) -> Binding:
        """The step at which a configuration needs most."""
        code = self.codes.encode([config])
        live = self.live(code)[0]
        step = int(live.argmax())
        return Binding(self._names(code)[step], int(live[step]))

    def per_step(self, config: Config) -> list[tuple[str, int]]:
        """Path and bytes alive of every step that runs, in order; of training, the moments that may be its peak."""
        code = self.codes.encode([config])
        return [(n, int(b)) for n, b in zip(self._names(code), self.live(code)[0], strict=False) if b > -1]

    def _names(self, code: Ints) -> Sequence[str]:
        if self._training is not None:
            return self._training.tables[int(self.codes.places(RESOLUTION, code)[0])].names
        return [str(n.meta.get("path", n.name)) for n in self._nodes]

    # -- tables --------------------------------------------------------------------------------------------------------

    def _follow(self, steps: Sequence[Step], edge: int, beside: Mapping[fx.Node, Floats]) -> _Tables:
        """Sizes of the storages, when they are alive, and what a code makes of them."""
        birth: dict[int, int] = {}
        death: dict[int, int] = {}
        size: dict[int, int] = {}
        for position, step in enumerate(steps):
            for storage, amount in step.returned.items():
                size[storage] = amount
                birth.setdefault(storage, position)
            for storage in (step.used | step.returned.keys()) & size.keys():
                death[storage] = position
        order = list(size)
        alive = np.zeros((len(steps), len(order)))
        for t, storage in enumerate(order):
            alive[birth[storage] : death[storage] + 1, t] = 1.0
        for s, step in enumerate(steps):
            overwritten = self._overwrites(self._nodes[s], step, {k: size[k] for k in step.used if death.get(k) == s})
            if overwritten is not None:
                alive[s, order.index(overwritten)] = 0.0
        sizes = np.stack([self._size(self._nodes[birth[k]], size[k], beside) for k in order], axis=1)
        extras = {n: _extra(s) for n, s in zip(self._nodes, steps, strict=True)}
        least = self._least(extras, edge)
        extra = [self._scratch_of(n, amount, least) for n, amount in extras.items()]
        return _Tables(sizes, alive, np.stack(extra, axis=1))

    def _overwrites(self, node: fx.Node, step: Step, dying: Mapping[int, int]) -> int | None:
        """The operand whose place the node's result takes, where the profile lets it."""
        module: Any = module_of(self.net.network, node)
        elementwise = op_name(node) in ELEMENTWISE or isinstance(module, (*BATCH_NORMS, ChannelAffine))
        depthwise = isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels
        if not ((elementwise and self.profile.inplace_elementwise) or (depthwise and self.profile.inplace_depthwise)):
            return None
        fresh = [v for k, v in step.returned.items() if k not in step.used]
        return next((k for k, v in dying.items() if len(fresh) == 1 and v == fresh[0]), None)

    def _size(self, node: fx.Node, amount: int, beside: Mapping[fx.Node, Floats]) -> Floats:
        """Bytes by code of a storage that a node makes."""
        sites, scale = self.net.sites, self._item / node.meta["dtype"].itemsize if _is_float(node) else 1.0
        for name, (head, values) in sites.heads.items():
            if node in head.between:
                return self.codes.of(name, [amount * scale * kept / head.count for kept in values])
        if node in sites.channels.variables:
            classes = sites.channels.of(node)
            return self.codes.kept(classes) * (amount * scale / len(classes))
        absent = beside.get(node)  # such as a mask, which may be made long before the block that reads it
        whole = self.codes.constant(amount * scale)
        return whole if absent is None else whole - amount * scale * absent

    def _least(self, extras: Mapping[fx.Node, int], edge: int) -> dict[str, int]:
        """By path, what kernels allocate for themselves with the fewest heads and channels: a part follows neither."""
        sites = self.net.sites
        own = {head.node for head, _ in sites.heads.values()} | sites.channels.variables.keys()
        if not any(amount and node in own for node, amount in extras.items()):
            return {}
        small = self.net.extract(self._narrowest() | ({RESOLUTION: edge} if sites.resolution else {}))
        steps = zip(small.graph.nodes, follow(small, 1, self.profile.operators), strict=True)
        return {str(n.meta["path"]): _extra(step) for n, step in steps}

    def _narrowest(self) -> Config:
        narrow = {choice.name: choice.values[0] for choice in self.codes.choices if choice.kind in ("heads", "width")}
        return {**self.net.max(), **narrow}

    def _scratch_of(self, node: fx.Node, amount: int, least: Mapping[str, int]) -> Floats:
        """Bytes by code that a node's kernel allocates for itself: in a straight line over heads, or over channels."""
        scale = self._item / 4
        low = least.get(str(node.meta["path"]), amount)
        for name, (head, values) in self.net.sites.heads.items():
            if node is head.node:
                span = max(1, head.count - values[0])
                line = [low + (amount - low) * (kept - values[0]) / span for kept in values]
                return self.codes.of(name, [scale * size for size in line])
        whole = self.codes.constant(amount * scale)
        if low == amount or node not in self.net.sites.channels.variables:
            return whole
        kept, fewest, most = self._followed(node, low / amount)
        if kept is None:
            return whole
        slope = scale * (amount - low) / (most - fewest)
        return whole + slope * (kept - self.codes.constant(most))

    def _followed(self, node: fx.Node, share: float) -> tuple[Floats | None, float, float]:
        """The channels that a node's scratch space follows, by code, and the fewest and most of them; None if unknown.

        share: what is left of the scratch space with the fewest. A layer copies either what it reads or what it writes,
        and which of them the share must tell.
        """
        channels = self.net.sites.channels
        affine = channels.reader.is_affine(node)
        ends = [n for n in (node, *node.all_input_nodes[: int(affine)]) if n in channels.variables]
        lines = {tuple(line): line for line in (self.codes.kept(channels.of(n)) for n in ends)}
        bounds = self.codes.onehot(self.codes.encode([self._narrowest(), self.net.max()]))
        found = [(line, *(bounds @ line)) for line in lines.values()]
        found = [(line, low, high) for line, low, high in found if low < high]
        if affine:
            found = [(line, low, high) for line, low, high in found if math.isclose(low / high, share)]
        return found[0] if len(found) == 1 else (None, 0.0, 0.0)

    def _peaks(self, codes: Ints) -> Floats:
        """The most bytes alive [n]; for an inference of the steps that can be the peak alone."""
        if self._training is not None:
            return np.asarray(self.live(codes).max(1))
        onehot, places = self.codes.onehot(codes), self.codes.places(RESOLUTION, codes)
        peaks = np.zeros(len(codes))
        for place in np.unique(places):
            own, (live, gone) = onehot[places == place], self._candidates[place]
            peaks[places == place] = np.where(own @ gone.T > 0, -1.0, own @ live.T).max(1)
        return peaks

    @cached_property
    def _candidates(self) -> list[tuple[Floats, Floats]]:
        """For each resolution what is alive at, and when there are, the steps that can be the peak."""
        return [undominated(table.steps(), self.gone, self.codes.spans) for table in self._tables]

    def rows(self, place: int) -> Iterator[Row]:
        """The bytes alive at each step of that resolution as a sum of products of columns of a one-hot code."""
        if self._training is not None:
            yield from self._training.tables[place].rows()
            return
        spans = self.codes.spans
        for live, gone in zip(*self._candidates[place], strict=True):
            terms: dict[tuple[int, ...], float] = {(): float(live[0])}
            terms |= {(int(c),): float(live[c]) for c in np.flatnonzero(live) if c}
            yield Row(terms, gone, float(live[0] + sum(max(0.0, float(live[s].max())) for s in spans)))

    def live(self, codes: Ints) -> Floats:
        """Bytes alive [n, steps]; -1 at steps that do not run."""
        onehot = self.codes.onehot(codes)
        places = self.codes.places(RESOLUTION, codes)
        if self._training is not None:
            return self._training.live(onehot, places)
        live = np.zeros((len(codes), len(self._nodes)))
        for place in np.unique(places):
            live[places == place] = self._tables[place].live(onehot[places == place])
        return np.where(onehot @ self.gone.T > 0, -1.0, live)


def undominated(live: Floats, gone: Floats, spans: Sequence[range]) -> tuple[Floats, Floats]:
    """Rows [k, width] of `live` and `gone` [steps, width], so that the peak over all steps is that over these.

    Of the others another is as large for every code, and runs as often. spans: the columns of each choice, of which a
    code has one.
    """
    moved = live.copy()
    for span in spans:  # what all values of a choice have is a constant
        least = moved[:, span].min(1)
        moved[:, span] -= least[:, None]
        moved[:, 0] += least
    kept = highest(moved, gone, ROUNDING / moved.shape[1])
    return live[kept], gone[kept]


def _extra(step: Step) -> int:
    """Bytes that a step allocates beside what it returns."""
    return max(0, step.allocated - sum(size for storage, size in step.returned.items() if storage not in step.used))


def _is_float(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and bool(dtype.is_floating_point)
