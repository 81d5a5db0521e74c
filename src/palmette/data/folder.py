"""Pictures in one folder per class, decoded by Pillow when they are needed and kept in memory where they fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from palmette.compat import optional
from palmette.data.loaders import Batch, Data, from_datasets
from palmette.data.options import IMAGENET, Options
from palmette.data.sources import carve, limited
from palmette.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
DEFAULT_SIZE = (224, 224)
KEEP_BYTES = 1 << 30  # decoded pictures of one split are kept up to this size
Entry = tuple[Path, int]  # file, label


class FolderDataset(Dataset[Batch]):
    """Pictures as uint8 [3, H, W]: resized until an eighth overlaps the wanted shape, then cut in the centre."""

    def __init__(self, entries: Sequence[Entry], size: tuple[int, int], *, keep: bool) -> None:
        self.files = [file for file, _ in entries]
        self.labels = torch.tensor([label for _, label in entries], dtype=torch.int64)
        self.size = size
        self._keep = keep and len(entries) * 3 * size[0] * size[1] <= KEEP_BYTES
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        picture = self._kept.get(index)
        if picture is None:
            picture = read_picture(self.files[index], self.size)
            if self._keep:
                self._kept[index] = picture
        return picture, self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return torch.stack([self[i][0] for i in indices]), self.labels[torch.tensor(indices)]


def read_picture(file: Path, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] of `size` (height, width). Raises DataError naming a file that cannot be decoded."""
    image_module: Any = optional("PIL.Image", package="pillow")
    height, width = size
    try:
        with image_module.open(file) as opened:
            opened.draft("RGB", (width * 2, height * 2))  # lets JPEG decode at a fraction of a large picture
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise DataError("picture cannot be decoded", where=str(file), why=" ".join(str(error).split())) from error
    scale = max(height / picture.height, width / picture.width) * 8 / 7
    shape = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    picture = picture.resize(shape, image_module.Resampling.BILINEAR)
    left, top = (shape[0] - width) // 2, (shape[1] - height) // 2
    pixels = np.array(picture.crop((left, top, left + width, top + height)), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def imagefolder(folder: Path, options: Options, *, size: tuple[int, int] | None, batch: int, seed: int) -> Data:
    """Loaders over DIR/train/CLASS/*, DIR/val/CLASS/*, DIR/test/CLASS/*.

    Without test, val is cut into two disjoint halves (a trained network has seen train, so nothing is chosen there);
    without val, a tenth of train is set aside; without a train folder, DIR/CLASS/* is cut into 80, 10 and 10 per
    cent. The cuts are the same for every seed. Raises DataError for a missing or empty folder, and for a class that
    train lacks.
    """
    if not folder.is_dir():
        raise DataError("no such folder", where=str(folder))
    root = folder / "train" if (folder / "train").is_dir() else folder
    classes = tuple(sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")))
    if not classes:
        raise DataError(
            "no folder per class", where=str(root), fix="Put the pictures of each class in a folder of its name"
        )
    parts = {"train": _entries(root, classes)}
    if root != folder:
        for name, spellings in (("val", ("val", "valid", "validation")), ("test", ("test",))):
            found = next((folder / s for s in spellings if (folder / s).is_dir()), None)
            if found is not None:
                parts[name] = _entries(found, classes)
    parts = _complete(parts)
    size = options.size or size or DEFAULT_SIZE
    datasets = []
    for name in ("train", "val", "test"):
        labels = np.array([label for _, label in parts[name]], dtype=np.int64)
        kept = [parts[name][i] for i in limited(labels, options.limit(name), name=name)]
        datasets.append(FolderDataset(kept, size, keep=options.workers == 0))
    return from_datasets(
        "imagefolder",
        datasets,
        options,
        channels=3,
        size=size,
        norm=IMAGENET,
        classes=classes,
        augment="flip",
        shift=max(1, size[0] // 8),
        batch=batch,
        seed=seed,
    )


def _entries(folder: Path, classes: tuple[str, ...]) -> list[Entry]:
    found = {f.name: f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")}
    strangers = sorted(set(found) - set(classes))
    if strangers:
        raise DataError(f"class {strangers[0]!r} has no folder in train", where=str(folder))
    entries = [
        (file, label)
        for label, name in enumerate(classes)
        if name in found
        for file in sorted(found[name].rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if not entries:
        raise DataError(
            "no pictures", where=str(folder), why=f"looked for {', '.join(sorted(SUFFIXES))} in a folder per class"
        )
    return entries


def _complete(parts: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    parts = dict(parts)
    whole = len(parts["train"])
    if "val" in parts and "test" not in parts:
        parts["val"], parts["test"] = _cut(parts["val"], len(parts["val"]) // 2)
    for name in ("test", "val"):
        if name not in parts:
            parts["train"], parts[name] = _cut(parts["train"], max(1, whole // 10))
    return parts


def _cut(entries: list[Entry], count: int) -> tuple[list[Entry], list[Entry]]:
    rest, chosen = carve(np.array([label for _, label in entries], dtype=np.int64), count)
    return [entries[i] for i in rest], [entries[i] for i in chosen]
