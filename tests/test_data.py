import gzip
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from morse.training.batches import StepBatches, step_loader
from morse.training.data import open_images, to_model_range
from morse.training.idx import IDX_IMAGES, IDX_LABELS, fit_images, read_idx


def write_idx(path, array, magic=None):
    magic = (0x00000800 | array.ndim) if magic is None else magic
    content = b"".join(n.to_bytes(4, "big") for n in (magic, *array.shape)) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder_pads_and_chooses_the_split(tmp_path, pixels, suffix):
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", pixels)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", np.arange(7, dtype=np.uint8))
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", pixels[:2])

    train = open_images(tmp_path, None, 32, 1)
    test = open_images(tmp_path, None, 32, 1, split="test")

    assert (len(train), len(test)) == (7, 2)
    assert train.labels.tolist() == list(range(7)) and test.labels is None
    batch = train.__getitems__([3, 0])
    assert batch.shape == (2, 1, 32, 32) and batch.dtype == torch.uint8
    torch.testing.assert_close(batch[0, 0, 2:-2, 2:-2], torch.from_numpy(pixels[3]))
    assert batch.sum() == pixels[[3, 0]].sum(dtype=np.int64)  # the border is black
    torch.testing.assert_close(train[3], batch[0])


def test_idx_file_in_colour_and_resized(tmp_path, pixels):
    path = write_idx(tmp_path / "photos", pixels)
    assert open_images(path, None, 32, 3)[0].shape == (3, 32, 32)
    assert open_images(path, None, 14, 1)[0].shape == (1, 14, 14)
    assert open_images(path, None, 33, 1)[0].shape == (1, 33, 33)


def test_fit_crops_the_centre():
    images = torch.zeros(1, 1, 4, 8, dtype=torch.uint8)
    images[..., 2:6] = 200
    assert fit_images(images, 4).unique().tolist() == [200]


def test_range():
    values = to_model_range(torch.tensor([0, 255], dtype=torch.uint8))
    torch.testing.assert_close(values, torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("damage", ["magic", "short", "gzip", "empty"])
def test_broken_idx_is_named(tmp_path, pixels, damage):
    path = tmp_path / ("images.gz" if damage == "gzip" else "images")
    write_idx(path, pixels, magic=IDX_LABELS if damage == "magic" else None)
    if damage != "magic":
        size = 0 if damage == "empty" else path.stat().st_size // 2
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"images.*(magic number|damaged|cannot be read)"):
        read_idx(path, IDX_IMAGES)


def test_labels_must_fit_the_images(tmp_path, pixels):
    write_idx(tmp_path / "train-images-idx3-ubyte", pixels)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(6, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte has 6 labels for 7 images"):
        open_images(tmp_path, None, 28, 1)


def test_image_folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    picture = np.zeros((20, 40, 3), dtype=np.uint8)
    picture[:, 10:30, 0] = 255
    Image.fromarray(picture).save(tmp_path / "deep" / "er" / "b.PNG")
    Image.fromarray(picture[..., 0]).convert("P").save(tmp_path / "a.png")

    images = open_images(tmp_path, None, 8, 3)

    assert len(images) == 2 and images.labels is None
    assert images[1].shape == (3, 8, 8)
    red, green, blue = images[1][:, 1:-1, 1:-1].flatten(1)
    assert red.min() > 250 and green.max() == blue.max() == 0  # only the centre
    assert open_images(tmp_path, None, 8, 1)[0].shape == (1, 8, 8)

    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"c\.png cannot be read as an image"):
        open_images(tmp_path, None, 8, 3)[1]  # sorted: a, c, deep/er/b


def test_image_folder_with_two_splits(tmp_path):
    for name, value in (("train", 10), ("test", 20)):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4), value).save(tmp_path / name / "x.png")
    assert open_images(tmp_path, None, 4, 1)[0].unique().tolist() == [10]
    assert open_images(tmp_path, None, 4, 1, split="test")[0].unique().tolist() == [20]


def test_wrong_sources(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_images(tmp_path / "absent", None, 32, 1)
    with pytest.raises(ValueError, match="has no images"):
        open_images(tmp_path, None, 32, 1)
    with pytest.raises(ValueError, match="exactly one"):
        open_images(None, None, 32, 1)
    with pytest.raises(ValueError, match="channels is 2"):
        open_images(tmp_path, None, 32, 2)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install \"morse-diffusion\[hub\]\""):
        open_images(None, "someone/pictures", 32, 1)


@pytest.mark.parametrize(
    ("column", "expected"),
    [([2, 0], [2, 0]), (["cat", "dog"], None), ([1, None], None), ([-1, -1], None)],
)
def test_a_hub_data_sets_labels_are_class_numbers(monkeypatch, column, expected):
    class Rows(dict):
        column_names = ("image", "label")

    rows = Rows(image=[Image.new("L", (4, 4))] * 2, label=column)
    found = {"get_dataset_split_names": lambda name: ["train", "test"],
             "load_dataset": lambda name, split: rows}  # fmt: skip
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(**found))
    labels = open_images(None, "someone/pictures", 4, 1).labels
    assert labels is None if expected is None else labels.tolist() == expected


def test_step_batches_cover_each_epoch_once():
    batches = list(StepBatches(10, 4, seed=1, start_step=0, num_steps=5))
    flat = [index for batch in batches for index in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_step_batches_depend_on_the_step_only():
    whole = list(StepBatches(10, 4, seed=1, start_step=0, num_steps=9))
    assert list(StepBatches(10, 4, seed=1, start_step=5, num_steps=4)) == whole[5:]
    ranks = [list(StepBatches(10, 2, 1, 0, 9, rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    assert list(StepBatches(10, 4, seed=2, start_step=0, num_steps=9)) != whole


def test_step_batches_larger_than_the_data():
    (batch,) = StepBatches(3, 7, seed=0, start_step=0, num_steps=1)
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2] and len(batch) == 7


def test_loader_gathers_batches(tmp_path, pixels):
    images = open_images(write_idx(tmp_path / "photos", pixels), None, 28, 1)
    batches = StepBatches(len(images), 3, seed=0, start_step=0, num_steps=2)
    for batch, indices in zip(step_loader(images, batches, 0, False), batches, strict=True):
        torch.testing.assert_close(batch[:, 0], torch.from_numpy(pixels[indices]))
