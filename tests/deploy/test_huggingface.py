"""Folders for Hugging Face: what was dropped or merged loads with `from_pretrained` and answers as before."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palmette import compat
from palmette.deploy.huggingface import CODE, NOTE, HuggingFaceReport, is_hugging_face, save_pretrained
from palmette.errors import ExportError, InputError
from palmette.files import TEMPORARY_PREFIX
from palmette.graph import Plan, candidates, capture, collapse, drop, find_sites, linearize
from palmette.graph.inputs import call, main_output

pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 32}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32, "num_labels": 5}
IMAGE = {"image_size": 16, "patch_size": 8, "num_labels": 5}
GPT = {
    "vocab_size": 50,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
QWEN = {
    **SIZES,
    "vocab_size": 50,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "use_sliding_window": True,
    "sliding_window": 4,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "AutoModelForSequenceClassification", {**SIZES, **TEXT}),
    "masked": ("BertForMaskedLM", "AutoModelForMaskedLM", {**SIZES, **TEXT}),
    "roberta": ("RobertaForSequenceClassification", "AutoModelForSequenceClassification", {**SIZES, **TEXT}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "AutoModelForSequenceClassification",
        {**TEXT, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
    ),
    "vit": ("ViTForImageClassification", "AutoModelForImageClassification", {**SIZES, **IMAGE}),
    "gpt2": ("GPT2LMHeadModel", "AutoModelForCausalLM", GPT),
    "qwen2": (
        "Qwen2ForCausalLM",
        "AutoModelForCausalLM",
        {**QWEN, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "swin": (
        "SwinForImageClassification",
        "AutoModelForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
}


@functools.cache
def model_of(family: str) -> nn.Module:
    name, _, options = FAMILIES[family]
    kind = getattr(compat.transformers(), name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(kind.config_class(**options)).eval()
        for parameter in model.parameters():
            parameter.data += 0.25 * torch.randn_like(parameter)
    return model


@functools.cache
def network(family: str) -> tuple[nn.Module, Any, Any]:
    """The model, example inputs with padding, and the captured network."""
    model, (_, auto, options) = model_of(family), FAMILIES[family]
    generator = torch.Generator().manual_seed(1)
    if "image_size" in options:
        side = options["image_size"]
        example: dict[str, Any] = {"pixel_values": torch.randn(3, 3, side, side, generator=generator)}
    else:
        mask = torch.ones(3, 9, dtype=torch.long)
        mask[1, 5:] = 0
        example = {"input_ids": torch.randint(3, 50, (3, 9), generator=generator), "attention_mask": mask}
        example |= {"use_cache": False} if "CausalLM" in auto else {}
    return model, example, capture(model, example)


def shrunk(family: str, dropped: list[str] = (), linear: list[int] = (), layers: list[int] = ()) -> nn.Module:
    """The collapsed network without blocks (by path), FFN activations (by number), whole layers (by number)."""
    _, example, captured = network(family)
    sites = [s for s in find_sites(captured, example) if s.kind == "activation" and s.removable]
    whole = [site for i in layers for site in candidates(captured, example, kind="layer")[i].sites]
    edits = [drop(site) for site in [*dropped, *whole]] + [linearize(sites[i], fit="mask") for i in linear]
    batches = [{k: v for k, v in example.items() if isinstance(v, Tensor)}]
    plan = Plan(edits).fit(captured, [{**example, **b} for b in batches], example)
    return collapse(plan.apply(captured, example), cost="macs")[0].eval()


def blocks(family: str) -> list[str]:
    _, example, captured = network(family)
    return [s.path for s in find_sites(captured, example) if s.kind == "block" and s.removable]


def reloaded(family: str, folder: Path, report: HuggingFaceReport) -> Any:
    auto = getattr(compat.transformers(), FAMILIES[family][1])
    options = {} if report.standard else {"trust_remote_code": True}
    return auto.from_pretrained(folder, **options).eval()


def equal(small: nn.Module, loaded: nn.Module, example: Any, tolerance: float = 2e-6) -> None:
    with torch.no_grad():
        want, got = main_output(call(small, example)), main_output(call(loaded, example))
    assert torch.allclose(want, got, atol=tolerance * float(want.abs().max()), rtol=0)


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of folders is copied here rather than into the user's cache."""
    compat.transformers()
    module = importlib.import_module("transformers.dynamic_module_utils")
    monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


QUICK = ["bert", "vit", "gpt2"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "distilbert", "masked", "qwen2", "swin")]


@pytest.mark.parametrize("family", [*QUICK, *SLOW])
def test_whole_layers_leave_a_standard_folder(family: str, tmp_path: Path) -> None:
    model, example, dense = network(family)
    gone = [1] if family == "swin" else [0, 2]
    small = shrunk(family, layers=gone)
    report = save_pretrained(small, model, tmp_path / "folder", example, dense=dense)
    assert report.standard
    assert not (tmp_path / "folder" / CODE).exists()
    loaded = reloaded(family, tmp_path / "folder", report)
    assert type(loaded) is type(model)
    equal(small, loaded, example)
    ((container, kept),) = report.layers.items()
    count = len(model.get_submodule(container))
    assert len(loaded.get_submodule(container)) == count - len(gone)
    assert kept == [i for i in range(count) if i not in gone]
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []


