"""Readers of image sets that fit in memory: scikit-learn's digits, CIFAR-10, Fashion-MNIST. No file is ever unpickled.

Shapes: images uint8 [N, C, H, W], labels int64 [N].
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from palmette.compat import optional
from palmette.data.options import Options
from palmette.errors import DataError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
SPLIT_SEED = (
    20_100  # splits and subsets are the same for every --seed: data that chooses must never move into data that reports
)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CIFAR10_BINARY_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] and labels int64 [N] in memory."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.NDArray[np.intp]) -> Split:
        """The chosen images, in the order of `indices`."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Source:
    """Three splits of one data set, and what its loaders need: classes, mean and std for 0..1, augmentation."""

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str


def stratified(labels: Labels, count: int, *, seed: int = SPLIT_SEED) -> npt.NDArray[np.intp]:
    """Sorted indices of `count` samples, classes in proportion, always the same ones for the same labels."""
    random = np.random.RandomState(seed)  # the one generator of numpy whose stream never changes
    values, sizes = np.unique(labels, return_counts=True)
    ideal = sizes * (count / len(labels))
    quota = np.floor(ideal).astype(int)
    quota[np.argsort(quota - ideal, kind="stable")[: count - int(quota.sum())]] += 1
    chosen = [random.permutation(np.flatnonzero(labels == value))[:k] for value, k in zip(values, quota, strict=True)]
    return np.sort(np.concatenate(chosen))


def carve(labels: Labels, count: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """(rest, chosen): two disjoint sets of indices that cover `labels`; `chosen` has `count`, classes in proportion."""
    chosen = stratified(labels, count)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def limited(labels: Labels, count: int | None, *, name: str) -> npt.NDArray[np.intp]:
    """Indices of `count` samples, all where None. Raises DataError when there are fewer."""
    if count is None or count == len(labels):
        return np.arange(len(labels))
    if count > len(labels):
        raise DataError(f"{name}={count} asks for more images than the {len(labels)} that there are")
    return stratified(labels, count)


def digits(options: Options) -> Source:
    """Scikit-learn's 1,797 handwritten digits, 1x8x8, split 1,077 / 360 / 360. No download."""
    bunch = optional("sklearn.datasets", package="palmette[demo]").load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]  # stored as 0..16
    everything = Split(images, bunch.target.astype(np.int64))
    rest, test = carve(everything.labels, 360)
    train, val = carve(everything.labels[rest], 360)
    parts = {"train": everything.take(rest[train]), "val": everything.take(rest[val]), "test": everything.take(test)}
    return _source(parts, options, tuple("0123456789"), (0.3053,), (0.3760,), "none")


def cifar10(folder: Path, options: Options) -> Source:
    """CIFAR-10, 3x32x32: from train*.npz, val.npz and test.npz, or from the official binary version.

    An npz holds `labels` and `images` or `images_coded` (decode_images). Where there is no val, 5,000 training images
    are set aside. Raises DataError for a missing or malformed file, and for the Python version, which is a pickle.
    """
    _need_folder(folder)
    binary = next((f for f in (folder, folder / "cifar-10-batches-bin") if (f / "data_batch_1.bin").is_file()), None)
    if list(folder.glob("train*.npz")):
        parts = {
            name: _read_npz(sorted(folder.glob(f"{name}*.npz")), options.limit(name), name)
            for name in ("train", "val", "test")
        }
    elif binary is not None:
        parts = {
            "train": _read_cifar_binary([binary / f"data_batch_{i}.bin" for i in range(1, 6)]),
            "test": _read_cifar_binary([binary / "test_batch.bin"]),
        }
    else:
        raise _no_cifar(folder)
    splits = {name: part for name, part in parts.items() if part is not None}
    for name in ("train", "test"):
        if name not in splits:
            raise DataError(f"no {name}.npz", where=str(folder))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _source(_with_val(splits), options, CIFAR10_CLASSES, mean, std, "flip-shift")


def fashion_mnist(folder: Path, options: Options) -> Source:
    """Fashion-MNIST, 1x28x28, from the four idx files, gzipped or not; 5,000 training images are set aside as val."""
    _need_folder(folder)
    parts = {}
    for name, stem in (("train", "train"), ("test", "t10k")):
        images = _read_idx(folder, f"{stem}-images-idx3-ubyte")
        labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte").astype(np.int64)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(f"{stem}: {images.shape} images do not fit {labels.shape} labels", where=str(folder))
        parts[name] = Split(images[:, None], labels)
    return _source(_with_val(parts), options, FASHION_CLASSES, (0.2860,), (0.3530,), "flip-shift")


