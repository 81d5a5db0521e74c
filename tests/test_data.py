"""Data sources: what is read, how it is split, and that batches can be drawn again."""

from __future__ import annotations

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from palmette.data import decode_images, load_source
from palmette.data.options import parse_options
from palmette.data.sources import carve, check_labels, digits, stratified
from palmette.errors import DataError

RNG = np.random.RandomState(0)


def encode_images(pixels):
    """The inverse of decode_images: R and B minus G, then differences along rows and down the first column."""
    coded = pixels.copy()
    coded[:, 0] -= pixels[:, 1]
    coded[:, 2] -= pixels[:, 1]
    rows = coded.copy()
    rows[..., 1:] = coded[..., 1:] - coded[..., :-1]
    rows[:, :, 1:, 0] = coded[:, :, 1:, 0] - coded[:, :, :-1, 0]
    return rows


def images(n, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, 3, 32, 32)).astype(np.uint8)


def labels(n):
    return (np.arange(n) % 10).astype(np.uint8)


def write_npz(folder, *, coded=True, val=True):
    for name, n in (("train_0", 60), ("train_1", 40), ("val", 20), ("test", 30)):
        if val or name != "val":
            pixels = images(n, seed=n)
            content = {"images_coded": encode_images(pixels)} if coded else {"images": pixels}
            np.savez_compressed(folder / f"{name}.npz", labels=labels(n), **content)


def write_binary(folder, n=20):
    for index, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        table = np.concatenate([labels(n)[:, None], images(n, seed=index).reshape(n, -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(table.tobytes())


def write_idx(folder, *, zipped=True):
    for stem, n in (("train", 50), ("t10k", 20)):
        pixels = images(n, seed=n)[:, 0, :28, :28]
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels(n))):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            raw = head + np.ascontiguousarray(array).tobytes()
            file = folder / f"{stem}-{kind}-ubyte"
            if zipped:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(raw))
            else:
                file.write_bytes(raw)


def everything(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def pixel_set(loader):
    """The images of a loader with norm=none, as a set of bytes."""
    return {(x * 255).round().to(torch.uint8).numpy().tobytes() for x in everything(loader)[0]}


# --- reading


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9).map(lambda s: (s[0], 3, *s[1:]))))
def test_coded_images_decode_without_loss(pixels):
    assert np.array_equal(decode_images(encode_images(pixels)), pixels)


@pytest.mark.parametrize("coded", [True, False])
def test_npz_folder_reads_every_shard(tmp_path, coded):
    write_npz(tmp_path, coded=coded)
    data = load_source(f"cifar10:{tmp_path}?norm=none")
    x, y = everything(data.val)
    assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(images(20, seed=20)))
    assert torch.equal(y, torch.from_numpy(labels(20)).long())
    assert len(data.train.dataset) == 100
    assert len(data.test.dataset) == 30
    assert data.classes[3] == "cat"


def test_npz_without_val_sets_part_of_train_aside(tmp_path):
    write_npz(tmp_path, val=False)
    data = load_source(f"cifar10:{tmp_path}?norm=none&augment=none")
    assert len(data.train.dataset) == 90
    assert len(data.val.dataset) == 10
    assert not pixel_set(data.train) & pixel_set(data.val)


def test_binary_version_keeps_every_image_once(tmp_path):
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    write_binary(inner)
    written = {picture.tobytes() for index in range(5) for picture in images(20, seed=index)}
    outer = load_source(f"cifar10:{tmp_path}?norm=none&augment=none")
    inside = load_source(f"cifar10:{inner}?norm=none&augment=none", seed=7)
    for data in (outer, inside):
        assert pixel_set(data.train) | pixel_set(data.val) == written
        assert not pixel_set(data.train) & pixel_set(data.val)
    assert pixel_set(outer.val) == pixel_set(inside.val)  # the cut does not depend on the seed
    assert pixel_set(outer.test) == {picture.tobytes() for picture in images(20, seed=5)}


@pytest.mark.parametrize("nested", [False, True])
def test_python_version_of_cifar_is_refused_unread(tmp_path, nested):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-run"), "w"))

    folder = tmp_path / "cifar-10-batches-py" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"pickles, which can run any code .* binary version, https://.*binary"):
        load_source(f"cifar10:{tmp_path}")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_reads_idx_files(tmp_path, zipped):
    write_idx(tmp_path, zipped=zipped)
    data = load_source(f"fashion-mnist:{tmp_path}?norm=none")
    x, y = everything(data.test)
    assert torch.equal((x[:, 0] * 255).round().to(torch.uint8), torch.from_numpy(images(20, seed=20)[:, 0, :28, :28]))
    assert y.tolist() == labels(20).tolist()
    assert (len(data.train.dataset), len(data.val.dataset)) == (45, 5)


def test_digits_are_cut_into_disjoint_parts_that_cover_them():
    from sklearn.datasets import load_digits

    source = digits(parse_options("", spec="digits"))
    assert [len(part) for part in (source.train, source.val, source.test)] == [1077, 360, 360]
    parts = np.concatenate([source.train.images, source.val.images, source.test.images])[:, 0]
    whole = load_digits().images
    expected = sorted(np.rint(picture * 255 / 16).astype(np.uint8).tobytes() for picture in whole)
    assert sorted(picture.tobytes() for picture in parts) == expected
    for part in (source.val, source.test):
        assert np.ptp(np.bincount(part.labels)) <= 2  # classes in proportion


