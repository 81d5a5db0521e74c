"""Small spaces that can be enumerated, and random configurations."""

from __future__ import annotations

from itertools import product

import numpy as np

from palmette.supernet import Configs, StagedSpace


def small(**changes):
    """A space of 2 stages with at most 2 blocks: 800 networks."""
    figures = dict(
        name="small", stem=4, first=8, widths=(8, 16), strides=(1, 2), se=(False, True), final=24, last=16, classes=5,
        activations=("relu", "hard_swish"), kernels=(3, 5), expands=(1, 2), depths=(1, 2), resolutions=(8, 12),
    )  # fmt: skip
    return StagedSpace(**(figures | changes))


def random_space(seed):
    """A small space of any shape."""
    rng = np.random.default_rng(seed)
    stages = int(rng.integers(1, 3))

    def each(*choices):
        return tuple(choices[i] for i in rng.integers(len(choices), size=stages))

    return small(
        stem=each(3, 8)[0], widths=each(8, 16, 24), strides=each(1, 2), se=each(True, False), final=each(8, 96)[0],
        activations=each("relu", "hard_swish"), expands=(1, 3), tied=each(None, ((1, 1), (2, 3)))[0],
    )  # fmt: skip


def random_configs(space, n, seed=0):
    """Random configurations, dimension by dimension."""
    rng = np.random.default_rng(seed)
    kernel = rng.choice(space.kernels, (n, space.stages * space.blocks))
    expand = rng.choice(space.expands, kernel.shape)
    depth = rng.choice(space.depths, (n, space.stages))
    if space.tied:
        expand = np.repeat(np.vectorize(dict(space.tied).get)(depth), space.blocks, axis=1)
    return Configs(kernel, expand, depth, rng.choice(space.resolutions, n))


def every(space):
    """All different networks of a space, blocks that are not there zero."""
    allowed = dict.fromkeys(space.depths, space.expands) | {d: (e,) for d, e in space.tied or ()}
    stages = [
        (depth, [*blocks, *[(0, 0)] * (space.blocks - depth)])
        for depth in space.depths
        for blocks in product(product(space.kernels, allowed[depth]), repeat=depth)
    ]
    rows = list(product(product(stages, repeat=space.stages), space.resolutions))
    blocks = np.array([[pair for _, pairs in network for pair in pairs] for network, _ in rows])
    depth = np.array([[d for d, _ in network] for network, _ in rows])
    return Configs(blocks[..., 0], blocks[..., 1], depth, np.array([side for _, side in rows]))