def decode_images(coded: Images) -> Images:
    """Residuals uint8 [N, 3, H, W] to pixels, lossless; R and B are stored minus G, rows as differences mod 256."""
    pixels = coded.copy()
    pixels[:, :, :, 0] = np.cumsum(pixels[:, :, :, 0], axis=2, dtype=np.uint8)  # first column: running sum downwards
    pixels = np.cumsum(pixels, axis=3, dtype=np.uint8)  # each row: running sum to the right
    pixels[:, 0] += pixels[:, 1]
    pixels[:, 2] += pixels[:, 1]
    return pixels


def check_labels(labels: Labels, classes: int, *, where: str) -> None:
    """Raises DataError naming the first label that is not in 0..classes-1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(f"label {labels[wrong[0]]} of image {wrong[0]} is not in 0..{classes - 1}", where=where)


def _source(
    parts: dict[str, Split],
    options: Options,
    classes: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: str,
) -> Source:
    chosen = {}
    for name, part in parts.items():
        check_labels(part.labels, len(classes), where=name)
        indices = limited(part.labels, options.limit(name), name=name)
        chosen[name] = part if len(indices) == len(part) else part.take(indices)
    return Source(chosen["train"], chosen["val"], chosen["test"], classes, mean, std, augment)


def _with_val(parts: dict[str, Split]) -> dict[str, Split]:
    """A tenth of train, 5,000 at most, set aside as val where there is none."""
    if "val" in parts:
        return parts
    train = parts["train"]
    rest, val = carve(train.labels, min(5000, max(1, len(train) // 10)))
    return {"train": train.take(rest), "val": train.take(val), "test": parts["test"]}


def _need_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError("no such folder", where=str(folder))


def _no_cifar(folder: Path) -> DataError:
    pickles = [f for f in (folder / "data_batch_1", folder / "cifar-10-batches-py") if f.exists()]
    if pickles:
        return DataError(
            "the Python version of CIFAR-10 is refused",
            where=str(pickles[0]),
            why="its files are pickles, which can run any code when read",
            fix=f"Download the binary version, {CIFAR10_BINARY_URL}, unpack it and name its folder",
        )
    return DataError(
        "neither data_batch_1.bin nor train*.npz found",
        where=str(folder),
        fix=f"Download and unpack {CIFAR10_BINARY_URL}",
    )


def _read_npz(files: list[Path], limit: int | None, name: str) -> Split | None:
    if not files:
        return None
    images, labels, coded = [], [], False
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                coded = "images_coded" in arrays
                images.append(arrays["images_coded" if coded else "images"])
                labels.append(arrays["labels"].astype(np.int64))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError("not a readable npz with images and labels", where=str(file), why=_line(error)) from error
        if images[-1].dtype != np.uint8 or images[-1].ndim != 4 or len(images[-1]) != len(labels[-1]):
            raise DataError(
                f"{images[-1].dtype} images {images[-1].shape} for {len(labels[-1])} labels", where=str(file)
            )
    all_labels = np.concatenate(labels)
    chosen = limited(all_labels, limit, name=name)  # choose before decoding: most of the time goes there
    pixels = np.concatenate(images)[chosen]
    return Split(decode_images(pixels) if coded else pixels, all_labels[chosen])


def _read_cifar_binary(files: list[Path]) -> Split:
    """Records of 3,073 bytes: one label, then 3x32x32 pixels, R, G, B."""
    records = []
    for file in files:
        if not file.is_file():
            raise DataError("missing file of CIFAR-10's binary version", where=str(file))
        raw = np.fromfile(file, np.uint8)
        if not len(raw) or len(raw) % 3073:
            raise DataError(
                f"{len(raw)} bytes are not whole records of 3073 bytes", where=str(file), fix="Download it again"
            )
        records.append(raw.reshape(-1, 3073))
    table = np.concatenate(records)
    return Split(np.ascontiguousarray(table[:, 1:]).reshape(-1, 3, 32, 32), table[:, 0].astype(np.int64))


def _read_idx(folder: Path, name: str) -> Images:
    file = next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)
    if file is None:
        raise DataError(f"no {name}.gz", where=str(folder))
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
        kind, dims = raw[2], raw[3]
        shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    except (OSError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise DataError("not a whole idx file", where=str(file), why=_line(error)) from error
    if kind != 8 or len(raw) != 4 + 4 * dims + math.prod(shape):  # 8: unsigned bytes
        raise DataError("not a whole idx file of bytes", where=str(file), fix="Download it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
