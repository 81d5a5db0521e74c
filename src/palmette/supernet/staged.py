"""Staged networks with elastic kernels, expands, depths and resolution: the spaces of OFA, CompOFA and MOOFA.

A configuration is a row of four arrays, as in the papers' data: kernel and expand [N, stages * blocks], depth
[N, stages], resolution [N]. Blocks beyond a stage's depth are not there; what stands in their place is not read.

Source: Cai et al., ICLR 2020 (OFA); Sahni et al., ICLR 2021 (CompOFA); MOOFA, arXiv 2409.05900, and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from palmette.device import DeviceProfile
from palmette.errors import InputError
from palmette.supernet.staged_training import training_peak
from palmette.supernet.terms import Ints, Layer, cost_layers, memory_layers, metric_of

if TYPE_CHECKING:
    from torch import nn

Array = np.ndarray[Any, Any]


class Configs(NamedTuple):
    """N configurations: kernel, expand [N, stages * blocks]; depth [N, stages]; resolution [N]."""

    kernel: Array
    expand: Array
    depth: Array
    resolution: Array

    def take(self, rows: Any) -> Configs:
        """The configurations of these rows: an index array, a mask or a slice."""
        return Configs(self.kernel[rows], self.expand[rows], self.depth[rows], self.resolution[rows])


class Places(NamedTuple):
    """Configurations as places in the lists of a space: kernel, expand, active [N, S, B]; depth [N, S]; resolution [N].

    resolution points into `resolutions`, which holds each resolution that occurs once.
    """

    kernel: Ints
    expand: Ints
    active: np.ndarray[Any, np.dtype[np.bool_]]
    depth: Ints
    resolution: Ints
    resolutions: Ints


class Table(NamedTuple):
    """Figures per choice, to be summed over a network or the largest taken.

    fixed [R]: what does not depend on the blocks; block [S, B, R, kernels, expands]: each block's.
    """

    fixed: Array
    block: Array

    def gather(self, at: Places) -> Array:
        """Each block's figure [N, S, B], 0 where the block is not there; `at.resolution` points into the table."""
        stages, blocks = np.ogrid[: at.active.shape[1], : at.active.shape[2]]
        return np.where(at.active, self.block[stages, blocks, at.resolution[:, None, None], at.kernel, at.expand], 0)

    def total(self, at: Places) -> Array:
        """The sum over each network; [N]."""
        return np.asarray(self.fixed[at.resolution] + self.gather(at).sum((1, 2)))


