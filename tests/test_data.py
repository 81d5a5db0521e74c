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

from palmette.data import HELP, decode_images, load_source
from palmette.data.loaders import Transform, random_flip, random_shift
from palmette.data.options import ARRAY_OPTIONS, FOLDER_OPTIONS, parse_options
from palmette.data.sources import carve, check_labels, digits, stratified
from palmette.errors import DataError, InputError

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


# --- loaders


def reseeded(loader, seed):
    loader.generator.manual_seed(seed)
    return list(loader)


@pytest.mark.parametrize("augment", ["none", "flip", "shift", "flip-shift"])
def test_a_reseeded_loader_yields_the_same_batches(augment):
    loader = load_source(f"digits?augment={augment}&train=200").train
    first = reseeded(loader, 3)
    torch.manual_seed(99)  # the global generator has no part in it
    torch.rand(7)
    again = reseeded(loader, 3)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    other = reseeded(loader, 4)
    assert not torch.equal(first[0][0], other[0][0])


def test_loaders_leave_the_global_generator_alone():
    data = load_source("digits?augment=flip-shift")
    before = torch.get_rng_state()
    for loader in (data.train, data.val, data.test, data.calibration):
        next(iter(loader))
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_of_a_source_decide_the_order():
    def first(seed):
        return next(iter(load_source("digits", seed=seed).train))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_validation_keeps_its_order_and_is_not_augmented():
    data = load_source("digits?augment=flip-shift&norm=none")
    source = digits(parse_options("", spec="digits"))
    for loader, part in ((data.val, source.val), (data.test, source.test)):
        x, y = everything(loader)
        assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(part.images))
        assert y.tolist() == part.labels.tolist()


def test_calibration_is_training_data_as_it_is():
    data = load_source("digits?augment=flip-shift&norm=none&calibration=64")
    plain = load_source("digits?norm=none&calibration=64")
    assert len(data.calibration.dataset) == 64
    assert pixel_set(data.calibration) == pixel_set(plain.calibration) <= pixel_set(plain.train)
    assert torch.equal(everything(data.calibration)[1], everything(data.calibration)[1])


def test_no_training_batch_holds_a_single_image():
    data = load_source("digits?train=65&batch=32")
    assert [len(y) for _, y in data.train] == [32, 32]
    assert [len(y) for _, y in load_source("digits?train=66&batch=32").train] == [32, 32, 2]
    assert sum(len(y) for _, y in load_source("digits?val=33&batch=32").val) == 33  # nothing is dropped where it counts


def test_example_inputs_look_like_the_batches():
    data = load_source("digits?size=12x10&channels=3")
    x, y = next(iter(data.val))
    assert data.example_inputs.shape == (2, 3, 12, 10)
    assert data.example_inputs.dtype == x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.shape[1:] == (3, 12, 10)


# --- transforms

batches = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 6), st.sampled_from([1, 3]), st.integers(2, 7), st.integers(2, 7))
)


@given(batches, st.integers(1, 3), st.integers(0, 99))
def test_shifts_move_each_image_as_a_whole(pixels, amount, seed):
    x = torch.from_numpy(pixels)
    shifted = random_shift(x, amount, torch.Generator().manual_seed(seed))
    rows, columns = torch.randint(2 * amount + 1, (2, len(x)), generator=torch.Generator().manual_seed(seed))
    height, width = x.shape[2:]
    for before, after, row, column in zip(x, shifted, rows.tolist(), columns.tolist(), strict=True):
        padded = torch.zeros(x.shape[1], height + 2 * amount, width + 2 * amount, dtype=torch.uint8)
        padded[:, amount : amount + height, amount : amount + width] = before
        assert torch.equal(after, padded[:, row : row + height, column : column + width])


@given(batches, st.integers(0, 99))
def test_flips_mirror_or_keep_each_image(pixels, seed):
    x = torch.from_numpy(pixels)
    flipped = random_flip(x, torch.Generator().manual_seed(seed))
    for before, after in zip(x, flipped, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(2))


