"""SVD: keep a layer's input as two factors, batch against the rest.

Idea: the samples of a batch look alike, so their inputs span few directions. Paper: the SVD variant of Nguyen et al.,
"Activation Map Compression through Tensor Decomposition for Deep Learning", NeurIPS 2024. What differs: the factors
come from the batch's own Gram matrix, and the weight gradient from the factors, where the paper rebuilds the input.
Shapes: x [batch, ...] -> left [batch, K], right [K, ...]. Cost: batch^2 times the input, small for small batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from palmette.ondevice.codec import Codec, Payload, State, compact
from palmette.ondevice.factor_gradients import conv_weight_gradient_from_svd, linear_weight_gradient_from_svd
from palmette.ondevice.layer import Layer
from palmette.ondevice.tucker import svd
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class Svd(Codec):
    """left [batch, K] and right [K, rest]."""

    name: ClassVar[str] = "svd"
    rank: Annotated[int, Bounds(low=1)] = 1

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Both factors."""
        rest = _rest(shape)
        return min(self.rank, shape[0], rest) * (shape[0] + rest) * itemsize

    def can_encode(self, shape: Sequence[int]) -> bool:
        """Where the factors are smaller than the input."""
        return self.nbytes(shape, 1) < shape[0] * _rest(shape)

    def encode(self, x: Tensor, state: State) -> Payload:  # noqa: ARG002
        """The two factors."""
        left, right = svd(x, self.rank, dtype=x.dtype)
        return compact(left), compact(right)

    def decode(self, payload: Payload, layer: Layer) -> Tensor:
        """The input, nearly."""
        left, right = payload
        return (left @ right).view(layer.x_shape)

    def weight_gradient(self, payload: Payload, layer: Layer, grad: Tensor) -> Tensor:
        """The weight gradient with the batch contracted first."""
        left, right = payload
        if layer.kind == "linear":
            return linear_weight_gradient_from_svd(left, right, layer.x_shape, grad)
        return conv_weight_gradient_from_svd(
            left,
            right,
            layer.x_shape,
            grad,
            layer.weight_shape,
            **layer.geometry,
        )


def _rest(shape: Sequence[int]) -> int:
    size = 1
    for side in shape[1:]:
        size *= side
    return size


@dataclass(frozen=True, kw_only=True)
class SvdConfig(MethodConfig):
    """rank: of every input; None: by the budget."""

    rank: Annotated[int | None, Bounds(low=1)] = None


@method(
    name="svd",
    title="SVD: layer inputs as batch times the rest",
    paper="Nguyen et al., Activation Map Compression through Tensor Decomposition, NeurIPS 2024",
    unit="squared gradient error",
    sites="input",
    edit="codec",
    config=SvdConfig,
)
def options(x: Tensor, layer: Layer, config: SvdConfig) -> list[Svd]:  # noqa: ARG001  # the interface of codecs
    """The ranks to choose from for this input, from coarse to fine."""
    if config.rank is not None:
        return [Svd(rank=config.rank)]
    ranks = sorted({max(1, round(x.shape[0] * share)) for share in (0.01, 0.03, 0.06, 0.12, 0.25, 0.4, 0.6)})
    return [codec for codec in (Svd(rank=rank) for rank in ranks) if codec.can_encode(x.shape)]
