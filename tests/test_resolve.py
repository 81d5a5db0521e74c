"""From specifications to networks and data, and every way in which one can be wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from palmette.errors import DataError, InputError, PalmetteError
from palmette.resolve import MODEL_HELP, check_input, resolve_data, resolve_model, resolve_pair
from palmette.zoo import declared_shape


def needs(*packages):
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


@pytest.fixture
def user_file(tmp_path):
    """Write the user's file and return its path."""

    def write(code, name="net.py"):
        file = tmp_path / name
        file.write_text(textwrap.dedent(code))
        return file

    return write


# --- the zoo


def test_palmette_networks_resolve_in_eval_mode():
    resolved = resolve_model("palmette:mlp", num_classes=4)
    assert not resolved.model.training
    assert resolved.spec == "palmette:mlp"
    assert resolved.example_inputs.shape == (2, 1, 8, 8)
    assert resolved.model(resolved.example_inputs).shape == (2, 4)


def test_zoo_networks_take_the_shape_of_the_data():
    for name in ("palmette:mlp", "palmette:digits-mlp", "palmette:cifar-vit", "palmette:digits-mobile"):
        resolved, data = resolve_pair(name, "digits?size=16&channels=3&train=100")
        assert resolved.example_inputs is data.example_inputs
        assert resolved.model(data.example_inputs).shape == (2, 10)


def test_weights_are_loaded(tmp_path):
    source = resolve_model("palmette:mlp").model
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    resolved = resolve_model("palmette:mlp", tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), resolved.model.parameters(), strict=True))
    with pytest.raises(InputError, match="no such weights file"):
        resolve_model("palmette:mlp", tmp_path / "none.pt")


def test_image_size_shapes_the_example():
    assert resolve_model("palmette:digits-mobile", image_size=20).example_inputs.shape == (2, 1, 20, 20)
    assert resolve_model("palmette:digits-mobile", image_size=(12, 20)).example_inputs.shape == (2, 1, 12, 20)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("palmette:mpl", r"Did you mean palmette:mlp\?"),
        ("palmett:mlp", r"Did you mean palmette:mlp\?"),
        ("resnet18", "Write palmette:NAME, timm:NAME"),
        ("palmette:", "Known: cifar-vit"),
        ("", "Write palmette:NAME, timm:NAME"),
        ("hf:/no/such/folder", "no config.json"),
    ],
)
def test_specs_that_name_nothing(spec, message):
    with pytest.raises(InputError, match=message) as error:
        resolve_model(spec)
    assert "\n" not in str(error.value)


def test_help_names_every_form():
    for form in ("palmette:NAME", "timm:NAME", "torchvision:NAME", "hf:PATH", "path/file.py:function"):
        assert form in MODEL_HELP


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


# --- the user's model


def test_user_function_returns_a_module(user_file):
    file = user_file("""
        from dataclasses import dataclass
        from torch import nn

        @dataclass
        class Width:
            value: int = 5

        def net():
            return nn.Linear(4, Width().value).train()
    """)
    resolved = resolve_model(f"{file}:net")
    assert isinstance(resolved.model, nn.Linear)
    assert not resolved.model.training
    assert resolved.example_inputs is None


def test_user_function_returns_example_inputs_too(user_file):
    file = user_file("""
        import torch
        def net():
            return torch.nn.Bilinear(3, 4, 2), (torch.zeros(2, 3), torch.zeros(2, 4))
    """)
    resolved = resolve_model(f"{file}:net")
    assert resolved.model(*resolved.example_inputs).shape == (2, 2)


def test_user_function_gets_the_arguments_that_it_names(user_file):
    file = user_file("""
        from torch import nn
        def net(num_classes=2):
            return nn.Linear(4, num_classes)
        def plain():
            return nn.Linear(4, 3)
    """)
    assert resolve_model(f"{file}:net", num_classes=7).model.out_features == 7
    assert resolve_model(f"{file}:net").model.out_features == 2
    assert resolve_model(f"{file}:plain", num_classes=7).model.out_features == 3


