"""Learned matrices between kernels of one layer: a smaller kernel is more than the centre of a larger one.

Source: Once-for-All (ICLR 2020, section 3.3): one matrix for each step to a smaller kernel, shared by the channels of a
layer, the identity at first, chained from the largest kernel down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.graph.ops import module_of


class KernelTransforms(nn.Module):
    """`transforms(path, weight, size)` -> the weight [out, in, size, ...] of a layer whose kernel shrinks to `size`.

    weight: with its whole kernel, of any of the layer's channels. `sizes`: by path the edges that a kernel may have,
    ascending.
    """

    def __init__(self, gm: fx.GraphModule, sizes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.matrices = nn.ParameterDict()
        for node in gm.graph.nodes:
            path, layer = str(node.meta.get("path")), module_of(gm, node)
            if path not in sizes or layer is None:
                continue
            weight: Any = layer.weight
            for small, large in pairwise(sizes[path]):
                identity = torch.eye(small ** (weight.dim() - 2), dtype=weight.dtype, device=weight.device)
                self.matrices[_key(path, large, small)] = nn.Parameter(identity)

    def forward(self, path: str, weight: Tensor, size: int) -> Tensor:
        """Centre and matrix, from each kernel to the next smaller one."""
        for small, large in reversed(list(pairwise(self.sizes[path]))):
            if large <= size:
                break
            centre = weight[_centre(weight, small)]
            weight = (centre.flatten(2) @ self.matrices[_key(path, large, small)].T).view(centre.shape)
        return weight

    @torch.no_grad()
    def write(self, gm: fx.GraphModule, layers: Iterable[Mapping[str, Any]]) -> None:
        """Put into the centre of each kernel that a decision's `layers` shrink, in place, what it becomes."""
        kernels = {entry["path"]: entry["kernel"] for entry in layers if "kernel" in entry}
        for node in gm.graph.nodes:
            size, layer = kernels.get(node.meta.get("path")), module_of(gm, node)
            if size is None or layer is None:
                continue
            weight: Any = layer.weight
            weight[_centre(weight, size)] = self(node.meta["path"], weight, size)


def _centre(weight: Tensor, size: int) -> tuple[Any, ...]:
    off = (weight.shape[-1] - size) // 2
    return (..., *[slice(off, off + size)] * (weight.dim() - 2))


def _key(path: str, large: int, small: int) -> str:
    return f"{path.replace('.', '/')}:{large}-{small}"  # a name of a parameter holds no point
