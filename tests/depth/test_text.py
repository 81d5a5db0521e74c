"""Transformers on text: padding changes no score and no fit, and a shrunk classifier loads with `from_pretrained`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader

import palmette as pm
from palmette import compat
from palmette.depth.block_influence import BlockInfluenceConfig
from palmette.graph import capture
from palmette.graph.inputs import call, main_output
from palmette.graph.plan import Plan, linearize
from palmette.registry import Method, get_method, methods
from palmette.train.loop import HealConfig

pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY, REAL = 40, 8


def bert(layers: int = 3, seed: int = 0, **options: Any) -> nn.Module:
    transformers = compat.transformers()
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "hidden_size": 16, "num_attention_heads": 2}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.BertConfig(**{**sizes, **rates, "num_hidden_layers": layers, **options})
        model = transformers.BertForSequenceClassification(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def sentences(length: int, count: int = 3) -> list[dict[str, Tensor]]:
    """The same sentences of 3 to 8 tokens, padded to `length` with tokens that differ from length to length."""
    generator, junk = torch.Generator().manual_seed(1), torch.Generator().manual_seed(length)
    batches = []
    for _ in range(count):
        words = torch.randint(2, VOCABULARY, (6, REAL), generator=generator)
        ids = torch.cat([words, torch.randint(VOCABULARY, (6, length - REAL), generator=junk)], 1)
        mask = torch.arange(length)[None] < torch.randint(3, REAL + 1, (6, 1), generator=generator)
        ids = torch.where(mask, ids, torch.randint(VOCABULARY, ids.shape, generator=junk))
        labels = torch.randint(2, (6,), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    return batches


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


@functools.cache
def captured(length: int) -> fx.GraphModule:
    return capture(bert(layers=2), inputs(sentences(length)[0])).eval()


def scores(method: Method, config: Any, length: int) -> dict[str, float]:
    batches, network = sentences(length), captured(length)
    longest = getattr(config, "longest", 1)
    pool = pm.candidates(network, inputs(batches[0]), kind=method.kind(config), longest=longest)
    return method.score(network, pool, batches, config, seed=0)


# Post-norm blocks cannot be parallelised, and `random` looks at no data.
SCORES = [
    m for m in methods("depth") if m.prepare is None and m.search is None and m.name not in ("random", "parallel")
]
FORMS = [
    *((m.name, {}) for m in SCORES),
    ("easier", {"zeros": "exclude", "position_first": True, "neurons": "lively"}),
    ("easier", {"aggregation": "batch", "weighting": "weight"}),
    ("easier", {"reproduce": True}),
    ("block_influence", {"sites": "layer"}),
]


@pytest.mark.parametrize(("name", "options"), FORMS, ids=[f"{n}-{'-'.join(map(str, o))}" for n, o in FORMS])
def test_padding_does_not_change_a_score(name: str, options: dict[str, Any]) -> None:
    method = get_method(name)
    config = method.make_config(**options)
    short, long = scores(method, config, REAL), scores(method, config, 13)
    assert short.keys() == long.keys()
    assert len(set(short.values())) > 1
    for site, value in short.items():
        assert long[site] == pytest.approx(value, abs=0.0 if method.unit == "bits" else 1e-6, rel=0), site


@pytest.mark.parametrize("fit", ["affine", "mask"])
def test_padding_does_not_change_a_fit(fit: str) -> None:
    plans = []
    for length in (REAL, 13):
        batches = sentences(length)
        plan = Plan([linearize("bert.encoder.layer.1.intermediate.intermediate_act_fn", fit=fit)])
        plans.append(next(iter(plan.fit(captured(length), batches, inputs(batches[0])))))
    assert plans[0].slope == pytest.approx(plans[1].slope, abs=1e-5)
    assert plans[0].offset == pytest.approx(plans[1].offset, abs=1e-5)


def test_a_mask_of_ones_is_no_mask() -> None:
    method = get_method("easier")
    batches = [{**b, "attention_mask": torch.ones_like(b["attention_mask"])} for b in sentences(13)]
    pool = pm.candidates(captured(13), inputs(batches[0]))
    everything = method.score(captured(13), pool, batches, method.make_config(), seed=0)
    without = method.score(captured(13), pool, [inputs(b) for b in sentences(13)], method.make_config(), seed=0)
    assert all(everything[site] != without[site] for site in everything)


class Task:
    """Sentences whose class is whether their first word stands in the upper half of the vocabulary."""

    def __init__(self) -> None:
        self.train, self.val, self.test = (self.loader(rows, seed) for seed, rows in enumerate((192, 96, 96)))

    def loader(self, rows: int, seed: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCABULARY, (rows, 10), generator=generator)
        mask = (torch.arange(10)[None] < torch.randint(4, 11, (rows, 1), generator=generator)).long()
        labels = (ids[:, 0] > VOCABULARY // 2).long()
        data = [
            {"input_ids": a, "attention_mask": b, "labels": c} for a, b, c in zip(ids * mask, mask, labels, strict=True)
        ]
        return DataLoader(data, batch_size=32, shuffle=seed == 0, generator=torch.Generator().manual_seed(seed))


def test_a_dry_run_ranks_whole_layers_and_trains_nothing() -> None:
    task, model = Task(), bert(layers=3)
    config = BlockInfluenceConfig(sites="layer")
    result = pm.shrink(model, task.train, task.val, method="block_influence", config=config, cost="macs", dry_run=True)
    assert sorted(row["name"] for row in result.ranking) == [f"bert.encoder.layer.{i}" for i in range(3)]
    assert result.expected_seconds is not None
    assert result.run_dir is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block_influence", "easier"])
def test_a_shrunk_classifier_of_text_loads_with_from_pretrained(name: str, tmp_path: Path) -> None:
    task, model = Task(), bert(layers=3, intermediate_size=64)
    pm.heal(model, task.train, HealConfig(epochs=4, lr=3e-3, optimizer="adamw"))
    config = BlockInfluenceConfig(sites="layer") if name == "block_influence" else None
    heal = HealConfig(epochs=1, lr=1e-3, optimizer="adamw")
    options: dict[str, Any] = {"method": name, "config": config, "cost": "macs", "max_drop": 50, "rounds": 2}
    result = pm.shrink(
        model, task.train, task.val, task.test, heal=heal, controls=False, run_dir=tmp_path / "run", **options
    )
    written = result.exports["huggingface"]
    assert written["standard"] == (name == "block_influence")
    assert written["relative_error"] < 1e-5
    auto = compat.transformers().AutoModelForSequenceClassification
    folder = tmp_path / "run" / "huggingface"
    loaded = auto.from_pretrained(folder, trust_remote_code=name == "easier").eval()
    assert sum(p.numel() for p in loaded.parameters()) == result.cost["params"] < result.dense_cost["params"]
    wrong = 0
    with torch.no_grad():
        for batch in task.test:
            ours, theirs = main_output(call(result.model, inputs(batch))), loaded(**inputs(batch)).logits
            assert torch.allclose(ours, theirs, atol=1e-5)
            wrong += int((theirs.argmax(1) != batch["labels"]).sum())
    assert 1 - wrong / 96 == pytest.approx(result.cost["accuracy"])
