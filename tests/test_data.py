import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from idx_files import write_idx
from PIL import Image, PngImagePlugin

from morse.cli import parse_config
from morse.evaluation.fid.image_sets import open_image_set
from morse.training.batches import StepBatches, step_loader
from morse.training.dash import TrainDashConfig
from morse.training.data import open_images, open_training_images, to_model_range
from morse.training.idx import IDX_IMAGES, IDX_LABELS, fit_images, read_idx
from morse.training.image_reading import find_images


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder_pads_and_chooses_the_split(tmp_path, pixels, suffix):
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", pixels)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", np.arange(7, dtype=np.uint8))
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", pixels[:2])

    train = open_images(tmp_path, 32, 1)
    test = open_images(tmp_path, 32, 1, split="test")

    assert (len(train), len(test)) == (7, 2)
    assert train.labels.tolist() == list(range(7)) and test.labels is None
    batch = train.__getitems__([3, 0])
    assert batch.shape == (2, 1, 32, 32) and batch.dtype == torch.uint8
    torch.testing.assert_close(batch[0, 0, 2:-2, 2:-2], torch.from_numpy(pixels[3]))
    assert batch.sum() == pixels[[3, 0]].sum(dtype=np.int64)  # the border is black
    torch.testing.assert_close(train[3], batch[0])


def test_idx_file_in_colour_and_resized(tmp_path, pixels):
    path = write_idx(tmp_path / "photos", pixels)
    assert open_images(path, 32, 3)[0].shape == (3, 32, 32)
    assert open_images(path, 14, 1)[0].shape == (1, 14, 14)
    assert open_images(path, 33, 1)[0].shape == (1, 33, 33)


def test_a_file_beside_it_with_another_name_is_no_labels(tmp_path, pixels):
    path = write_idx(tmp_path / "photos", pixels)
    write_idx(tmp_path / "photos.gz", pixels)
    assert open_images(path, 28, 1).labels is None


@pytest.mark.parametrize("source", ["train-images-idx3-ubyte", ""])
def test_idx_without_a_test_part_holds_out_every_20th_image(tmp_path, source):
    numbers = np.arange(40, dtype=np.uint8)
    flat = np.broadcast_to(numbers[:, None, None], (40, 4, 4))
    write_idx(tmp_path / "train-images-idx3-ubyte", flat)
    write_idx(tmp_path / "train-labels-idx1-ubyte", numbers)
    train, test = (open_images(tmp_path / source, 4, 1, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (38, 2)
    for images in (train, test):
        batch = images.__getitems__(list(range(len(images))))
        assert batch[:, 0, 0, 0].tolist() == images.labels.tolist()
    assert test.labels.tolist() == [19, 39]


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
        open_images(tmp_path, 28, 1)


def test_image_folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    picture = np.zeros((20, 40, 3), dtype=np.uint8)
    picture[:, 10:30, 0] = 255
    Image.fromarray(picture).save(tmp_path / "deep" / "er" / "b.PNG")
    Image.fromarray(picture[..., 0]).convert("P").save(tmp_path / "a.png")

    images = open_images(tmp_path, 8, 3)

    assert len(images) == 2 and images.labels is None
    assert images[1].shape == (3, 8, 8)
    red, green, blue = images[1][:, 1:-1, 1:-1].flatten(1)
    assert red.min() > 250 and green.max() == blue.max() == 0  # only the centre
    assert open_images(tmp_path, 8, 1)[0].shape == (1, 8, 8)

    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"c\.png cannot be read as an image"):
        open_images(tmp_path, 8, 3)[1]  # sorted: a, c, deep/er/b


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_shows_white(tmp_path, mode, channels):
    options = {"transparency": 0} if mode == "P" else {}
    Image.new(mode, (4, 4)).save(tmp_path / "a.png", **options)  # black, if it could be seen
    assert open_images(tmp_path, 4, channels)[0].unique().tolist() == [255]


@pytest.mark.parametrize(("mode", "name"), [("I;16", "a.png"), ("I", "a.tif"), ("F", "a.tif")])
def test_more_than_8_bits_are_not_clipped_in_silence(tmp_path, mode, name):
    Image.new(mode, (4, 4)).save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} cannot be read.*mode is {mode}, but 8 bits"):
        open_images(tmp_path, 4, 1)[0]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_folders_are_searched_as_they_look(tmp_path):
    """Hidden ones are not, links are followed, once each, and none is an image itself."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / ".cache", root / "b", root / "dir.png", elsewhere / ".hidden"):
        folder.mkdir(parents=True)
        Image.new("L", (4, 4)).save(folder / "1.png")
    Image.new("L", (4, 4)).save(elsewhere / "2.png")
    for link, target in (("a", root / "b"), ("b/up", root), ("b/c.png", elsewhere)):
        (root / link).symlink_to(target, target_is_directory=True)
    found = [path.relative_to(root).as_posix() for path in sorted(find_images(root))]
    assert found == ["b/1.png", "b/c.png/2.png", "dir.png/1.png"]
    assert open_images(root, 4, 1).__getitems__([0, 1, 2]).shape == (3, 1, 4, 4)
    assert len(open_image_set(str(root))) == 3


def test_hidden_files_are_no_images(tmp_path):
    (tmp_path / "__MACOSX").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    for path in (tmp_path / "._a.png", tmp_path / "__MACOSX" / "._a.png"):
        path.write_bytes(b"no image")
    assert len(open_images(tmp_path, 4, 1)) == 1


def test_what_pillow_calls_a_wrong_value_is_named_too(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("long", "x" * 2 * PngImagePlugin.MAX_TEXT_CHUNK, zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        open_images(tmp_path, 4, 1)[0]


def test_image_folder_with_two_splits(tmp_path):
    for name, value in (("train", 10), ("test", 20)):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4), value).save(tmp_path / name / "x.png")
    assert open_images(tmp_path, 4, 1)[0].unique().tolist() == [10]
    assert open_images(tmp_path, 4, 1, split="test")[0].unique().tolist() == [20]


def test_wrong_sources(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_images(tmp_path / "absent", 32, 1)
    with pytest.raises(ValueError, match="has no images"):
        open_images(tmp_path, 32, 1)
    with pytest.raises(ValueError, match="channels is 2"):
        open_hub(32, 2)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_hub(32, 1)


class Rows:
    """A part of a hub data set, as far as it is used."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)

    def __len__(self):
        return len(self.columns["image"])

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}

    def select(self, rows):
        return Rows(**{name: [v[row] for row in rows] for name, v in self.columns.items()})


