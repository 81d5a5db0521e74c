"""Import guards: each case in an interpreter of its own, since what is imported cannot be taken back."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap

import pytest

from palmette import compat
from palmette.errors import MissingDependency


def needs(*packages):
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


def run(code, *, path=None):
    """The last line that `code` prints in a fresh interpreter."""
    start = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def fake_torchvision(folder, body=""):
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(body)
    return package


def test_the_library_imports_without_the_zoos():
    code = """
        import sys
        import palmette, palmette.resolve, palmette.data, palmette.models, palmette.compat
        print(sorted({"torchvision", "timm", "transformers", "sklearn"} & set(sys.modules)))
    """
    assert run(code) == "[]"


@needs("torchvision")
def test_torchvision_imports_and_builds():
    code = """
        import torch
        from palmette import compat
        model = compat.torchvision().models.get_model("resnet18", weights=None).eval()
        assert compat.torchvision() is compat.torchvision()
        print(tuple(model(torch.zeros(1, 3, 32, 32)).shape), hasattr(torch.ops.torchvision, "nms"))
    """
    assert run(code) == "(1, 1000) True"


@needs("timm", "torchvision")
def test_timm_imports_and_builds():
    code = """
        import torch
        from palmette import compat
        model = compat.timm().create_model("mobilenetv2_050", num_classes=3).eval()
        print(tuple(model(torch.zeros(1, 3, 32, 32)).shape))
    """
    assert run(code) == "(1, 3)"


DECLARE = """
    import torch
    from palmette import compat
    first, second = compat.declare_missing_schemas(), compat.declare_missing_schemas()
    print(first, second, hasattr(torch.ops.torchvision, "nms"), hasattr(torch.ops.torchvision, "qnms"))
"""


@pytest.mark.parametrize("library", [None, b"", b"no library at all"])
def test_schemas_are_declared_once_where_the_library_does_not_load(tmp_path, library):
    package = fake_torchvision(tmp_path)
    if library is not None:
        (package / "_C.so").write_bytes(library)
    assert run(DECLARE, path=tmp_path) == "True False True True"


def test_nothing_is_declared_where_the_operators_exist(tmp_path):
    fake_torchvision(tmp_path)
    schema = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    healthy = f"""
    import torch
    library = torch.library.Library("torchvision", "DEF")
    library.define("{schema}")
    """
    assert run(textwrap.dedent(healthy) + textwrap.dedent(DECLARE), path=tmp_path) == "False False True False"


def test_nothing_is_declared_once_torchvision_is_imported(tmp_path):
    fake_torchvision(tmp_path)
    assert run("import torchvision\n" + textwrap.dedent(DECLARE), path=tmp_path) == "False False False False"


def test_absent_packages_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency, match=r"timm cannot be imported.*pip install 'palmette\[zoo\]'"):
        compat.timm()
    with pytest.raises(MissingDependency, match=r"no_such_package cannot be imported.*pip install 'thing'"):
        compat.optional("no_such_package.part", package="thing")


def test_a_package_that_breaks_on_import_is_reported(tmp_path):
    fake_torchvision(tmp_path, "raise ImportError('libc10_cuda.so is missing')")
    code = """
        from palmette import compat
        from palmette.errors import MissingDependency
        try:
            compat.torchvision()
        except MissingDependency as error:
            print(error)
    """
    assert "libc10_cuda.so is missing" in run(code, path=tmp_path)
