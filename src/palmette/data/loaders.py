"""Loaders that work on whole batches: one indexing, one augmentation and one normalisation per batch of uint8 images.

Per-sample transforms cost more than a small network's training step on two cores; here a batch of 64 CIFAR images
takes under a millisecond. Every random number comes from `loader.generator` (in worker processes, from torch's
generator, which the loader seeds from it): a loader re-seeded with `loader.generator.manual_seed(n)` yields the same
batches again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from palmette.data.options import NORMS, Options
from palmette.data.sources import Source, Split, limited
from palmette.errors import DataError, InputError

Batch = tuple[Tensor, Tensor]  # images float32 [B, C, H, W], labels int64 [B]
Loader = Iterable[Any]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a data source gives to a run. Loaders can be iterated again and again; `val` chooses, `test` only reports.

    `calibration` is training data without augmentation; `example_inputs` is a batch of 2; `num_classes` and `classes`
    are None and () where a user's loaders do not say.
    """

    name: str
    train: Loader
    val: Loader
    test: Loader | None
    calibration: Loader
    num_classes: int | None
    classes: tuple[str, ...]
    example_inputs: Any
    description: str


class BatchDataset(Protocol):
    """Images read by the batch: `labels` int64 [N], `__getitems__(indices)` -> (uint8 [B, C, H, W], int64 [B])."""

    labels: Tensor

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Batch: ...
    def __getitems__(self, indices: Sequence[int]) -> Batch: ...


class ArrayDataset(Dataset[Batch]):
    """A split in memory: uint8 [N, C, H, W] and int64 [N]."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = torch.tensor(split.images), torch.tensor(split.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.tensor(indices)
        return self.images[chosen], self.labels[chosen]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """uint8 [B, C, H, W] to float32 of the wanted channels and size, normalised; flips and shifts come first.

    `shift` is in pixels of the source; shifted-in pixels are black. Random numbers come from `generator`.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False
    shift: int = 0
    generator: torch.Generator | None = None

    def __call__(self, batch: Batch) -> Batch:
        """The batch as the network gets it."""
        images, labels = batch
        generator = (
            self.generator if get_worker_info() is None else None
        )  # a worker's copy would repeat in every worker
        if self.flip:
            images = random_flip(images, generator)
        if self.shift:
            images = random_shift(images, self.shift, generator)
        return self.normalise(images), labels

    def normalise(self, images: Tensor) -> Tensor:
        """What needs no random number: channels, mean and std, size (bilinear, antialiased when smaller)."""
        values = images.float()
        if self.channels != images.shape[1]:
            values = values.expand(-1, self.channels, -1, -1) if self.channels > 1 else values.mean(1, keepdim=True)
        mean, std = (torch.tensor(v).expand(self.channels).view(-1, 1, 1) for v in (self.mean, self.std))
        values = values * (1 / (255 * std)) - mean / std
        if tuple(values.shape[2:]) != self.size:
            smaller = self.size[0] < values.shape[2] or self.size[1] < values.shape[3]
            values = F.interpolate(values, self.size, mode="bilinear", align_corners=False, antialias=smaller)
        return values.contiguous()


def random_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirror each image of [B, C, H, W] left to right with probability one half."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)


