"""A small vision transformer for CIFAR-10, trained from scratch on a CPU: the recipe behind the ViT rows of the tables.

Usage: PALMETTE_DATA=DIR python benchmarks/depth/vit.py [--runs DIR] [--epochs N] [--threads N]

Three strided convolutions make 16 tokens of an image, eight pre-norm blocks of width 160 follow (Xiao et al., "Early
Convolutions Help Transformers See Better", 2021: a ViT learns faster behind a convolutional stem). AdamW, cosine,
flip and shift. The weights go to RUNS/vit-cifar10.safetensors; a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from stored import folder

from palmette.models import TransformerBlock
from palmette.resolve import resolve_data
from palmette.train.evaluate import evaluate
from palmette.train.loop import HealConfig, heal

WIDTH, DEPTH, HEADS = 160, 8, 4
DATA = "cifar10:{}?norm=imagenet&augment=flip-shift&batch=128"


class StemVit(nn.Module):
    """Images [batch, 3, 32, 32] to logits: convolutional stem, positions, blocks, mean over tokens."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (3, WIDTH // 4, WIDTH // 2, WIDTH)
        for c_in, c_out in itertools.pairwise(channels):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.stem = nn.Sequential(*layers[:-1])
        self.positions = nn.Parameter(torch.zeros(1, 16, WIDTH))
        self.blocks = nn.Sequential(*[TransformerBlock(WIDTH, HEADS, 0.0) for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, classes]."""
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))  # type: ignore[no-any-return]


def vit() -> nn.Module:
    """The network without weights, for `palmette --model FILE:vit --weights ...`."""
    torch.manual_seed(0)
    return StemVit()


def trained(runs: Path, epochs: int = 12) -> Path:
    """Weights after `epochs` passes over the 50,000 training images; trained here where they are absent."""
    file = runs / "vit-cifar10.safetensors"
    if file.exists():
        return file
    runs.mkdir(parents=True, exist_ok=True)
    data = resolve_data(DATA.format(folder() / "cifar10"))
    network = vit()
    config = HealConfig(epochs=epochs, lr=1e-3, optimizer="adamw", weight_decay=0.05, warmup=0.05, clip=1.0)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    heal(network, data.train, config, loss_fn=loss, checkpoint=runs / "vit-checkpoint.safetensors", label="vit")
    seen = evaluate(network, data.val)
    print(f"ViT: {100 * seen.accuracy:.2f} % on {seen.n} validation images", flush=True)
    part = file.with_suffix(".part")
    save_file(network.state_dict(), str(part))
    part.replace(file)
    return file


def main() -> None:
    """Train, or say where the weights are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(trained(arguments.runs, arguments.epochs))


if __name__ == "__main__":
    main()