def test_files_of_one_name_do_not_meet_and_neighbours_can_be_imported(tmp_path):
    for name, width in (("a", 3), ("b", 5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"sizes_{name}.py").write_text(f"WIDTH = {width}\n")
        code = f"from torch import nn\nimport sizes_{name}\ndef net():\n    return nn.Linear(1, sizes_{name}.WIDTH)\n"
        (folder / "net.py").write_text(code)
    before = list(sys.path)
    widths = [resolve_model(f"{tmp_path / name}/net.py:net").model.out_features for name in ("a", "b", "a")]
    assert widths == [3, 5, 3]
    assert sys.path == before


@pytest.mark.parametrize(
    ("code", "function", "message"),
    [
        ("def net():\n    return 3\n", "net", r"returned a int.*Return an nn\.Module"),
        ("def net():\n    pass\n", "net", "returned None"),
        (
            "def net():\n    x = 1\n    return x / 0\n",
            "net",
            r"net\(\) of net\.py failed \(at .*net\.py:3\): ZeroDivision",
        ),
        ("def inner():\n    raise KeyError('k')\ndef net():\n    inner()\n", "net", r"net\.py:2\): KeyError: 'k'"),
        ("import json\ndef net():\n    return json.loads('{')\n", "net", r"net\.py:3\): JSONDecodeError"),
        ("import no_such_thing\n", "net", r"cannot be imported \(at .*net\.py:1\): ModuleNotFoundError"),
        ("x = 1\n\nraise SystemExit(3)\n", "net", r"cannot be imported \(at .*net\.py:3\): SystemExit: 3"),
        ("def net(:\n", "net", r"cannot be imported \(at .*net\.py:1\): SyntaxError"),
        ("def nett():\n    pass\ndef _hidden():\n    pass\n", "net", r"no function 'net' in net\.py.*functions: nett$"),
        ("net = 3\n", "net", "no function 'net'"),
        ("def net(width):\n    pass\n", "net", "missing 1 required positional argument: 'width'"),
        ("from torch import nn\ndef net():\n    return nn.ReLU(), 3\n", "net", "something else than example inputs"),
        ("def net():\n    raise ValueError('two\\nlines')\n", "net", "ValueError: two lines"),
    ],
)
def test_faults_of_user_code_are_one_line_with_its_place(user_file, code, function, message):
    file = user_file(code)
    with pytest.raises(InputError, match=message) as error:
        resolve_model(f"{file}:{function}")
    assert "\n" not in str(error.value)


def test_interrupts_pass_through_user_code(user_file):
    file = user_file("def net():\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        resolve_model(f"{file}:net")


def test_missing_user_files(tmp_path):
    with pytest.raises(InputError, match=r"no such file \(at .*none\.py\)"):
        resolve_model(f"{tmp_path}/none.py:net")
    with pytest.raises(InputError, match=r"no function is named .*Write path/file\.py:function"):
        resolve_data(f"{tmp_path}/none.py")


# --- the user's data

LOADERS = """
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    def loader(n=8, batch_size=4):
        return DataLoader(TensorDataset(torch.randn(n, 3), torch.arange(n) % 2), batch_size=batch_size)
"""


def data_file(user_file, code):
    return user_file(textwrap.dedent(LOADERS) + textwrap.dedent(code), name="mine.py")


@pytest.mark.parametrize(
    ("returned", "test"),
    [
        ("loader(), loader(6)", False),
        ("loader(), loader(6), loader(2)", True),
        ("[loader(), loader(6)]", False),
        ("dict(train=loader(), val=loader(6))", False),
        ("dict(train=loader(), val=loader(6), test=loader(2))", True),
        ("dict(train=loader(), val=loader(6), test=None)", False),
    ],
)
def test_user_loaders_in_every_form(user_file, returned, test):
    file = data_file(user_file, f"def data():\n    return {returned}\n")
    data = resolve_data(f"{file}:data")
    assert len(data.train.dataset) == 8
    assert len(data.val.dataset) == 6
    assert (data.test is not None) == test
    assert data.calibration is data.train
    assert data.example_inputs.shape == (2, 3)
    assert data.num_classes is None
    assert data.classes == ()


def test_user_loaders_may_say_more(user_file):
    file = data_file(
        user_file,
        """
        def data():
            return dict(train=loader(), val=loader(), calibration=loader(5), classes=["no", "yes"],
                        example_inputs=torch.ones(2, 3))
        def counted():
            return dict(train=loader(), val=loader(), num_classes=2)
        """,
    )
    data = resolve_data(f"{file}:data")
    assert data.classes == ("no", "yes")
    assert data.num_classes == 2
    assert len(data.calibration.dataset) == 5
    assert torch.equal(data.example_inputs, torch.ones(2, 3))
    assert resolve_data(f"{file}:counted").num_classes == 2


def test_user_data_gets_the_arguments_that_it_names(user_file):
    code = "def data(batch_size, seed, image_size=None):\n    assert (seed, image_size) == (5, (9, 9))\n"
    file = data_file(user_file, code + "    return loader(8, batch_size), loader()\n")
    assert resolve_data(f"{file}:data", batch_size=2, seed=5, image_size=9).train.batch_size == 2


def test_example_inputs_come_from_dict_batches(user_file):
    file = data_file(
        user_file,
        """
        def data():
            batches = [{"input_ids": torch.arange(12).view(4, 3), "labels": torch.zeros(4)}]
            return batches, batches
        """,
    )
    example = resolve_data(f"{file}:data").example_inputs
    assert torch.equal(example["input_ids"], torch.arange(6).view(2, 3))
    assert set(example) == {"input_ids"}


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("def data():\n    return 3\n", InputError, "returned a int.*Return loaders"),
        ("def data():\n    return [loader()]\n", InputError, "returned a list"),
        ("def data():\n    return dict(train=loader())\n", InputError, "returned a dict of train.*Return loaders"),
        ("def data():\n    return dict(train=loader(), val=None)\n", InputError, "train and val must be loaders"),
        (
            "def data():\n    return dict(train=loader(), val=loader(), tset=1)\n",
            InputError,
            "a dict of train, val, tset",
        ),
        (
            "def data():\n    return loader(), iter(loader())\n",
            DataError,
            "val is an iterator, which can be read only once",
        ),
        ("def data():\n    return loader(), 3\n", InputError, "val is a int, not a loader"),
        ("def data():\n    return loader(), torch.zeros(3)\n", InputError, "val is a Tensor, not a loader"),
        ("def data():\n    return loader(), []\n", DataError, "validation loader is empty"),
        ("def data():\n    return loader(), [3]\n", DataError, "batch of type int is not understood"),
        ("def data():\n    return 1 / 0\n", InputError, r"mine\.py:\d+\): ZeroDivisionError"),
    ],
)
def test_user_data_that_cannot_be_used(user_file, code, kind, message):
    file = data_file(user_file, code)
    with pytest.raises(kind, match=message) as error:
        resolve_data(f"{file}:data")
    assert "\n" not in str(error.value)


