"""A small BERT on SST-2: whole layers dropped, FFNs made linear, and the folder that Hugging Face loads.

Usage: PALMETTE_DATA=DIR python benchmarks/depth/text.py [--runs DIR] [--epochs N] [--threads N]

Six layers of width 128, with the words that stand twice in the 6,920 training sentences, trained from scratch (no
pretrained weights: what is measured is the shrinking, not SST-2). Then `palmette.shrink` by block influence of whole
layers, and by EASIER and by the affine residual on the FFNs; each with its two controls, chosen on the 872 sentences
of dev, reported on the 1,821 of test. The folder of each run is loaded by transformers and evaluated again. Results go
to benchmarks/results/depth_text.json; a run that was cut off goes on. About eleven minutes of one core.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from stored import folder

import palmette as pm
from palmette import compat
from palmette.files import read_json, write_json
from palmette.registry import get_method
from palmette.run import environment
from palmette.train.evaluate import evaluate
from palmette.train.loop import HealConfig, heal

RESULT = Path(__file__).resolve().parent.parent / "results" / "depth_text.json"
PAD, START, UNKNOWN = 0, 1, 2
LENGTH, BATCH = 32, 64
SIZES = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
HEAL = HealConfig(epochs=1, lr=2e-4, optimizer="adamw", weight_decay=0.01, warmup=0.05)
RUNS: dict[str, dict[str, Any]] = {
    "whole layers, block influence": {"method": "block_influence", "options": {"sites": "layer"}, "rounds": 3},
    "FFN linear, EASIER": {"method": "easier", "options": {}, "rounds": 1, "step": 4},
    "FFN linear, affine residual": {"method": "affine_residual", "options": {}, "rounds": 1, "step": 4},
}
MAX_DROP = 1.0


class Sentences:
    """SST-2 as batches of dicts (input_ids, attention_mask, labels), each row padded to LENGTH tokens."""

    def __init__(self, root: Path) -> None:
        self.rows = {split: self._read(root / f"{split}.tsv") for split in ("train", "dev", "test")}
        counts = Counter(word for text, _ in self.rows["train"] for word in words(text))
        known = sorted(word for word, count in counts.items() if count > 1)
        self.index = {word: number for number, word in enumerate(known, UNKNOWN + 1)}

    @staticmethod
    def _read(file: Path) -> list[tuple[str, int]]:
        lines = (line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines() if line)
        return [(text, int(label)) for text, label in lines]

    @property
    def vocabulary(self) -> int:
        """Number of tokens, the three special ones included."""
        return len(self.index) + UNKNOWN + 1

    def loader(self, split: str) -> DataLoader[dict[str, Tensor]]:
        """The batches of "train" (shuffled), "dev" or "test"."""
        rows = [self._row(text, label) for text, label in self.rows[split]]
        generator = torch.Generator().manual_seed(0)
        return DataLoader(rows, batch_size=BATCH, shuffle=split == "train", generator=generator)  # type: ignore[arg-type]

    def _row(self, text: str, label: int) -> dict[str, Tensor]:
        ids = [START, *(self.index.get(word, UNKNOWN) for word in words(text))][:LENGTH]
        mask = [1] * len(ids) + [PAD] * (LENGTH - len(ids))
        ids += [PAD] * (LENGTH - len(ids))
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(label)}


def words(text: str) -> list[str]:
    """Words and signs of a sentence, in small letters."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def classifier(vocabulary: int) -> nn.Module:
    """The network with random weights."""
    transformers = compat.transformers()
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=vocabulary, max_position_embeddings=LENGTH, num_labels=2, **SIZES)
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def trained(data: Sentences, runs: Path, epochs: int) -> nn.Module:
    """The dense network; trained here where its weights are absent."""
    model, file = classifier(data.vocabulary), runs / "text-sst2.safetensors"
    if not file.exists():
        runs.mkdir(parents=True, exist_ok=True)
        config = HealConfig(epochs=epochs, lr=5e-4, optimizer="adamw", weight_decay=0.01, warmup=0.1)
        heal(model, data.loader("train"), config, checkpoint=runs / "text-checkpoint.safetensors", label="text")
        part = file.with_suffix(".part")
        save_file(model.state_dict(), str(part))
        part.replace(file)
    model.load_state_dict(load_file(str(file)))
    return model.eval()


def shrunk(name: str, model: nn.Module, data: Sentences, runs: Path, threads: int) -> dict[str, Any]:
    """One run with its controls, and what transformers makes of its folder."""
    told = RUNS[name]
    place, begun = runs / f"text-{told['method']}", time.process_time()
    result = pm.shrink(
        model,
        data.loader("train"),
        data.loader("dev"),
        data.loader("test"),
        method=told["method"],
        config=get_method(told["method"]).make_config(**told["options"]),
        rounds=told["rounds"],
        step=told.get("step", 1),
        max_drop=MAX_DROP,
        heal=HEAL,
        run_dir=place,
        resume=(place / "run.json").exists(),
        threads=threads,
        say=print,
    )
    row: dict[str, Any] = {"name": name, "message": result.message, "rows": result.rows, "plan": len(result.plan)}
    row |= {"rounds": read_json(place / "figures.json")["rounds"], "export": result.exports.get("huggingface")}
    row["seconds"] = round(time.process_time() - begun, 1)
    if row["export"] and "error" not in row["export"]:
        auto = compat.transformers().AutoModelForSequenceClassification
        loaded = auto.from_pretrained(place / "huggingface", trust_remote_code=not row["export"]["standard"]).eval()
        seen = evaluate(loaded, data.loader("test"))
        row["reloaded"] = {"accuracy": seen.accuracy, "n": seen.n, "layers": len(loaded.bert.encoder.layer)}
        row["reloaded"]["parameters"] = sum(p.numel() for p in loaded.parameters())
    return row


def main() -> None:
    """Train, shrink, reload, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = Sentences(folder() / "text" / "sst2")
    model = trained(data, given.runs, given.epochs)
    seen = evaluate(model, data.loader("dev"))
    print(f"dense: {100 * seen.accuracy:.2f} % on {seen.n} sentences of dev", flush=True)
    rows = []
    for name in RUNS:
        rows.append(shrunk(name, model, data, given.runs, given.threads))
        print(line(rows[-1]), flush=True)
    facts = {"network": "BERT, 6 layers of width 128, from scratch", "data": "SST-2", "vocabulary": data.vocabulary}
    facts |= {"length": LENGTH, "epochs": given.epochs, "heal": HEAL.recipe(), "max_drop": MAX_DROP}
    write_json(RESULT, {"schema": 1, "environment": environment(), **facts, "runs": rows})


def line(row: dict[str, Any]) -> str:
    """What a run found, in a line."""
    cells = [f"{r['name']} {100 * r['accuracy']:.2f} %" for r in row["rows"]]
    again = f"; loaded again {100 * row['reloaded']['accuracy']:.2f} %" if "reloaded" in row else ""
    return f"{row['name']}: {', '.join(cells)}{again}"


if __name__ == "__main__":
    main()