def test_about_half_of_the_images_are_flipped():
    x = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3).repeat(2000, 1, 1, 1)
    share = (random_flip(x, torch.Generator().manual_seed(0)) != x).flatten(1).any(1).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.05)


@given(batches)
def test_normalise_scales_then_standardises(pixels):
    channels = pixels.shape[1]
    mean, std = (0.2, 0.4, 0.6)[:channels], (0.5, 0.25, 0.3)[:channels]
    transform = Transform(channels=channels, size=pixels.shape[2:], mean=mean, std=std)
    expected = (pixels / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert np.allclose(transform.normalise(torch.from_numpy(pixels)).numpy(), expected, atol=1e-5)


def test_grey_becomes_three_equal_channels_and_colour_becomes_grey():
    grey, colour = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    colour[:, 0] = 153
    to_three = Transform(channels=3, size=(4, 4), mean=(0.0,), std=(1.0,)).normalise(grey)
    assert to_three.shape == (2, 3, 4, 4)
    assert torch.allclose(to_three, torch.tensor(0.2))
    to_one = Transform(channels=1, size=(4, 4), mean=(0.0,), std=(1.0,)).normalise(colour)
    assert to_one.shape == (2, 1, 4, 4)
    assert torch.allclose(to_one, torch.tensor(0.2))


@pytest.mark.parametrize("size", [(3, 5), (16, 16), (8, 8)])
def test_resizing_keeps_a_flat_image_flat(size):
    x = torch.full((2, 1, 8, 8), 102, dtype=torch.uint8)
    y = Transform(channels=1, size=size, mean=(0.0,), std=(1.0,)).normalise(x)
    assert y.shape == (2, 1, *size)
    assert torch.allclose(y, torch.tensor(0.4))


# --- options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sze=3", r"unknown option 'sze'.*Known options: augment, batch"),
        ("size=a", "option size=a cannot be used.*whole number"),
        ("size=0", "at least 1"),
        ("size=3x4x5", "HEIGHTxWIDTH"),
        ("batch=0", "at least 1"),
        ("train=-5", "whole number"),
        ("channels=2", "must be one of 1, 3"),
        ("augment=twirl", "must be one of none, flip, shift, flip-shift"),
        ("norm=imagnet", "must be one of source, imagenet, half, none"),
        ("mean=0.5", "mean and std must be given together"),
        ("mean=0.5,0.5&std=1", "one number or three"),
        ("mean=nan&std=1", "one number or three"),
        ("mean=0.5&std=0", "above zero"),
        ("norm=half&mean=0.5&std=1", "either norm or mean and std"),
        ("size=8&size=9", "given twice"),
        ("size", "cannot be read"),
        ("mean=0.1,0.2,0.3&std=1,1,1", "mean has 3 values for 1 channel"),
    ],
)
def test_options_that_cannot_be_used(text, message):
    with pytest.raises(InputError, match=message) as error:
        load_source(f"digits?{text}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digits:here", "digits takes no folder"),
        ("cifar10", "cifar10 needs a folder.*cifar10:DIR"),
        ("cifr10:x", "Did you mean cifar10:DIR"),
        ("xyz", "Write digits, cifar10:DIR"),
        ("digits?workers=2", "unknown option 'workers'"),
    ],
)
def test_specs_that_cannot_be_used(spec, message):
    with pytest.raises(InputError, match=message):
        load_source(spec)


def test_named_norms_are_applied():
    raw = everything(load_source("digits?norm=none").val)[0]
    half = everything(load_source("digits?norm=half").val)[0]
    by_hand = everything(load_source("digits?mean=0.25&std=0.5").val)[0]
    colour = everything(load_source("digits?norm=imagenet&channels=3").val)[0]
    assert torch.allclose(half, (raw - 0.5) / 0.5, atol=1e-5)
    assert torch.allclose(by_hand, (raw - 0.25) / 0.5, atol=1e-5)
    assert torch.allclose(colour[:, 2:], (raw - 0.406) / 0.225, atol=1e-5)


def test_help_names_every_option():
    for name in (*ARRAY_OPTIONS, *FOLDER_OPTIONS):
        assert f"{name}=" in HELP


# --- real data


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
