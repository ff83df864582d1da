"""Folders of generated images: what they were made with, and which of them are there."""

import math
from collections.abc import Mapping
from pathlib import Path

from morse.files import write_json
from morse.folder_settings import SETTINGS_FILE, check_settings, read_settings, with_places

FALLBACKS = "fallbacks-*.json"  # * is the batch's first image
_THREADS = "num_threads"


def image_file(folder: Path, index: int) -> Path:
    """Return where image `index` is."""
    return folder / f"{index:08d}.png"


def fallbacks_file(folder: Path, first: int) -> Path:
    """Return where it is kept that the batch of image `first` on did not go as planned."""
    return folder / FALLBACKS.replace("*", f"{first:08d}")


def missing_images(folder: Path, batch: range) -> list[int]:
    """Return which of a batch's images are not there."""
    return [index for index in batch if not image_file(folder, index).exists()]


def made_with(folder: Path) -> dict[str, object]:
    """Return what is recorded of a folder's images, for a result: without prompts, plain JSON."""
    return {k: _plain(v) for k, v in _recorded(folder).items() if k != "prompts"}


def _plain(value: object) -> object:
    """Write infinities, which some schedulers' configs hold and JSON does not know, as text."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def check_images(folder: Path, content: Mapping[str, object]) -> None:
    """Check that a folder is free, or that its images are the first of those to be made.

    Args:
        folder: The folder.
        content: All that its pixels depend on, as JSON has it; "num_images" may be more than
            before, and "num_threads", by which pixels change no more than rounding does, another.

    Raises:
        ValueError: If it holds images of other settings, or other files.
    """
    file, way_out = folder / SETTINGS_FILE, "give another --output_dir"
    if file.exists():
        before = _recorded(folder)
        grows = 0 < before.get("num_images", 0) < content["num_images"]
        may_differ = [_THREADS, "num_images"] if grows else [_THREADS]
        same = {name: before[name] for name in may_differ if name in before}
        check_settings(file, {**content, **same}, f"{way_out}, or delete that folder")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and has no {SETTINGS_FILE}, so nobody knows what made its "
            f"files; {way_out}"
        )


def record_settings(folder: Path, content: Mapping[str, object], batches: list[range]) -> None:
    """Record what a folder's images are made with; for one process, before any adds images.

    A folder that is to hold more than before loses those of its last batch if that was cut short:
    they are made anew in a whole one, so that no pixel depends on how many there were at first.

    Args:
        folder: Made if missing.
        content: As `check_images` found right.
        batches: All that it is to hold.
    """
    before = _recorded(folder)
    count = before.get("num_images", content["num_images"])
    if count < content["num_images"]:
        first = count - count % content["batch_size"]
        for index in range(first, count):
            image_file(folder, index).unlink(missing_ok=True)
        fallbacks_file(folder, first).unlink(missing_ok=True)
    threads = list(before.get(_THREADS, ()))
    if any(missing_images(folder, batch) for batch in batches):
        threads += [number for number in content.get(_THREADS, ()) if number not in threads]
    settings = with_places({**content, _THREADS: threads} if threads else content)
    if settings != before:
        write_json(folder / SETTINGS_FILE, settings)


def threads_notes(folder: Path) -> list[str]:
    """Warn where runs with different numbers of threads made a folder's images."""
    threads = _recorded(folder).get(_THREADS, [])
    if len(threads) < 2:
        return []
    numbers = ", then ".join(map(str, threads))
    return [
        f"{folder.name}: made with {numbers} CPU threads; with another number of them the same "
        "noise gives pixels that may differ by rounding"
    ]


def _recorded(folder: Path) -> dict[str, object]:
    """Return what is recorded of a folder's images; {} of a folder that is free."""
    file = folder / SETTINGS_FILE
    return read_settings(file) if file.exists() else {}
