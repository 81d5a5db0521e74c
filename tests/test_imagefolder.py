"""Pictures in folders: the three layouts, decoding, workers, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from palmette.data import load_source
from palmette.data.folder import read_picture
from palmette.errors import DataError, InputError

COLOURS = {"apple": (200, 0, 0), "pear": (0, 200, 0), "plum": (0, 0, 200)}


def fill(folder, count, *, suffix=".png", size=(20, 16)):
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            shade = tuple(min(255, c + index) for c in colour)  # no two pictures are equal
            Image.new("RGB", size, shade).save(folder / name / f"{index}{suffix}")


def shades(loader):
    return {tuple((x[:, 0, 0] * 255).round().int().tolist()) for xs, _ in loader for x in xs}


def load(folder, options="", **keywords):
    return load_source(f"imagefolder:{folder}?norm=none&augment=none&size=8{options}", **keywords)


def test_labels_follow_the_sorted_folder_names(tmp_path):
    fill(tmp_path / "train", 4)
    fill(tmp_path / "val", 2)
    fill(tmp_path / "test", 2)
    data = load(tmp_path)
    assert data.classes == ("apple", "pear", "plum")
    for x, y in data.train:
        assert torch.equal(x[:, :, 0, 0].argmax(1), y)
    assert [len(part.dataset) for part in (data.train, data.val, data.test)] == [12, 6, 6]


def test_val_is_halved_where_there_is_no_test(tmp_path):
    fill(tmp_path / "train", 4)
    fill(tmp_path / "valid", 6)
    data = load(tmp_path)
    assert len(data.train.dataset) == 12
    assert not shades(data.val) & shades(data.test)
    assert len(shades(data.val) | shades(data.test)) == 18
    for part in (data.val, data.test):
        assert torch.bincount(part.dataset.labels).tolist() == [3, 3, 3]


def test_one_folder_is_cut_in_three(tmp_path):
    fill(tmp_path, 20)
    data = load(tmp_path)
    assert [len(part.dataset) for part in (data.train, data.val, data.test)] == [48, 6, 6]
    parts = [shades(part) for part in (data.train, data.val, data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    assert parts[1] == shades(load(tmp_path, seed=9).val)


def test_pictures_are_cut_in_the_centre(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 30:50] = 255  # a white stripe down the middle
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png", (20, 20))
    assert picture.shape == (3, 20, 20)
    assert picture.dtype == torch.uint8
    bright = (picture[0, 10] > 127).nonzero().flatten().tolist()
    assert bright[0] == 19 - bright[-1]  # symmetric
    assert 9 in bright


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", (4, 4)).eq(255).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reseeded_loader_yields_the_same_batches(tmp_path, workers):
    fill(tmp_path, 10, size=(8, 8))
    pixels = np.random.RandomState(0).randint(0, 256, (12, 12, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "apple" / "0.png")
    loader = load_source(f"imagefolder:{tmp_path}?size=8&augment=flip-shift&batch=4&workers={workers}").train

    def drawn(seed):
        loader.generator.manual_seed(seed)
        return torch.cat([x for x, _ in loader])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_damaged_pictures_are_named(tmp_path):
    fill(tmp_path / "train", 2)
    fill(tmp_path / "val", 2)
    fill(tmp_path / "test", 2)
    broken = tmp_path / "val" / "pear" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = load(tmp_path)
    with pytest.raises(DataError, match=r"picture cannot be decoded \(at .*pear/1\.png\)"):
        list(data.val)


def test_a_class_that_train_lacks_is_named(tmp_path):
    fill(tmp_path / "train", 2)
    fill(tmp_path / "val", 2)
    (tmp_path / "val" / "quince").mkdir()
    with pytest.raises(DataError, match="class 'quince' has no folder in train"):
        load(tmp_path)


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(DataError, match="no folder per class"):
        load(tmp_path)
    (tmp_path / "apple").mkdir()
    (tmp_path / "apple" / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match="no pictures"):
        load(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="imagefolder needs a folder"):
        load_source("imagefolder")