@dataclass(frozen=True, kw_only=True)
class StagedSpace:
    """A MobileNetV3-like space: stem, first block, elastic stages, final expand, feature mix, classifier.

    stem, first, widths, final, last: channels. strides: of each stage's first block, 1 or 2, behind a stem of stride 2.
    se, activations ("relu", "hard_swish"): per stage. kernels and expands are chosen per block, depths per stage,
    resolutions (pixels of a side) per network. tied: (depth, expand) pairs, if a stage's depth fixes its expand.
    Raises InputError for lists that do not fit together.
    """

    name: str
    stem: int
    first: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    se: tuple[bool, ...]
    activations: tuple[Literal["relu", "hard_swish"], ...]
    final: int
    last: int
    expands: tuple[float, ...]
    kernels: tuple[int, ...] = (3, 5, 7)
    depths: tuple[int, ...] = (2, 3, 4)
    resolutions: tuple[int, ...] = (128, 160, 192, 224)
    tied: tuple[tuple[int, float], ...] | None = None
    classes: int = 1000

    def __post_init__(self) -> None:
        for wrong in self._faults():
            raise InputError(wrong, where=f"space {self.name!r}")

    def _faults(self) -> Sequence[str]:
        lists = {name: getattr(self, name) for name in ("kernels", "expands", "depths", "resolutions")}
        found = [
            f"{name} must be positive and ascending, not {values}"
            for name, values in lists.items()
            if not values or list(values) != sorted(set(values)) or values[0] <= 0
        ]
        if {len(self.strides), len(self.se), len(self.activations)} != {self.stages} or not self.stages:
            found.append("Widths, strides, se and activations differ in length, or there are none")
        if not set(self.strides) <= {1, 2} or not set(self.activations) <= {"relu", "hard_swish"}:
            found.append("Strides are 1 or 2, activations relu or hard_swish")
        if any(kernel % 2 == 0 for kernel in self.kernels):
            found.append(f"Kernels must be odd, not {self.kernels}")
        if min(self.stem, self.first, *self.widths, self.final, self.last, self.classes) < 1:
            found.append("Every width must be at least 1")
        if self.tied is not None and (
            sorted(d for d, _ in self.tied) != list(self.depths) or not {e for _, e in self.tied} <= set(self.expands)
        ):
            found.append("tied must give one of the expands to each depth")
        return found

    @property
    def stages(self) -> int:
        """Number of elastic stages."""
        return len(self.widths)

    @property
    def blocks(self) -> int:
        """Blocks of a stage at its largest depth."""
        return self.depths[-1]

    def peak_elements(
        self,
        kernel: Any,
        expand: Any,
        depth: Any,
        resolution: Any,
        metric: str = "moofa",
        *,
        mode: Literal["infer", "train"] = "infer",
    ) -> Ints:
        """Peak memory of N configurations in elements at batch 1; int64 [N].

        metric: "moofa" (each convolution's input, output and weights, as the papers count), "activations" (weights in
        flash) or "activations+inplace" (depthwise convolutions in place as well). mode: "train" counts a training step
        in place of an inference, without the weights and by no metric: what autograd keeps, gradients of all parameters
        until the step, and what backward needs at once (palmette.supernet.staged_training). Raises InputError for an
        unknown metric or mode and for a choice that the space does not have; the resolution may be any.
        """
        at = self.places(Configs(kernel, expand, depth, resolution))
        if mode == "train":
            return training_peak(self, at)
        if mode != "infer":
            raise InputError(f"No mode is called {mode!r}", fix="Known: infer, train.")
        return self._peak(at, metric)

    def peak_bytes(self, kernel: Any, expand: Any, depth: Any, resolution: Any, profile: DeviceProfile) -> Ints:
        """RAM in bytes that N configurations need on a device at batch 1; int64 [N], to compare with its `ram_bytes`.

        What is alive during each operation (input, output, the block's shortcut, the small tensors of
        squeeze-and-excitation; batch norms folded), the runtime's reserve, and all weights if they live in RAM. Raises
        InputError as `peak_elements`, and for a dtype of unknown size.
        """
        at = self.places(Configs(kernel, expand, depth, resolution))
        weights = self.cost_table("params", at.resolutions).total(at) if profile.weights_in == "ram" else 0
        peak: Ints = self._peak(at, profile) + profile.element_bytes * weights
        return peak

    def _peak(self, at: Places, metric: str | DeviceProfile) -> Ints:
        table = self.peak_table(metric, at.resolutions)
        peak: Ints = np.maximum(table.fixed[at.resolution], table.gather(at).max((1, 2)))
        return peak

    def layer_elements(
        self, kernel: Any, expand: Any, depth: Any, resolution: Any, metric: str | DeviceProfile = "moofa"
    ) -> tuple[list[str], Ints]:
        """Names of the layers and their memory, int64 [N, layers], in the metric's unit; 0 where a layer is not there.

        For a DeviceProfile these are bytes, and operations rather than layers; weights in RAM are left out. How evenly
        a network uses its memory is `layers.sum(1) / (layers > 0).sum(1) / layers.max(1)`.
        """
        at = self.places(Configs(kernel, expand, depth, resolution))
        layers = memory_layers(self, metric_of(metric), at.resolutions)
        columns = []
        for _, place, values in layers:
            if place is None:
                columns.append(values[at.resolution])
            else:
                here = (slice(None), *place)
                found = values[at.resolution, at.kernel[here], at.expand[here]]
                columns.append(np.where(at.active[here], found, 0))
        return [layer.name for layer in layers], np.stack(columns, axis=1)

    def macs(self, kernel: Any, expand: Any, depth: Any, resolution: Any) -> Ints:
        """Multiply-adds of one image for N configurations; int64 [N]."""
        at = self.places(Configs(kernel, expand, depth, resolution))
        return self.cost_table("macs", at.resolutions).total(at)

    def params(self, kernel: Any, expand: Any, depth: Any, resolution: Any) -> Ints:
        """Parameters of N configurations, scale and offset of batch norms included; int64 [N]."""
        at = self.places(Configs(kernel, expand, depth, resolution))
        return self.cost_table("params", at.resolutions).total(at)

    def peak_table(self, metric: str | DeviceProfile = "moofa", resolutions: Any = None) -> Table:
        """The largest term of each block and of all that is fixed; a network's peak is the largest of these.

        resolutions: those of the space unless given. Weights in RAM, which are a sum, are left out.
        """
        return self._table(memory_layers(self, metric_of(metric), self._asked(resolutions)), np.maximum)

    def cost_table(self, cost: str, resolutions: Any = None) -> Table:
        """Each block's share of a cost, "macs" or "params", and the rest; resolutions as for `peak_table`."""
        return self._table(cost_layers(self, cost, self._asked(resolutions)), np.add)

    def _asked(self, resolutions: Any) -> Ints:
        return np.asarray(self.resolutions if resolutions is None else resolutions, dtype=np.int64)

    def _table(self, layers: list[Layer], combine: np.ufunc) -> Table:
        fixed: Ints = reduce(combine, [values for _, place, values in layers if place is None])
        block = np.zeros((self.stages, self.blocks, len(fixed), len(self.kernels), len(self.expands)), dtype=np.int64)
        for _, place, values in layers:
            if place is not None:
                block[place] = combine(block[place], values)
        return Table(fixed, block)

    def places(self, configs: Configs, *, listed: bool = False) -> Places:
        """The configurations as places in the lists of the space.

        listed: `resolution` points into the space's own list, and must be there. Raises InputError for arrays of other
        shapes and for a choice that the space does not have.
        """
        depth, resolution = np.asarray(configs.depth), np.asarray(configs.resolution)
        shape = (len(depth) if depth.ndim else 0, self.stages, self.blocks)
        blocks = [np.asarray(array) for array in configs[:2]]
        flat = (shape[0], self.stages * self.blocks)
        if depth.shape != shape[:2] or resolution.shape != shape[:1] or any(b.shape != flat for b in blocks):
            raise InputError(
                f"Arrays of shapes {[np.shape(array) for array in configs]} are no configurations",
                where=f"space {self.name!r}",
                fix=f"Write [N, {flat[1]}] twice, [N, {self.stages}] and [N].",
            )
        depths = self._find("depth", depth, self.depths)
        active = np.arange(self.blocks) < depth[..., None]
        kernel, expand = (
            self._find(name, np.where(active, array.reshape(shape), choices[0]), choices)
            for name, array, choices in zip(("kernel", "expand"), blocks, (self.kernels, self.expands), strict=True)
        )
        if self.tied is not None:
            due = np.searchsorted(self.expands, [dict(self.tied)[d] for d in self.depths])
            if (active & (expand != due[depths][..., None])).any():
                raise InputError("An expand is not that of its stage's depth", where=f"space {self.name!r}")
        if listed:
            place, known = self._find("resolution", resolution, self.resolutions), np.array(self.resolutions)
        else:
            known, place = np.unique(resolution.astype(np.int64), return_inverse=True)
            if (known <= 0).any():
                raise InputError(f"A resolution of {known[0]} is not positive", where=f"space {self.name!r}")
        return Places(kernel, expand, active, depths, place, known)

    def _find(self, name: str, values: Array, choices: Sequence[float]) -> Ints:
        place = np.searchsorted(choices, values).clip(max=len(choices) - 1)
        wrong = values[np.asarray(choices)[place] != values]
        if wrong.size:
            raise InputError(
                f"{name} {wrong.flat[0]:g} is not in the space", where=f"space {self.name!r}", fix=f"Known: {choices}."
            )
        return place

    def largest(self) -> Configs:
        """The configuration with the largest value everywhere, N = 1."""
        blocks = np.ones((1, self.stages * self.blocks), dtype=np.int64)
        depth = np.full((1, self.stages), self.depths[-1])
        return Configs(self.kernels[-1] * blocks, self.expands[-1] * blocks, depth, np.array(self.resolutions[-1:]))

    def build(self, kernel: Any, expand: Any, depth: Any, classes: int | None = None) -> nn.Module:
        """The network of one configuration, [stages * blocks] twice and [stages], with random weights.

        Takes images [N, 3, H, W] of any resolution. Raises InputError for a choice that the space does not have.
        """
        from palmette.supernet.network import StagedNetwork

        kernel, expand, depth = (np.asarray(array) for array in (kernel, expand, depth))
        self.places(Configs(kernel[None], expand[None], depth[None], np.array(self.resolutions[:1])))
        space = self if classes is None else replace(self, classes=classes)
        return StagedNetwork(space, kernel.tolist(), expand.tolist(), depth.tolist())

    def build_max(self, classes: int | None = None) -> nn.Module:
        """The largest network of the space, with random weights."""
        kernel, expand, depth, _ = self.largest().take(0)
        return self.build(kernel, expand, depth, classes)


