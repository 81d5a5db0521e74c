"""Convolutions to identities: take out the convolutions whose weights are smallest.

Idea: between linearised activations every convolution makes the merged kernel larger; one that is replaced by the
identity does not, so that deep segments merge into small kernels. Those with the smallest weights go first.
Paper: Kim et al., "LayerMerge: Neural Network Depth Compression through Layer Pruning and Merging", ICML 2024 (arXiv
2406.12837), which keeps, for each kernel size, the convolutions of largest L1 norm. Differs: the norm is taken per
weight and relative to the mean over all candidates, so that layers of different width compare; linear layers that keep
the width are candidates, too; a batch norm behind stays.
Shapes: weights [C, C / groups, *kernel] at stride 1. Cost: nothing; the data is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from palmette.errors import DataError
from palmette.graph import Candidate
from palmette.graph.paths import Reader
from palmette.registry import MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class ConvIdentityConfig(MethodConfig):
    """There is nothing to choose."""


@method(
    name="conv_identity",
    title="LayerMerge: convolutions of small weight become identities",
    paper="Kim et al. LayerMerge. ICML 2024, arXiv 2406.12837",
    unit="mean |w| / mean over candidates",
    sites="convolution",
    edit="identity",
    config=ConvIdentityConfig,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],  # noqa: ARG001 - the interface of scores
    config: ConvIdentityConfig,  # noqa: ARG001
    *,
    seed: int,  # noqa: ARG001
) -> dict[str, float]:
    """L1 norm per weight of each convolution relative to the mean over all candidates; low = remove first.

    Raises DataError for weights that are not finite.
    """
    reader = Reader(captured)
    nodes = {str(n.meta["path"]): n for n in captured.graph.nodes if reader.is_affine(n)}
    norms = {
        c.name: sum(float(reader.parameters(nodes[s.path])[0].detach().double().abs().mean()) for s in c.sites)
        for c in candidates
    }
    mean = math.fsum(norms.values()) / max(len(norms), 1)
    if not math.isfinite(mean):
        raise DataError("a weight is not finite", fix="Look for NaN or infinite values in the weights")
    return {name: norm / mean if mean > 0 else 0.0 for name, norm in norms.items()}
