"""The user's own functions for models and data, and every way in which they can be wrong."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from torch import nn

from palmette.errors import DataError, InputError
from palmette.resolve import resolve_data, resolve_model


@pytest.fixture
def user_file(tmp_path):
    """Write the user's file and return its path."""

    def write(code, name="net.py"):
        file = tmp_path / name
        file.write_text(textwrap.dedent(code))
        return file

    return write


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
