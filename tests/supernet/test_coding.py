"""Configurations as text and as the papers' code."""

from __future__ import annotations

import numpy as np
import pytest

from palmette.errors import InputError
from palmette.supernet import COMPOFA, MOOFA, MOOFA_V2
from palmette.supernet.coding import from_text, one_hot, to_text


@pytest.mark.parametrize("space", [COMPOFA, MOOFA, MOOFA_V2], ids=lambda space: space.name)
def test_text_comes_back_as_the_same_network(samples, space):
    configs = samples.random_configs(space, 30)
    texts = to_text(space, configs)
    assert len(set(texts)) == 30
    for row, text in enumerate(texts):
        back = from_text(space, text)
        assert to_text(space, back) == [text]
        assert np.array_equal(one_hot(space, back), one_hot(space, configs.take([row])))


def test_text_names_resolution_and_blocks(samples):
    space = samples.small(expands=(1.5, 2))
    configs = ([[3, 0, 5, 3]], [[1.5, 0, 2, 1.5]], [[1, 2]], [12])
    assert to_text(space, configs_of(configs)) == ["12/k3e1.5/k5e2,k3e1.5"]


def configs_of(rows):
    from palmette.supernet import Configs

    return Configs(*(np.array(row) for row in rows))


def test_different_networks_have_different_texts_and_codes(samples):
    space = samples.small()
    networks = samples.every(space)
    assert len(set(to_text(space, networks))) == len(networks.depth) == 800
    assert len(np.unique(one_hot(space, networks), axis=0)) == 800


def test_the_code_has_the_papers_length_and_zeros_beyond_the_depth(samples):
    configs = samples.random_configs(MOOFA, 40)
    code = one_hot(MOOFA, configs)
    assert code.shape == (40, 124)
    assert np.array_equal(code.sum(1), 1 + 2 * configs.depth.sum(1))
    there = np.arange(4) < configs.depth[..., None]
    assert np.array_equal(code[:, 4:].reshape(40, 5, 4, 6).sum(-1), 2 * there)


@pytest.mark.parametrize(
    "text", ["", "12", "12/k3e1", "x/k3e1/k3e1", "12/k3e1/k3e1,k3e1,k3e1", "12/k3e1/k3", "12/k3e1/", "12/k9e1/k3e1"]
)
def test_text_that_is_no_configuration_is_refused(samples, text):
    with pytest.raises(InputError, match="space 'small'"):
        from_text(samples.small(), text)


def test_a_resolution_beyond_the_list_has_no_code(samples):
    space = samples.small()
    configs = samples.every(space)
    with pytest.raises(InputError, match="resolution 16 is not in the space"):
        one_hot(space, configs._replace(resolution=0 * configs.resolution + 16))