@pytest.mark.slow
def test_a_layer_whose_place_matters_keeps_it(tmp_path: Path) -> None:
    """Every other layer of a Swin shifts its windows: the one behind the dropped one must not take its number."""
    model, example, dense = network("swin")
    small = shrunk("swin", layers=[0])
    report = save_pretrained(small, model, tmp_path / "folder", example, dense=dense)
    assert not report.standard
    assert report.skipped == ["swin.encoder.layers.0.blocks.0"]
    equal(small, reloaded("swin", tmp_path / "folder", report), example)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_a_decoder_generates_with_its_cache(family: str, tmp_path: Path) -> None:
    model, example, dense = network(family)
    report = save_pretrained(shrunk(family, layers=[1]), model, tmp_path / "folder", example, dense=dense)
    assert report.cache_error is not None
    assert report.cache_error < 1e-5
    loaded = reloaded(family, tmp_path / "folder", report)
    prompt = example["input_ids"][:1]
    told = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache, without = (loaded.generate(prompt, use_cache=cache, **told) for cache in (True, False))
    assert with_cache.shape == (1, prompt.shape[1] + 6)
    assert torch.equal(with_cache, without)


CHANGES: dict[str, dict[str, Any]] = {
    "merged": {"linear": [0, 2]},
    "attention": {"dropped": [2]},
    "ffn": {"dropped": [3]},
    "all": {"dropped": [4], "linear": [0], "layers": [1]},
}
CASES = [("bert", change) for change in CHANGES] + [("roberta", "all"), ("vit", "all")]
REST = [(family, change) for family in ("roberta", "distilbert", "vit") for change in CHANGES]


@pytest.mark.parametrize(
    ("family", "change"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST if case not in CASES)],
)
def test_what_goes_inside_a_layer_is_code_beside_the_weights(family: str, change: str, tmp_path: Path) -> None:
    model, example, dense = network(family)
    told = {**CHANGES[change], "dropped": [blocks(family)[i] for i in CHANGES[change].get("dropped", [])]}
    small = shrunk(family, **told)
    report = save_pretrained(small, model, tmp_path / "folder", example, dense=dense)
    assert not report.standard
    assert len(report.linear) == len(told.get("linear", []))
    loaded = reloaded(family, tmp_path / "folder", report)
    assert isinstance(loaded, type(model))
    equal(small, loaded, example)
    ours, theirs = (sum(p.numel() for p in net.parameters()) for net in (small, loaded))
    assert theirs <= ours + sum(p.numel() for n, p in loaded.named_parameters() if "orm" in n)


def test_a_folder_with_code_asks_for_trust_and_can_be_saved_again(tmp_path: Path) -> None:
    model, example, dense = network("bert")
    small = shrunk("bert", linear=[2])
    report = save_pretrained(small, model, tmp_path / "folder", example, dense=dense)
    auto = compat.transformers().AutoModelForSequenceClassification
    with pytest.raises(ValueError, match="trust_remote_code"):
        auto.from_pretrained(tmp_path / "folder", trust_remote_code=False)
    reloaded("bert", tmp_path / "folder", report).save_pretrained(tmp_path / "again")
    equal(small, reloaded("bert", tmp_path / "again", report), example)


def test_padded_inputs_of_another_length_are_answered_alike(tmp_path: Path) -> None:
    model, example, dense = network("bert")
    small = shrunk("bert", layers=[2], linear=[0])
    report = save_pretrained(small, model, tmp_path / "folder", example, dense=dense)
    loaded = reloaded("bert", tmp_path / "folder", report)
    wider = {k: nn.functional.pad(v, (0, 7), value=0) for k, v in example.items()}
    with torch.no_grad():
        assert torch.allclose(loaded(**wider).logits, main_output(call(small, example)), atol=1e-5)