def test_a_user_loader_that_fails_is_reported(user_file):
    file = data_file(
        user_file,
        """
        class Broken:
            def __iter__(self):
                raise OSError("disk on fire")
                yield
        def data():
            return loader(), Broken()
        """,
    )
    with pytest.raises(DataError, match=r"failed at its first batch.*OSError: disk on fire"):
        resolve_data(f"{file}:data")


# --- do they fit


class Fixed(nn.Module):
    """Takes images of one size, as networks with learned positions do."""

    def __init__(self, channels=3, side=32):
        super().__init__()
        self.linear, self.norm = nn.Linear(channels * side * side, 10), nn.BatchNorm1d(10)

    def forward(self, x):
        return self.norm(self.linear(x.flatten(1)))


@pytest.mark.parametrize(
    ("channels", "side", "fix"),
    [(3, 32, r"\?size=32$"), (1, 8, r"\?channels=1$"), (3, 8, None), (1, 96, r"\?size=96&channels=1$")],
)
def test_refused_images_name_both_shapes(channels, side, fix):
    model, example = Fixed(channels, side), torch.zeros(2, 3, 8, 8)
    if fix is None:
        check_input(model, example)
        return
    match = rf"the model refuses images of 3x8x8 \(at model\): it accepts {channels}x{side}x{side} .*{fix}"
    with pytest.raises(InputError, match=match):
        check_input(model, example)


def test_a_declared_shape_is_tried_first():
    with pytest.raises(InputError, match=r"it accepts 3x20x24 .*size=20x24"):
        check_input(Narrow(20, 24), torch.zeros(2, 3, 8, 8), declared=(3, 20, 24))
    with pytest.raises(InputError, match=r"refuses images of 3x8x8 \(at model\): mat1"):
        check_input(Narrow(20, 24), torch.zeros(2, 3, 8, 8))


class Narrow(nn.Module):
    def __init__(self, height, width):
        super().__init__()
        self.linear = nn.Linear(3 * height * width, 10)

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_checking_changes_nothing():
    model = Fixed().train()
    model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check_input(model, torch.randn(2, 3, 32, 32), num_classes=10)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert not model.norm.training


def test_heads_of_another_width_are_refused():
    with pytest.raises(InputError, match=r"returns 10 outputs for an image, the data has 7 classes.*head"):
        check_input(Fixed(), torch.zeros(2, 3, 32, 32), num_classes=7)


def test_inputs_that_are_no_images_are_refused_with_the_reason():
    with pytest.raises(InputError, match=r"refuses the data's inputs.*mat1 and mat2"):
        check_input(nn.Linear(4, 2), torch.zeros(2, 3))


def test_pairs_that_do_not_fit_are_refused(user_file):
    file = user_file("""
        from torch import nn
        def net():
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    """)
    with pytest.raises(
        PalmetteError, match=r"refuses images of 1x8x8 \(at .*net.py:net on digits\).*size=32&channels=3"
    ):
        resolve_pair(f"{file}:net", "digits")
    resolved, data = resolve_pair(f"{file}:net", "digits?size=32&channels=3")
    assert resolved.model(data.example_inputs).shape == (2, 10)
    with pytest.raises(InputError, match="images of 9x9 cannot be cut"):
        resolve_pair("palmette:digits-mlp", "digits?size=9")


# --- real networks


def test_a_stored_network_resolves_from_a_user_file(palmette_data, user_file):
    file = user_file(f"""
        import sys
        sys.path.insert(0, {str(palmette_data)!r})
        import networks

        def net():
            return networks.build("cifar10_resnet20_akamaster")[0]
    """)
    spec = f"cifar10:{palmette_data}/cifar10?norm=imagenet&train=64&val=500&test=64"
    weights = palmette_data / "weights" / "cifar10_resnet20_akamaster.safetensors"
    resolved, data = resolve_pair(f"{file}:net", spec, weights)
    with torch.no_grad():
        correct = sum((resolved.model(x).argmax(1) == y).sum().item() for x, y in data.val)
    assert correct / 500 > 0.88