def random_shift(images: Tensor, pixels: int, generator: torch.Generator | None = None) -> Tensor:
    """Move each image of [B, C, H, W] by up to `pixels` in both directions; what comes in is zero."""
    height, width = images.shape[2:]
    padded = F.pad(images, (pixels,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # view [B, C, 2p+1, 2p+1, H, W]
    rows, columns = torch.randint(2 * pixels + 1, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, rows, columns]


def make_loader(
    dataset: BatchDataset, transform: Transform, *, batch: int, shuffle: bool, workers: int = 0
) -> DataLoader[Batch]:
    """A loader over `dataset` by the batch, seeded by its own generator (the one of `transform`)."""
    drop_last = shuffle and len(dataset) > batch and len(dataset) % batch == 1  # batch norm cannot train on one sample
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # any object with these methods will do
        batch_size=batch,
        shuffle=shuffle,
        drop_last=drop_last,
        collate_fn=transform,  # type: ignore[arg-type]  # it gets what __getitems__ returns: one batch
        num_workers=workers,
        generator=transform.generator,
    )


def normalisation(
    options: Options, source_mean: tuple[float, ...], source_std: tuple[float, ...], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) with `channels` or 1 values each.

    Raises InputError when three values meet one channel or the other way round.
    """
    if options.mean is not None and options.std is not None:
        mean, std = options.mean, options.std
    elif options.norm in (None, "source"):
        mean, std = source_mean, source_std
    else:
        mean, std = NORMS[str(options.norm)]
    if channels == 1 and options.mean is None:  # a named norm of colours, on grey images: its average
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise InputError(f"{name} has {len(values)} values for {channels} channel{'s' if channels > 1 else ''}")
    return mean, std


def take(dataset: BatchDataset, count: int) -> BatchDataset:
    """`count` samples of `dataset` at most, always the same ones, classes in proportion."""
    return _Subset(dataset, limited(dataset.labels.numpy(), min(count, len(dataset)), name="calibration").tolist())


class _Subset(Dataset[Batch]):
    def __init__(self, dataset: BatchDataset, indices: list[int]) -> None:
        self.dataset, self.indices, self.labels = dataset, indices, dataset.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        return self.dataset[self.indices[index]]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.dataset.__getitems__([self.indices[i] for i in indices])


def from_source(
    name: str, source: Source, options: Options, *, size: tuple[int, int] | None, batch: int, seed: int
) -> Data:
    """Loaders over a source in memory. `size` (height, width) and `batch` hold where `options` do not say."""
    parts = [ArrayDataset(split) for split in (source.train, source.val, source.test)]
    native = (int(source.train.images.shape[2]), int(source.train.images.shape[3]))
    return from_datasets(
        name,
        parts,
        options,
        channels=int(source.train.images.shape[1]),
        size=options.size or size or native,
        norm=(source.mean, source.std),
        classes=source.classes,
        augment=source.augment,
        shift=max(1, native[0] // 8),  # 4 pixels at 32: the usual CIFAR recipe
        batch=batch,
        seed=seed,
    )


def from_datasets(
    name: str,
    parts: Sequence[BatchDataset],
    options: Options,
    *,
    channels: int,
    size: tuple[int, int],
    norm: tuple[tuple[float, ...], tuple[float, ...]],
    classes: tuple[str, ...],
    augment: str,
    shift: int,
    batch: int,
    seed: int,
) -> Data:
    """Loaders over (train, val, test) datasets.

    Raises DataError for an empty split, InputError for options that contradict.
    """
    for split, part in zip(("train", "val", "test"), parts, strict=True):
        if not len(part):
            raise DataError(f"no {split} images", where=name)
    channels = options.channels or channels
    mean, std = normalisation(options, *norm, channels)
    chosen = options.augment or augment
    batch = options.batch or batch

    def loader(part: BatchDataset, offset: int, *, training: bool = False) -> DataLoader[Batch]:
        transform = Transform(
            channels=channels,
            size=size,
            mean=mean,
            std=std,
            flip=training and "flip" in chosen,
            shift=shift if training and "shift" in chosen else 0,
            generator=torch.Generator().manual_seed(seed * 8 + offset),
        )
        return make_loader(part, transform, batch=batch, shuffle=training, workers=options.workers)

    train, val, test = parts
    calibration = loader(take(train, options.calibration), 3)
    plain = Transform(channels=channels, size=size, mean=mean, std=std)
    counts = ", ".join(f"{split} {len(part):,}" for split, part in zip(("train", "val", "test"), parts, strict=True))
    return Data(
        name=name,
        train=loader(train, 0, training=True),
        val=loader(val, 1),
        test=loader(test, 2),
        calibration=calibration,
        num_classes=len(classes),
        classes=classes,
        example_inputs=plain.normalise(train.__getitems__([0, min(1, len(train) - 1)])[0]),
        description=f"{name}: {counts}; {channels}x{size[0]}x{size[1]}, {len(classes)} classes, "
        f"augment {chosen}, batch {batch}",
    )
