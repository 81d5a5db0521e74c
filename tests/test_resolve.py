"""From specifications to networks and data, and every way in which one can be wrong."""

from __future__ import annotations

import textwrap

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from palmette.errors import InputError, PalmetteError
from palmette.resolve import MODEL_HELP, check_input, resolve_model, resolve_pair


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