@pytest.mark.slow
def test_without_palmette_and_without_example_inputs(tmp_path: Path) -> None:
    model, example, _ = network("vit")
    small = shrunk("vit", linear=[0], layers=[2])
    save_pretrained(small, model, tmp_path / "folder")
    torch.save(example["pixel_values"], tmp_path / "x.pt")
    code = f"""
        import sys
        sys.modules["palmette"] = None
        try:
            import transformers, torchvision
        except Exception:
            from torch.library import Library
            sys.modules.pop("torchvision", None)
            library = Library("torchvision", "DEF")
            for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                           "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
                library.define(schema)
            import transformers
        import torch
        auto = transformers.AutoModelForImageClassification
        model = auto.from_pretrained({str(tmp_path / "folder")!r}, trust_remote_code=True).eval()
        with torch.no_grad():
            torch.save(model(torch.load({str(tmp_path / "x.pt")!r})).logits, {str(tmp_path / "y.pt")!r})
    """
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment, capture_output=True)
    with torch.no_grad():
        want = main_output(call(small, example))
    assert torch.allclose(torch.load(tmp_path / "y.pt"), want, atol=1e-5)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_decoder_keeps_its_attentions(tmp_path: Path) -> None:
    model, example, dense = network("gpt2")
    small = shrunk("gpt2", dropped=[blocks("gpt2")[0]])
    with pytest.raises(ExportError, match="cache of keys and values"):
        save_pretrained(small, model, tmp_path / "folder", example, dense=dense)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_merged_is_refused(tmp_path: Path) -> None:
    model, example, dense = network("bert")
    plan = Plan([linearize("bert.encoder.layer.1.intermediate.intermediate_act_fn", fit="identity")])
    with pytest.raises(ExportError, match="collapse"):
        save_pretrained(plan.apply(dense, example), model, tmp_path / "folder", example, dense=dense)


def test_other_weights_than_the_network_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is held against the network: were a tensor lost on the way, there would be no folder."""
    model, example, dense = network("bert")
    small = shrunk("bert", layers=[1])
    whole = type(model).save_pretrained

    def damaged(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.bert.encoder.layer[0].output.dense.weight.mul_(1.5)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "save_pretrained", damaged)
    with pytest.raises(ExportError, match="does not compute"):
        save_pretrained(small, model, tmp_path / "folder", example, dense=dense)
    assert list(tmp_path.iterdir()) == []


def test_foreign_networks_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    model, example, dense = network("bert")
    with pytest.raises(InputError, match="palmette made"):
        save_pretrained(model, model, tmp_path / "folder", example)
    with pytest.raises(InputError, match="transformers model"):
        save_pretrained(dense, nn.Linear(2, 2), tmp_path / "folder", example)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="something else"):
        save_pretrained(dense, model, tmp_path / "mine", example)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_earlier_folder_is_replaced_and_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model, example, dense = network("bert")
    origin = tmp_path / "origin"
    model.save_pretrained(origin)
    (origin / "vocab.txt").write_text("a\nb\n")
    source = type(model).from_pretrained(origin).eval()
    for layers in ([0], [0, 1]):
        report = save_pretrained(shrunk("bert", layers=layers), source, tmp_path / "folder", example, dense=dense)
        assert len(reloaded("bert", tmp_path / "folder", report).bert.encoder.layer) == 3 - len(layers)
    assert (tmp_path / "folder" / "vocab.txt").read_text() == "a\nb\n"
    assert json.loads((tmp_path / "folder" / NOTE).read_text())["layers"] == {"bert.encoder.layer": [2]}
    shutil.rmtree(origin)


def test_nothing_of_the_working_folder_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model built from a config has no folder that it came from."""
    model, example, dense = network("bert")
    for name in ("config.json", "vocab.txt", "secrets.env"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    save_pretrained(shrunk("bert", layers=[0]), model, tmp_path / "folder", example, dense=dense)
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {"config.json", "model.safetensors", NOTE}


def test_only_files_of_tokenizers_and_processors_come_along(tmp_path: Path) -> None:
    model, example, dense = network("bert")
    origin = tmp_path / "origin"
    model.save_pretrained(origin)
    kept = {
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
    }
    kept |= {"added_tokens.json", "special_tokens_map.json", "preprocessor_config.json", "generation_config.json"}
    for name in (*kept, ".env", "train.log", "optimizer.pt", "notes.json", "trainer_state.json"):
        (origin / name).write_text("{}")
    source = type(model).from_pretrained(origin).eval()
    save_pretrained(shrunk("bert", layers=[0]), source, tmp_path / "folder", example, dense=dense)
    written = {"config.json", "model.safetensors", NOTE}
    assert {file.name for file in (tmp_path / "folder").iterdir()} == kept | written


def test_an_earlier_folder_outlives_a_failed_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example, dense = network("bert")
    small, folder = shrunk("bert", layers=[0]), tmp_path / "folder"
    save_pretrained(small, model, folder, example, dense=dense)
    before, move = {file.name: file.read_bytes() for file in folder.iterdir()}, Path.rename

    def refused(self: Path, target: Path) -> Path:
        if (self / NOTE).is_file() and Path(target) == folder and not folder.exists() and not moved:
            moved.append(self)
            raise OSError("the disk is full")
        return move(self, target)

    moved: list[Path] = []
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="disk is full"):
        save_pretrained(small, model, folder, example, dense=dense)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    save_pretrained(small, model, folder, example, dense=dense)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(TEMPORARY_PREFIX)] == []


def test_models_of_transformers_are_told_apart() -> None:
    assert is_hugging_face(model_of("bert"))
    assert not is_hugging_face(nn.Linear(2, 2))
