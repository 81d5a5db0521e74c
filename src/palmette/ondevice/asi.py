"""ASI: the Tucker form of HOSVD, its factors carried from step to step.

Idea: the subspaces of a layer's input move slowly, so one pass of subspace iteration from the last step's factors does
what an SVD would. Paper: Nguyen et al., "Beyond Low-rank Decomposition: A Shortcut Approach for Efficient On-Device
Learning", ICML 2025. What differs by default: modes in sequence on the shrunk tensor; the batch mode exact and last,
since its samples change at every step and there is nothing to carry on; small modes exact. `reproduce=True` is the
published order. Cost: one pass over the input per mode at first, then over what is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from palmette.ondevice.codec import Payload, State
from palmette.ondevice.factored import TuckerCodec, payload_of, ranks_offered
from palmette.ondevice.layer import Layer
from palmette.ondevice.tucker import subspace_iteration
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class Asi(TuckerCodec):
    """A Tucker form by one pass of subspace iteration, started from the bases of the step before."""

    name: ClassVar[str] = "asi"
    published: bool = False

    def encode(self, x: Tensor, state: State) -> Payload:
        """Core and factors; the bases go into `state`."""
        generator = state.setdefault("generator", None) or torch.Generator(device="cpu").manual_seed(0)
        form, bases = subspace_iteration(
            x, self.ranks, state.get("bases"), generator=generator, published=self.published, dtype=x.dtype
        )
        state["bases"] = tuple(None if basis is None else basis.detach() for basis in bases)
        return payload_of(form, x)


@dataclass(frozen=True, kw_only=True)
class AsiConfig(MethodConfig):
    """reproduce: the published order. energy: HOSVD's rule for the ranks instead of the budget."""

    energy: Annotated[float | None, Bounds(low=0.0, low_open=True, high=1.0)] = None
    reproduce: bool = False


@method(
    name="asi",
    title="ASI: Tucker factors carried from step to step",
    paper="Nguyen et al., Beyond Low-rank Decomposition, ICML 2025",
    unit="squared gradient error",
    sites="input",
    edit="codec",
    config=AsiConfig,
)
def options(x: Tensor, layer: Layer, config: AsiConfig) -> list[Asi]:  # noqa: ARG001  # the interface of codecs
    """The Tucker forms to choose from for this input, from coarse to fine."""
    return [Asi(ranks=ranks, published=config.reproduce) for ranks in ranks_offered(x, config.energy)]