def grey(count):
    return [Image.new("L", (4, 4), value) for value in range(count)]


@pytest.fixture
def hub(monkeypatch):
    """A function that makes parts into the only data set of the hub."""

    def make(**parts):
        def load(name, config_name, split):
            return parts[split] if config_name is None else parts[config_name][split]

        found = {"get_dataset_split_names": lambda name, config_name: list(
                     parts if config_name is None else parts[config_name]),
                 "load_dataset": load}  # fmt: skip
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(**found))

    return make


def open_hub(*arguments, dataset_config_name=None, **options):
    """Open images of the only data set, as a training with these settings would."""
    config = SimpleNamespace(dataset_name="someone/pictures", image_column="image",
                             dataset_config_name=dataset_config_name)  # fmt: skip
    return open_training_images(config, *arguments, **options)


@pytest.mark.parametrize(
    ("column", "expected"),
    [([2, 0], [2, 0]), (["cat", "dog"], None), ([1, None], None), ([-1, -1], None)],
)
def test_a_hub_data_sets_labels_are_class_numbers(hub, column, expected):
    rows = Rows(image=grey(2), label=column)
    hub(train=rows, test=rows)
    labels = open_hub(4, 1).labels
    assert labels is None if expected is None else labels.tolist() == expected


@pytest.mark.parametrize(
    ("validation", "train", "test"),
    [([7, 8], list(range(40)), [7, 8]), ([-1, -1], None, [19, 39]), (None, None, [19, 39])],
)
def test_a_test_part_without_labels_is_replaced(hub, validation, train, test):
    parts = {"train": Rows(image=grey(40), label=list(range(40))),
             "test": Rows(image=grey(3), label=[-1] * 3)}  # fmt: skip
    hub(**parts, **({"validation": Rows(image=grey(2), label=validation)} if validation else {}))
    found = {split: open_hub(4, 1, split) for split in ("train", "test")}
    train = train or [number for number in range(40) if number not in test]
    assert found["train"].labels.tolist() == train and found["test"].labels.tolist() == test
    assert found["train"][19].unique().tolist() == [train[19]]  # images go with their labels


