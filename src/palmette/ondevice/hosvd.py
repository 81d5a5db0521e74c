"""HOSVD: keep every layer's input as a Tucker form, made anew at each step.

Idea: the input of a layer has few directions with energy along batch, channels, height and width; the weight gradient
follows from a small core and four thin factors without the input ever being rebuilt. Paper: Nguyen et al., "Activation
Map Compression through Tensor Decomposition for Deep Learning", NeurIPS 2024. What differs: factors come from Gram
matrices, mode after mode on the shrunk tensor, instead of a full SVD of each unfolding (at least 20 times faster);
ranks are chosen per mode for a budget in bytes and stay fixed, where the paper takes an energy per mode and lets them
vary; every stride, padding, dilation and grouping. Shapes: [batch, channels, *space] or [..., features].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from palmette.ondevice.codec import Payload, State
from palmette.ondevice.factored import TuckerCodec, payload_of, ranks_offered
from palmette.ondevice.layer import Layer
from palmette.ondevice.tucker import hosvd
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class Hosvd(TuckerCodec):
    """A Tucker form by eigenvectors of Gram matrices. sequential: each mode on the tensor that others have shrunk."""

    name: ClassVar[str] = "hosvd"
    sequential: bool = True

    def encode(self, x: Tensor, state: State) -> Payload:  # noqa: ARG002
        """Core and factors."""
        return payload_of(hosvd(x, self.ranks, sequential=self.sequential, dtype=x.dtype), x)


@dataclass(frozen=True, kw_only=True)
class HosvdConfig(MethodConfig):
    """energy: the published rule, the share of energy that each mode keeps on the sample; None: by the budget."""

    energy: Annotated[float | None, Bounds(low=0.0, low_open=True, high=1.0)] = None
    reproduce: bool = False


@method(
    name="hosvd",
    title="HOSVD: layer inputs in Tucker form",
    paper="Nguyen et al., Activation Map Compression through Tensor Decomposition, NeurIPS 2024",
    unit="squared gradient error",
    sites="input",
    edit="codec",
    config=HosvdConfig,
)
def options(x: Tensor, layer: Layer, config: HosvdConfig) -> list[Hosvd]:  # noqa: ARG001  # the interface of codecs
    """The Tucker forms to choose from for this input, from coarse to fine."""
    return [Hosvd(ranks=ranks, sequential=not config.reproduce) for ranks in ranks_offered(x, config.energy)]
