"""Exports: files that compute what the network computes, or an error and no file."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palmette.deploy import OrtSession, Parity, export, export_onnx, export_program, load_program
from palmette.deploy.archive import code_in
from palmette.errors import DataError, ExportError, MissingDependency, RunError
from palmette.graph.capture import capture

SUFFIXES = (".onnx", ".pt2")


class Tokens(nn.Module):
    """Dict in, mapping out, with an entry that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None) -> Any:
        hidden = self.embed(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return OrderedDict(hidden=hidden, logits=self.head(hidden.mean(1)), cache=cache)


class Pair(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(a) + self.right(b), a


class Noisy(nn.Module):
    """Gives another answer at every call, so no file can agree with it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.randn_like(x[:, :3])


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)]
    return nn.Sequential(*body)


TOKENS = {"input_ids": torch.arange(14).reshape(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
CASES: dict[str, tuple[type[nn.Module] | Any, Any]] = {
    "tensor": (convnet, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))),
    "tuple": (Pair, (torch.randn(3, 6), torch.randn(3, 4))),
    "dict": (Tokens, TOKENS),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", CASES)
def test_export_agrees_at_every_batch_size(case: str, suffix: str, tmp_path: Path) -> None:
    build, inputs = CASES[case]
    parity = export(build(), inputs, tmp_path / f"m{suffix}")
    assert parity.relative_error < 1e-5
    assert parity.snr_db > 80
    assert parity.top1_agreement == 1.0
    assert parity.samples == (1 + 2 + 5) * 3
    assert parity.batches == (1, 2, 5)
    assert [p.name for p in tmp_path.iterdir()] == [f"m{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_single_image_as_example_still_gives_a_dynamic_batch(suffix: str, tmp_path: Path) -> None:
    export(convnet(), torch.randn(1, 3, 8, 8), tmp_path / f"m{suffix}")
    images = torch.randn(7, 3, 8, 8)
    run = OrtSession(tmp_path / "m.onnx") if suffix == ".onnx" else load_program(tmp_path / "m.pt2")
    output = run(images)
    logits = output[0] if isinstance(output, list) else output
    torch.testing.assert_close(logits, convnet().eval()(images), rtol=1e-4, atol=1e-5)


def test_the_model_of_the_caller_is_left_as_it_was(tmp_path: Path) -> None:
    model = convnet().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export(model, torch.randn(2, 3, 8, 8), tmp_path / "m.pt2")
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_captured_network_exports(suffix: str, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 8, 8)
    assert export(capture(convnet(), images), images, tmp_path / f"m{suffix}").relative_error < 1e-5


def test_names_of_inputs_outputs_and_batch_axis(tmp_path: Path) -> None:
    export_onnx(Tokens(), TOKENS, tmp_path / "m.onnx")
    session = OrtSession(tmp_path / "m.onnx", threads=1)
    assert session.input_names == ["input_ids", "attention_mask"]
    assert session.output_names == ["hidden", "logits"]
    onnx = pytest.importorskip("onnx")
    shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param == "batch"
    assert shape.dim[1].dim_value == 7
    with pytest.raises(ExportError, match="1 tensors were given"):
        session(torch.zeros(1, 7))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_say_nothing_of_this_machine_and_export_is_quiet(
    suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(convnet(), torch.randn(2, 3, 8, 8), tmp_path / f"m{suffix}")
    assert capfd.readouterr() == ("", "")
    content = (tmp_path / f"m{suffix}").read_bytes()
    assert b"site-packages" not in content
    assert b"stack_trace" not in content
    assert str(tmp_path).encode() not in content


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_real_batches_count_as_samples(suffix: str, tmp_path: Path) -> None:
    loader = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)) for _ in range(2)]
    parity = export(convnet(), torch.randn(2, 3, 8, 8), tmp_path / f"m{suffix}", batches=loader)
    assert parity.samples == (1 + 2 + 5) * 5
    wrong = [((torch.randn(4, 6), torch.randn(4, 4), torch.randn(4, 4)), torch.zeros(4))]
    with pytest.raises(DataError, match="does not look like the example"):
        export(Pair(), CASES["tuple"][1], tmp_path / f"w{suffix}", batches=wrong)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_vanishing_or_constant_outputs_are_no_parity(suffix: str, tmp_path: Path) -> None:
    for scale, bias in ((0.0, 1.0), (1e-9, 0.0)):
        model = nn.Linear(6, 3)
        with torch.no_grad():
            model.weight.mul_(scale)
            model.bias.fill_(bias)
        with pytest.raises(ExportError, match=r"not informative.*calibrate its batch norms"):
            export(model, torch.randn(2, 6), tmp_path / f"m{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failing_parity_keeps_the_old_file_and_leaves_no_new_one(suffix: str, tmp_path: Path) -> None:
    target = tmp_path / f"m{suffix}"
    with pytest.raises(ExportError, match="does not compute what the network computes"):
        export(Noisy(), torch.randn(2, 6), target)
    assert list(tmp_path.iterdir()) == []
    target.write_bytes(b"old")
    with pytest.raises(ExportError):
        export(Noisy(), torch.randn(2, 6), target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_network_that_is_not_finite_is_refused(suffix: str, tmp_path: Path) -> None:
    model = nn.Linear(6, 3)
    nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(ExportError, match="not finite"):
        export(model, torch.randn(2, 6), tmp_path / f"m{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_control_flow_on_values_is_named(suffix: str, tmp_path: Path) -> None:
    class Branching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x[:, :3]

    with pytest.raises(ExportError, match="cannot be") as caught:
        export(Branching(6, 3), torch.randn(2, 6), tmp_path / f"m{suffix}")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_unknown_suffix_and_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Use one of \.onnx, \.pt2"):
        export(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "m.tflite")
    (tmp_path / "file").write_text("")
    for suffix in SUFFIXES:
        with pytest.raises(RunError, match="cannot be written"):
            export(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "file" / f"m{suffix}")


def test_without_the_runtime_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"palmette\[onnx\]"):
        export_onnx(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")


def test_parity_prints_and_becomes_json() -> None:
    parity = Parity(relative_error=0.0, snr_db=float("inf"), top1_agreement=None, samples=24, spread=0.5, runtime="R")
    assert "no difference" in str(parity)
    assert "top-1" not in str(parity)
    assert json.loads(json.dumps(parity.to_dict(), allow_nan=False))["snr_db"] is None


# ------------------------------------------------------------------------------------------------- .pt2 and trust
def test_a_program_runs_in_a_process_without_palmette(tmp_path: Path) -> None:
    model, images = convnet().eval(), torch.randn(3, 3, 8, 8)
    export_program(capture(model, images), images, tmp_path / "m.pt2")
    torch.save({"images": images, "want": model(images).detach()}, tmp_path / "case.pt")
    script = """
        import sys
        sys.modules["palmette"] = None
        import torch
        case = torch.load("case.pt", weights_only=True)
        program = torch.export.load("m.pt2").module()
        for n in (1, 2, 3):
            torch.testing.assert_close(program(case["images"][:n]), case["want"][:n], rtol=1e-5, atol=1e-6)
        try:
            import palmette.graph
        except ImportError:
            print("ran alone")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ran alone", done.stderr


def test_a_program_holds_no_sample_inputs_and_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.pt2", "b.pt2"):
        export_program(convnet(), torch.randn(2, 3, 8, 8), tmp_path / name)
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        samples = [i for i in archive.infolist() if "sample_inputs" in i.filename]
    assert all(i.file_size == 0 for i in samples)
    assert torch.export.load(tmp_path / "a.pt2").example_inputs is None


def test_foreign_programs_need_trust(tmp_path: Path) -> None:
    program = torch.export.export(convnet().eval(), (torch.randn(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "foreign.pt2")
    with pytest.raises(ExportError, match=r"could carry code.*trust=True"):
        load_program(tmp_path / "foreign.pt2")
    assert load_program(tmp_path / "foreign.pt2", trust=True)(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def rewrite(source: Path, target: Path, old: str, new: str) -> None:
    """Copy an archive with `old` replaced by `new` in its program."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for info in before.infolist():
            content = before.read(info)
            if "/models/" in info.filename:
                assert old.encode() in content
                content = content.replace(old.encode(), new.encode(), 1)
            after.writestr(info.filename, content)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("torch.ops.aten.relu.default", "torch.hub.load", "it calls 'torch.hub.load'"),
        ("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default", "it calls"),
        ("torch.ops.aten.relu.default", "_operator.__class__", "it calls"),
        ("Symbol('", "__import__('os').system('", "it evaluates the formula"),
        ("Symbol('", "exec('", "it evaluates the formula"),
        ("builtins.tuple", "some.package.Kind", "of the type 'some.package.Kind'"),
        ('"guards_code": []', '"guards_code": ["print(1)"]', "objects of other packages"),
    ],
)
def test_programs_changed_to_run_code_are_refused(old: str, new: str, reason: str, tmp_path: Path) -> None:
    export_program(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "m.pt2")
    rewrite(tmp_path / "m.pt2", tmp_path / "bad.pt2", old, new)
    with pytest.raises(ExportError) as caught:
        load_program(tmp_path / "bad.pt2")
    assert reason in str(caught.value)


def test_added_members_are_refused(tmp_path: Path) -> None:
    export_program(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2", "a") as archive:
        archive.writestr("m/data/constants/custom_obj_0", b"")
    assert "member of unknown kind" in str(code_in(tmp_path / "m.pt2"))


def test_missing_truncated_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such file"):
        load_program(tmp_path / "m.pt2")
    export_program(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "m.pt2")
    whole = (tmp_path / "m.pt2").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "m.pt2").write_bytes(whole[:size])
        for trust in (False, True):
            with pytest.raises(ExportError) as caught:
                load_program(tmp_path / "m.pt2", trust=trust)
            assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="ONNX Runtime cannot load"):
        OrtSession(tmp_path / "m.pt2")


def test_nothing_is_unpickled_from_a_refused_file(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = io.BytesIO()
    torch.save(Opens(str(marker)), payload)
    export_program(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2") as before, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as after:
        for info in before.infolist():
            content = payload.getvalue() if "sample_inputs" in info.filename else before.read(info)
            after.writestr(info.filename, content)
    with pytest.raises(ExportError, match="pickled sample inputs"):
        load_program(tmp_path / "bad.pt2")
    assert not marker.exists()


class Opens:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")
