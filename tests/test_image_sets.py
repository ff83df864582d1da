from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import write_idx
from PIL import Image

from morse.evaluation.fid.image_sets import ReadingFacts, SetOptions, open_image_set
from morse.evaluation.fid.reading import read_batches
from morse.training.data import open_images


def save(folder, name, mode="RGB", size=(8, 6), value=100):
    folder.mkdir(exist_ok=True)
    colour = value if len(mode) == 1 else (value,) * len(mode)
    Image.new(mode, size, colour).save(folder / name)


def read(folder, channels=3, strict=False, batch_size=2, **options):
    facts = ReadingFacts()
    images = open_image_set(str(folder), SetOptions(**options))
    return list(read_batches(images, channels, batch_size, facts, strict)), facts


def test_images_are_read_in_the_order_of_their_names(tmp_path):
    for index in (2, 0, 10):
        save(tmp_path, f"{index}.png", value=10 * index)
    batches, facts = read(tmp_path)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 6, 8), (1, 3, 6, 8)]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == [0, 20, 100]  # 2.png before 10.png
    assert batches[0].dtype == torch.uint8
    (note,) = facts.notes("set")
    assert note.startswith("set: not all images are square") and facts.sizes == {"8x6": 3}


def test_names_may_hold_any_digits(tmp_path):
    for name in ("1²10.png", "1²2.png", "٣.png"):
        save(tmp_path, name)
    names = [Path(name).name for name in open_image_set(str(tmp_path)).names]
    assert names == ["1²2.png", "1²10.png", "٣.png"]


def test_a_change_of_size_begins_a_batch_and_is_told(tmp_path):
    save(tmp_path, "a.png")
    save(tmp_path, "b.png", size=(4, 4))
    batches, facts = read(tmp_path)
    assert [tuple(batch.shape[2:]) for batch in batches] == [(6, 8), (4, 4)]
    assert facts.notes("set")[0] == "set: sizes are mixed: 8x6 (1), 4x4 (1)"


def test_images_are_brought_to_one_size_as_by_training(tmp_path):
    gradient = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by a quarter
    for name in ("images", "idx"):
        (tmp_path / name).mkdir()
    Image.fromarray(gradient).save(tmp_path / "images" / "a.png")
    Image.fromarray(gradient).save(tmp_path / "images" / "b.png", exif=turned)
    write_idx(tmp_path / "idx" / "train-images-idx3-ubyte", gradient.transpose(2, 0, 1))
    for name, channels, sizes in (("images", 3, (4, 16)), ("idx", 1, (4, 7, 16))):
        for size in sizes:
            batches, facts = read(tmp_path / name, channels, batch_size=8, resolution=size)
            expected = open_images(tmp_path / name, size, channels)
            assert torch.equal(torch.cat(batches), expected.fetch(list(range(len(expected)))))
            assert facts.sizes == {f"{size}x{size}": len(expected)} and not facts.notes("set")


def test_grey_images_are_replicated_and_counted(tmp_path):
    save(tmp_path, "a.png", "L")
    (batch,), facts = read(tmp_path)
    assert batch.shape == (1, 3, 6, 8) and bool((batch == 100).all())
    assert facts.grey == 1 and "replicated" in facts.notes("set")[0]


def test_colour_becomes_luma_where_grey_is_wanted(tmp_path):
    Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / "a.png")
    (batch,), facts = read(tmp_path, channels=1)
    assert batch.shape == (1, 1, 6, 8) and int(batch[0, 0, 0, 0]) == 76  # 0.299 * 255
    assert facts.to_grey == 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(tmp_path, mode):
    colour = (0, 0, 0, 51) if mode == "RGBA" else (0, 51)
    Image.new(mode, (8, 6), colour).save(tmp_path / "a.png")
    (batch,), facts = read(tmp_path)
    assert batch.unique().tolist() == [204]  # a fifth of black on white
    assert facts.alpha == 1 and "white" in " ".join(facts.notes("set"))


def test_unreadable_files_are_left_out_named_and_counted(tmp_path):
    save(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    save(tmp_path, "c.png")
    (tmp_path / "d.png").write_bytes((tmp_path / "c.png").read_bytes()[:40])
    batches, facts = read(tmp_path)
    assert sum(len(batch) for batch in batches) == facts.num_images == 2
    told = facts.to_json()
    assert told["num_unreadable"] == 2
    assert "b.png" in told["unreadable"][0] and "d.png" in told["unreadable"][1]


def test_strict_fails_at_an_unreadable_file(tmp_path):
    save(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        read(tmp_path, strict=True)


def test_sixteen_bit_images_are_not_clipped_in_silence(tmp_path):
    Image.fromarray(np.full((6, 8), 30000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="8 bits"):
        read(tmp_path, strict=True)


def test_no_readable_image_at_all(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        read(tmp_path)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="has no images"):
        open_image_set(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_image_set(str(tmp_path / "nowhere"))


def test_idx_folders_have_splits(tmp_path):
    for prefix, value in (("train", 3), ("t10k", 7)):
        array = np.full((5, 28, 28), value, np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", array)
    for split, value in (("train", 3), ("test", 7)):
        images = open_image_set(str(tmp_path), SetOptions(split))
        (batch,) = read_batches(images, 1, 8, ReadingFacts())
        assert batch.shape == (5, 1, 28, 28) and batch.unique().tolist() == [value]
    with pytest.raises(FileNotFoundError, match="split is 'validation'"):
        open_image_set(str(tmp_path), SetOptions("validation"))


def test_a_hub_data_set_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_image_set("hub:some/name")


def test_a_hub_data_set_is_read_by_row(monkeypatch):
    class Rows(list):
        column_names = ("image", "label")

    rows = Rows({"image": Image.new("L", (4, 4), value)} for value in (1, 2))

    def load_dataset(name, config_name, split):
        if config_name not in (None, "plain"):
            raise ValueError("BuilderConfig 'other' not found. Available: ['plain']")
        return rows

    module = type("Module", (), {"load_dataset": staticmethod(load_dataset)})
    monkeypatch.setitem(__import__("sys").modules, "datasets", module)
    images = open_image_set("hub:some/name", SetOptions("test"))
    (batch,) = read_batches(images, 1, 8, ReadingFacts())
    assert batch[:, 0, 0, 0].tolist() == [1, 2]
    facts, rows[0]["image"] = ReadingFacts(), None
    (batch,) = read_batches(images, 1, 8, facts)
    assert len(batch) == 1 and facts.unreadable == ["some/name/test[0] (it is None, no image)"]
    named = open_image_set("hub:some/name", SetOptions("test", dataset_config_name="plain"))
    assert (images.name, named.name) == ("hub:some/name (test)", "hub:some/name (plain, test)")
    with pytest.raises(ValueError, match=r"dataset_config_name 'other' .* \['plain'\]"):
        open_image_set("hub:some/name", SetOptions(dataset_config_name="other"))
    with pytest.raises(ValueError, match="image_column is 'img'"):
        open_image_set("hub:some/name", SetOptions("test", "img"))
