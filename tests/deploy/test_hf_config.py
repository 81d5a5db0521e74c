"""Configs for fewer layers: which attribute counts them, which lists are cut, and how names are numbered anew."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import nn

from palmette import compat
from palmette.deploy.hf_config import Kept, renumbered, shortened

pytest.importorskip("transformers", reason="transformers is not installed")

SIZES: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 3, "intermediate_size": 32, "vocab_size": 50}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {**SIZES, "num_attention_heads": 3}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {
            **SIZES,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
}


@functools.cache
def model_of(family: str) -> nn.Module:
    name, options = MODELS[family]
    kind = getattr(compat.transformers(), name)
    model: nn.Module = kind(kind.config_class(**options)).eval()
    return model


def test_names_are_counted_anew() -> None:
    kept = [Kept("encoder.layer", 4, (1, 3))]
    assert renumbered("encoder.layer.3.attention.weight", kept) == "encoder.layer.1.attention.weight"
    assert renumbered("encoder.layer.2.attention.weight", kept) is None
    assert renumbered("encoder.layer.1", kept) == "encoder.layer.0"
    assert renumbered("encoder.layers.2.weight", kept) == "encoder.layers.2.weight"


def test_the_attribute_is_found_among_others_of_the_same_value() -> None:
    model = model_of("bert")
    assert model.config.num_attention_heads == model.config.num_hidden_layers == 3
    (config,) = shortened(model, [Kept("bert.encoder.layer", 3, (0, 2))])
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 3)
    assert model.config.num_hidden_layers == 3


def test_lists_with_an_entry_per_layer_are_cut() -> None:
    config = next(shortened(model_of("qwen2"), [Kept("model.layers", 3, (0, 1))]))
    assert config.num_hidden_layers == 2
    assert config.layer_types == ["full_attention", "sliding_attention"]
    config = next(shortened(model_of("qwen2"), [Kept("model.layers", 3, (1,))]))
    assert config.layer_types == ["sliding_attention"]


def test_layers_that_differ_in_shape_do_not_change_places() -> None:
    model = model_of("swin")
    assert list(shortened(model, [Kept("swin.encoder.layers", 2, (1,))])) == []
