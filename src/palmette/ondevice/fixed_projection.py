"""Fixed projection: keep a layer's input times a random matrix that never changes.

Idea: r random directions of the channels tell the gradient along them; no decomposition, one thin product. After
LoRA-FA (Zhang et al., 2023) and VeLoRA (Miles et al., NeurIPS 2024). What differs: the projection is applied to the
weight gradient of the layer itself, which stays a full layer; convolutions too. Shapes: channels C -> r of them, one
orthonormal matrix [C, r] a layer, which counts as kept. Cost: one product with it per pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from palmette.ondevice.codec import Payload, State, compact
from palmette.ondevice.factored import TuckerCodec
from palmette.ondevice.layer import Layer
from palmette.ondevice.tucker import mode_product
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class FixedProjection(TuckerCodec):
    """A Tucker form whose only factor, that of the channels, was drawn once. axis: the channels' axis."""

    name: ClassVar[str] = "fixed_projection"
    axis: int = 1
    seed: int = 0

    def encode(self, x: Tensor, state: State) -> Payload:
        """The input's channels on the fixed directions, and these."""
        basis = state.get("basis")
        rank = self.ranks[self.axis]
        if basis is None or basis.shape != (x.shape[self.axis], rank):
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(x.shape[self.axis], rank, generator=generator)
            basis = torch.linalg.qr(drawn)[0].contiguous()
        basis = state["basis"] = basis.to(x)
        return compact(mode_product(x, basis.T, self.axis).contiguous()), basis


@dataclass(frozen=True, kw_only=True)
class FixedProjectionConfig(MethodConfig):
    """share: directions as a share of the channels; None: by the budget. seed: of the directions."""

    share: Annotated[float | None, Bounds(low=0.0, low_open=True, high=1.0, high_open=True)] = None
    seed: int = 0


@method(
    name="fixed_projection",
    title="Fixed projection: layer inputs on random directions",
    paper="after Zhang et al., LoRA-FA, 2023, and Miles et al., VeLoRA, NeurIPS 2024",
    unit="squared gradient error",
    sites="input",
    edit="codec",
    config=FixedProjectionConfig,
)
def options(x: Tensor, layer: Layer, config: FixedProjectionConfig) -> list[FixedProjection]:
    """The numbers of directions to choose from for this input, from coarse to fine."""
    axis = layer.channel_axis
    channels = x.shape[axis]
    shares = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2) if config.share is None else (config.share,)
    found = []
    for rank in sorted({max(1, int(channels * share)) for share in shares}):
        ranks = tuple(rank if mode == axis else size for mode, size in enumerate(x.shape))
        codec = FixedProjection(ranks=ranks, axis=axis, seed=config.seed)
        if codec.can_encode(x.shape):
            found.append(codec)
    return found