def test_without_class_numbers_the_test_part_is_kept(hub):
    for label in ({"label": ["cat", "dog"]}, {}):
        hub(train=Rows(image=grey(2), **label), test=Rows(image=grey(1), label=[-1]))
        assert len(open_hub(4, 1, "test")) == 1


@pytest.mark.parametrize("caption", [["a boot", "a shoe"], None])
def test_a_hub_data_sets_captions_are_texts(hub, caption):
    rows = Rows(image=grey(2), text=["a bag", caption])
    hub(train=rows, test=rows.select([0]))
    with pytest.raises(ValueError, match=r"caption_column is 'text', whose row 1 .* is .*one text"):
        open_hub(4, 1, caption_column="text")
    test = open_hub(4, 1, "test", caption_column="text")
    assert test.captions == ["a bag"]


def test_a_hub_data_set_of_several_configurations(hub, monkeypatch):
    parts = {"train": Rows(image=grey(3)), "test": Rows(image=grey(1))}
    hub(large=parts, small={"train": Rows(image=grey(2))})
    assert len(open_hub(4, 1, dataset_config_name="large")) == 3
    assert len(open_hub(4, 1, "test", dataset_config_name="large")) == 1
    assert len(open_hub(4, 1, dataset_config_name="small")) == 2

    def refuse(name, config_name):
        raise ValueError("Config name is missing. Please pick one among ['large', 'small']")

    monkeypatch.setattr(sys.modules["datasets"], "get_dataset_split_names", refuse)
    with pytest.raises(ValueError, match=r"dataset_config_name is None: .*'large', 'small'"):
        open_hub(4, 1)
    options = ["--train_data_dir", "images", "--output_dir", "x", "--dataset_config_name", "large"]
    with pytest.raises(SystemExit):
        parse_config(TrainDashConfig, options)


def test_an_unfit_image_of_the_hub_is_named(hub):
    rows = Rows(image=[*grey(1), Image.new("I;16", (4, 4))])
    hub(train=rows, test=rows)
    images = open_hub(4, 1)
    assert images[0].shape == (1, 4, 4)
    with pytest.raises(ValueError, match=r"row 1 .* in image_column 'image' cannot be read.*I;16"):
        images[1]


@pytest.mark.parametrize("value", [None, "x.png", {"bytes": b"", "path": None}])
def test_what_is_no_image_of_the_hub_is_named(hub, value):
    hub(train=Rows(image=[value]), test=Rows(image=[value]))
    message = r"row 0 .* in image_column 'image' cannot be .*it is .*; give another --image_column"
    with pytest.raises(ValueError, match=message):
        open_hub(4, 1)[0]


def test_contents_tell_images_from_others(tmp_path, pixels, hub):
    """By names and sizes of files, pixels that are in memory, and what the hub's library knows."""
    for folder in ("one", "moved"):
        (tmp_path / folder).mkdir()
        for value, name in enumerate(("a.png", "b.png")):
            Image.new("L", (4, 4 + value)).save(tmp_path / folder / name)
    told = open_images(tmp_path / "one", 4, 1).contents()
    assert open_images(tmp_path / "moved", 4, 1).contents() == told
    (tmp_path / "moved" / "b.png").rename(tmp_path / "moved" / "0.png")
    renamed = open_images(tmp_path / "moved", 4, 1).contents()
    (tmp_path / "moved" / "0.png").write_bytes(b"")
    assert len({told, renamed, open_images(tmp_path / "moved", 4, 1).contents()}) == 3

    idx = {open_images(write_idx(tmp_path / str(n), pixels + n), 28, 1).contents()
           for n in (0, 1, 0)}  # fmt: skip
    assert len(idx) == 2

    rows = Rows(image=grey(2))
    rows._fingerprint = "1f"
    hub(train=rows, test=rows)
    assert open_hub(4, 1).contents() == "1f"


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


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gathers_batches(tmp_path, pixels, workers):
    images = open_images(write_idx(tmp_path / "photos", pixels), 28, 1)
    batches = StepBatches(len(images), 3, seed=0, start_step=0, num_steps=2)
    found = list(step_loader(images, batches, workers, False))
    for batch, indices in zip(found, batches, strict=True):
        torch.testing.assert_close(batch[:, 0], torch.from_numpy(pixels[indices]))
