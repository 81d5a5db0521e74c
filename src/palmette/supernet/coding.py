"""Configurations as text, for files and eyes, and as the 0/1 code that predictors read."""

from __future__ import annotations

import re

import numpy as np

from palmette.errors import InputError
from palmette.supernet.staged import Array, Configs, StagedSpace


def to_text(space: StagedSpace, configs: Configs) -> list[str]:
    """Each configuration as text, the same for the same network: "160/k3e2,k7e2/k5e2,k3e4,k3e2/...".

    Raises InputError for a choice that the space does not have.
    """
    at = space.places(configs)
    names = np.array([[f"k{k}e{e:g}" for e in space.expands] for k in space.kernels])[at.kernel, at.expand]
    depths = np.array(space.depths)[at.depth]
    return [
        "/".join([str(side), *(",".join(stage[:d]) for stage, d in zip(row, depth, strict=True))])
        for side, row, depth in zip(at.resolutions[at.resolution], names, depths, strict=True)
    ]


def from_text(space: StagedSpace, text: str) -> Configs:
    """The configuration that `to_text` wrote, N = 1; blocks that are not there are zero. Raises InputError."""
    side, *stages = text.split("/")
    found = [[re.fullmatch(r"k(\d+)e(\d+(?:\.\d+)?)", block) for block in stage.split(",")] for stage in stages]
    depth = [len(stage) for stage in found]
    if not side.isdecimal() or len(found) != space.stages or max(depth) > space.blocks or not all(map(all, found)):
        raise InputError(f"{text!r} is no configuration", where=f"space {space.name!r}", fix='As "160/k3e2,k7e2/...".')
    blocks = np.zeros((2, space.stages, space.blocks))
    for s, stage in enumerate(found):
        blocks[:, s, : len(stage)] = np.array([match.groups() for match in stage if match], dtype=float).T
    kernel, expand = blocks.reshape(2, 1, -1)
    configs = Configs(kernel.astype(np.int64), expand, np.array([depth]), np.array([int(side)]))
    space.places(configs)
    return configs


def one_hot(space: StagedSpace, configs: Configs) -> Array:
    """The papers' code, float64 [N, R + S * B * (K + E)]: the resolution, then each block's kernel and expand.

    Blocks that are not there are all zero: 124 columns for MOOFA. Raises InputError for a choice or resolution that the
    space does not list.
    """
    at = space.places(configs, listed=True)
    side = np.eye(len(space.resolutions))[at.resolution]
    pair = (np.eye(len(space.kernels))[at.kernel], np.eye(len(space.expands))[at.expand])
    code = np.concatenate(pair, axis=-1) * at.active[..., None]
    return np.concatenate([side, code.reshape(len(side), -1)], axis=1)
