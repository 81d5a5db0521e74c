"""What the benchmarks of `adapt` share: networks, samples, and a results file that is written after every row."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stored

from palmette import compat
from palmette.errors import PalmetteError
from palmette.files import write_json
from palmette.run import environment

RESULTS = Path(__file__).resolve().parent.parent / "results"
NETWORKS = ("mcunet", "resnet18", "mobilenet_v2", "vit_b_32", "swin_t")
MIB = 2**20


class Rows:
    """Rows of a results file by their keys; a row that is there is not made again."""

    def __init__(self, name: str, about: str, wing: str = "adapt") -> None:
        self.file = RESULTS / f"{wing}_{name}.json"
        self.content: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {"rows": {}}
        self.content |= {"schema": 1, "about": about, "environment": environment()}

    def once(self, key: str, make: Callable[[], dict[str, Any]], *, again: bool = False) -> dict[str, Any]:
        """The row of this key; made, printed and written if it is not there. An error becomes a row that says so."""
        rows = self.content["rows"]
        if self.file.exists():  # another benchmark may have added to it
            rows |= {name: row for name, row in json.loads(self.file.read_text())["rows"].items() if name not in rows}
        if again or key not in rows:
            begun = time.perf_counter()
            try:
                row = make()
            except (PalmetteError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
                row = {"error": f"{type(error).__name__}: {error}"}
            rows[key] = {**row, "seconds": round(time.perf_counter() - begun, 2)}
            write_json(self.file, self.content)
            print(key, json.dumps(rows[key])[:400], flush=True)
        found: dict[str, Any] = rows[key]
        return found


def network(name: str, pixels: int | None = None) -> nn.Module:
    """A network in eval mode; with random weights, but for MCUNet, and running statistics of a few random batches."""
    if name == "mcunet":
        return stored.build("imagenet_mcunet-5fps_int8").eval()
    torch.manual_seed(0)
    model: nn.Module = getattr(compat.torchvision().models, name)(weights=None)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms and pixels is not None:
        for norm in norms:
            norm.momentum = None  # plain average
        model.train()
        with torch.no_grad():
            for _ in range(2):
                model(torch.randn(8, 3, pixels, pixels))
    last = model.get_submodule(head(model))
    if isinstance(last, nn.Linear) and not last.weight.any():  # ViT begins with zeros: nothing behind would be trained
        nn.init.trunc_normal_(last.weight, std=0.02)
    return model.eval()


def side(name: str) -> int:
    """Pixels of the inputs."""
    return 96 if name == "mcunet" else 224


def sample(batch: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Random images [batch, 3, pixels, pixels] and targets."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, pixels, pixels, generator=generator)
    return x, torch.randint(1000, (batch,), generator=generator)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The network's blocks, as one would checkpoint them."""
    wanted = {"BasicBlock", "InvertedResidual", "EncoderBlock", "SwinTransformerBlock", "MobileBlock", "Block"}
    return [m for m in model.modules() if type(m).__name__ in wanted]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def head(model: nn.Module) -> str:
    """Path of the last layer."""
    return list(layers(model))[-1]
