import json

import numpy as np
import pytest
import torch
from PIL import Image

from morse.training.captions import name_classes, read_metadata, unique_captions
from morse.training.data import open_images


def write_folder(folder, captions):
    for name in captions:
        Image.fromarray(np.full((8, 8), 100, np.uint8)).save(folder / name)
    lines = [json.dumps({"file_name": n, "text": c}) for n, c in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_captions_of_an_image_folder_follow_its_images(tmp_path):
    write_folder(tmp_path, {"b.png": "a bag", "a.png": "a boot"})
    images = open_images(tmp_path, 8, 1, caption_column="text")
    assert images.captions == ["a boot", "a bag"]  # files in sorted order
    assert open_images(tmp_path, 8, 1).captions is None


def test_a_caption_may_hold_other_line_ends_and_lines_may_be_empty(tmp_path):
    write_folder(tmp_path, {"a.png": "a"})
    caption = "a\u2028boot\x85"
    line = json.dumps({"file_name": "a.png", "text": caption}, ensure_ascii=False)
    content = f"\r\n{line}\r\n  \r\n".encode()
    (tmp_path / "metadata.jsonl").write_bytes(content)
    assert open_images(tmp_path, 8, 1, caption_column="text").captions == [caption]


@pytest.mark.parametrize("folder", ["sub", "train"])
def test_a_folder_above_may_name_them(tmp_path, folder):
    """Also above the folders of both splits; a folder's own names go first."""
    write_folder(tmp_path, {"a.png": "a boot"})
    for name in (folder, "test", f"{folder}/own"):
        (tmp_path / name).mkdir()
    write_folder(tmp_path / folder / "own", {"b.png": "a bag"})
    (tmp_path / "a.png").rename(tmp_path / folder / "a.png")
    line = json.dumps({"file_name": f"{folder}/a.png", "text": "a shoe"})
    (tmp_path / "metadata.jsonl").write_text(line)
    images = open_images(tmp_path, 8, 1, caption_column="text")
    assert images.captions == ["a shoe", "a bag"]
    with pytest.raises(ValueError, match=rf"{folder}.metadata.jsonl does not exist, nor one"):
        read_metadata([tmp_path / folder / "a.png"], "text", tmp_path / folder)


def test_held_out_images_keep_their_captions(tmp_path):
    write_folder(tmp_path, {f"{row:02}.png": f"caption {row}" for row in range(21)})
    train, test = (
        open_images(tmp_path, 8, 1, split=split, caption_column="text")
        for split in ("train", "test")
    )
    assert test.captions == ["caption 19"]
    assert train.captions == [f"caption {row}" for row in range(21) if row != 19]


def test_a_missing_caption_names_the_image(tmp_path):
    write_folder(tmp_path, {"a.png": "a boot"})
    with pytest.raises(ValueError, match=r"caption_column is 'title'.*for a.png; add a line"):
        open_images(tmp_path, 8, 1, caption_column="title")
    (tmp_path / "metadata.jsonl").write_text("no json", encoding="utf-8")
    with pytest.raises(ValueError, match=r'metadata\.jsonl needs one JSON object with "file_name"'):
        read_metadata([tmp_path / "a.png"], "text", tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metadata\.jsonl does not exist"):
        read_metadata([tmp_path / "a.png"], "text", tmp_path)


def test_idx_files_have_no_captions(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(ValueError, match="give class_names instead"):
        open_images(tmp_path, 8, 1, caption_column="text")


def test_classes_are_named():
    assert name_classes(torch.tensor([1, 0]), ("bag", "boot")) == ["boot", "bag"]
    with pytest.raises(ValueError, match="class_names has 2 names, but labels go up to 2"):
        name_classes(torch.tensor([2]), ("bag", "boot"))
    with pytest.raises(ValueError, match="these images have no labels"):
        name_classes(None, ("bag", "boot"))


def test_unique_captions_give_every_image_its_own_back():
    captions = ["b", "a", "b", "c"]
    unique, rows = unique_captions(captions)
    assert unique == ["a", "b", "c"]
    assert [unique[row] for row in rows] == captions