OFA = StagedSpace(
    name="OFA",
    stem=16,
    first=16,
    widths=(24, 40, 80, 112, 160),
    strides=(2, 2, 2, 1, 2),
    se=(False, True, False, True, True),
    activations=("relu", "relu", "hard_swish", "hard_swish", "hard_swish"),
    final=960,
    last=1280,
    expands=(3, 4, 6),
)
"""Once-for-All on MobileNetV3, width 1.0."""

COMPOFA = replace(OFA, name="CompOFA", tied=((2, 3), (3, 4), (4, 6)))
"""CompOFA with elastic kernels: a stage's depth fixes its expand."""

MOOFA = StagedSpace(
    name="MOOFA",
    stem=3,
    first=8,
    widths=(24, 96, 288, 360, 384),
    strides=(2, 2, 2, 2, 2),
    se=(False, True, True, False, True),
    activations=("hard_swish", "hard_swish", "hard_swish", "relu", "hard_swish"),
    final=392,
    last=392,
    expands=(2, 3, 4),
)
"""Memory-optimised Once-for-All, its third and final version."""

MOOFA_V1 = replace(MOOFA, name="MOOFA V1", expands=(3, 4, 6))
"""MOOFA's first version: OFA's expands."""

MOOFA_V2 = replace(MOOFA, name="MOOFA V2", expands=(1, 1.5, 2))
"""MOOFA's second version: expands of at most 2."""
