"""Networks from timm, torchvision and local Hugging Face folders."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file

from palmette.errors import InputError
from palmette.resolve import resolve_model, resolve_pair
from palmette.zoo import declared_shape


def needs(*packages):
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


@needs("timm", "torchvision")
@pytest.mark.parametrize("name", ["timm:mobilenetv2_050", "torchvision:resnet18"])
def test_makers_build_with_the_classes_of_the_data(name):
    resolved = resolve_model(name, num_classes=3, image_size=32)
    assert resolved.model(resolved.example_inputs).shape == (2, 3)
    assert declared_shape(name) == (3, 224, 224)
    assert resolve_model(name).example_inputs.shape == (2, 3, 224, 224)


@needs("timm", "torchvision")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:mobilnetv2_050", r"timm has no model .*Did you mean timm:mobilenetv2_050\?"),
        ("torchvision:resnet81", r"torchvision has no model .*Did you mean torchvision:resnet\d+\?"),
        ("torchvision:maskrcnn_resnet50_fpn", "torchvision has no model"),  # classifiers only
    ],
)
def test_makers_suggest_the_nearest(spec, message):
    with pytest.raises(InputError, match=message):
        resolve_model(spec)


@needs("timm", "torchvision")
def test_data_takes_the_size_that_the_model_declares_unless_told():
    _, data = resolve_pair("timm:resnet10t", "digits?channels=3&train=20&val=20&test=20")
    assert data.example_inputs.shape == (2, 3, *declared_shape("timm:resnet10t")[1:])
    _, data = resolve_pair("timm:resnet10t", "digits?channels=3&size=40&train=20&val=20&test=20")
    assert data.example_inputs.shape == (2, 3, 40, 40)
    _, data = resolve_pair("timm:resnet10t", "digits?channels=3&train=20&val=20&test=20", image_size=48)
    assert data.example_inputs.shape == (2, 3, 48, 48)


# --- Hugging Face

VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 1,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 100,
}


def hf_folder(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@needs("transformers")
def test_an_image_classifier_from_its_config(tmp_path):
    folder = hf_folder(tmp_path / "vit", VIT)
    resolved = resolve_model(f"hf:{folder}", num_classes=7)
    assert resolved.example_inputs.shape == (2, 1, 16, 16)
    assert resolved.model(resolved.example_inputs).logits.shape == (2, 7)
    pair, data = resolve_pair(f"hf:{folder}", "digits?train=50")
    assert data.example_inputs.shape == (2, 1, 16, 16)
    assert pair.model(data.example_inputs).logits.shape == (2, 10)


@needs("transformers")
def test_a_text_classifier_from_its_config(tmp_path):
    folder = hf_folder(tmp_path / "bert", BERT)
    resolved = resolve_model(f"hf:{folder}", num_classes=3)
    assert set(resolved.example_inputs) == {"input_ids", "attention_mask"}
    assert resolved.model(**resolved.example_inputs).logits.shape == (2, 3)


@needs("transformers")
def test_saved_weights_of_a_folder_are_used(tmp_path):
    folder = hf_folder(tmp_path / "vit", VIT)
    first = resolve_model(f"hf:{folder}").model
    first.save_pretrained(folder)
    again = resolve_model(f"hf:{folder}").model
    assert not again.training
    names = dict(first.named_parameters())
    assert all(torch.equal(names[name], tensor) for name, tensor in again.named_parameters())


@needs("transformers")
def test_a_folder_without_the_head_is_refused(tmp_path):
    folder = hf_folder(tmp_path / "vit", VIT)
    model = resolve_model(f"hf:{folder}").model
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"2 of the model's tensors are not in the folder.*classifier\.bias"):
        resolve_model(f"hf:{folder}")


@needs("transformers")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["ViTModel"]}, "not a classifier.*names ViTModel.*ForImageClassification"),
        ({"architectures": None}, "names no architecture"),
        ({"model_type": "no-such-type"}, "transformers cannot load the folder"),
        ({"hidden_size": "wide"}, "transformers cannot load the folder"),
    ],
)
def test_configs_that_cannot_be_used(tmp_path, change, message):
    folder = hf_folder(tmp_path / "vit", VIT | change)
    with pytest.raises(InputError, match=message) as error:
        resolve_model(f"hf:{folder}")
    assert "\n" not in str(error.value)


@needs("transformers")
def test_code_of_a_folder_runs_only_when_trusted(tmp_path):
    config = VIT | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    folder = hf_folder(tmp_path / "mine", config)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    with pytest.raises(InputError, match="Add --trust"):
        resolve_model(f"hf:{folder}")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_config_files_that_are_no_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        resolve_model(f"hf:{tmp_path}")