def test_digits_norm_gives_mean_zero_and_deviation_one():
    x, _ = everything(load_source("digits").calibration)
    assert x.mean().item() == pytest.approx(0, abs=0.02)
    assert x.std().item() == pytest.approx(1, abs=0.02)


# --- damaged and missing


def damage(folder, name, how):
    file = folder / name
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "gone":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.write_bytes(b"no such format at all")


SINGLE_FILES = [
    ("cifar10", write_npz, "test.npz"),
    ("cifar10", write_binary, "data_batch_3.bin"),
    ("cifar10", write_binary, "test_batch.bin"),
    ("fashion-mnist", write_idx, "train-images-idx3-ubyte.gz"),
    ("fashion-mnist", write_idx, "t10k-labels-idx1-ubyte.gz"),
]
DAMAGES = [(*file, how) for file in SINGLE_FILES for how in ("cut", "gone", "empty", "noise")]
DAMAGES += [
    ("cifar10", write_npz, "train_1.npz", how) for how in ("cut", "empty", "noise")
]  # fewer shards are less data


@pytest.mark.parametrize(("source", "write", "name", "how"), DAMAGES)
def test_damaged_files_are_named(tmp_path, source, write, name, how):
    write(tmp_path)
    damage(tmp_path, name, how)
    with pytest.raises(DataError) as error:
        load_source(f"{source}:{tmp_path}")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_idx_file_of_another_kind_is_refused(tmp_path):
    write_idx(tmp_path, zipped=False)
    file = tmp_path / "train-images-idx3-ubyte"
    raw = bytearray(file.read_bytes())
    raw[2] = 13  # floats
    file.write_bytes(raw)
    with pytest.raises(DataError, match="not a whole idx file of bytes"):
        load_source(f"fashion-mnist:{tmp_path}")


def test_npz_with_objects_is_refused_unread(tmp_path):
    write_npz(tmp_path)
    np.savez(tmp_path / "val.npz", images=np.array([{"a": 1}], dtype=object), labels=labels(1))
    with pytest.raises(DataError, match=r"val\.npz"):
        load_source(f"cifar10:{tmp_path}")


@given(st.lists(st.integers(-3, 14), min_size=1, max_size=30), st.integers(1, 12))
def test_labels_out_of_range_are_named(values, classes):
    array = np.array(values, dtype=np.int64)
    wrong = [(i, v) for i, v in enumerate(values) if not 0 <= v < classes]
    if not wrong:
        check_labels(array, classes, where="train")
        return
    with pytest.raises(DataError, match=rf"label {wrong[0][1]} of image {wrong[0][0]} is not in 0\.\.{classes - 1}"):
        check_labels(array, classes, where="train")


def test_source_with_a_wrong_label_is_refused(tmp_path):
    write_npz(tmp_path)
    np.savez(tmp_path / "val.npz", images=images(20), labels=np.full(20, 10, np.uint8))
    with pytest.raises(DataError, match=r"label 10 of image 0 is not in 0\.\.9 \(at val\)"):
        load_source(f"cifar10:{tmp_path}")


# --- splits


@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.data())
def test_stratified_subsets_keep_the_proportions(values, data):
    array = np.array(values, dtype=np.int64)
    count = data.draw(st.integers(0, len(values)))
    chosen = stratified(array, count)
    assert len(chosen) == len(set(chosen.tolist())) == count
    assert np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, stratified(array, count))
    for label in set(values):
        ideal = values.count(label) * count / len(values)
        assert abs(int((array[chosen] == label).sum()) - ideal) < 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_carving_leaves_nothing_out_and_nothing_twice(values, data):
    array = np.array(values, dtype=np.int64)
    rest, chosen = carve(array, data.draw(st.integers(0, len(values))))
    assert sorted([*rest.tolist(), *chosen.tolist()]) == list(range(len(values)))


def test_limits_take_the_same_images_for_every_seed():
    first, second = (load_source("digits?train=100&val=50&test=40&norm=none", seed=seed) for seed in (0, 1))
    for name, count in (("train", 100), ("val", 50), ("test", 40)):
        assert len(getattr(first, name).dataset) == count
        assert pixel_set(getattr(first, name)) == pixel_set(getattr(second, name))
    with pytest.raises(DataError, match="train=2000 asks for more images than the 1077"):
        load_source("digits?train=2000")


# --- real data


@pytest.mark.slow
def test_stored_network_reaches_its_accuracy_on_cifar10(palmette_data):
    import sys

    sys.path.insert(0, str(palmette_data))
    try:
        import networks
    finally:
        sys.path.remove(str(palmette_data))
    data = load_source(f"cifar10:{palmette_data}/cifar10?norm=imagenet&train=100&test=100&batch=250")
    model, _ = networks.build("cifar10_resnet20_akamaster")
    with torch.no_grad():
        correct = sum((model(x).argmax(1) == y).sum().item() for x, y in data.val)
    assert correct / 2000 == pytest.approx(0.9215, abs=1e-4)  # as documented beside the weights


def test_real_fashion_mnist_has_its_sizes(palmette_data):
    data = load_source(f"fashion-mnist:{palmette_data}/fashion_mnist")
    assert [len(part.dataset) for part in (data.train, data.val, data.test)] == [55_000, 5_000, 10_000]
    x, _ = next(iter(data.calibration))
    assert x.mean().item() == pytest.approx(0, abs=0.15)
