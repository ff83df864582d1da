"""Fidelity of images to references made from the same noise, one by one."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from morse.evaluation.fid.image_sets import ImageSet, ReadingFacts
from morse.evaluation.fid.lpips import Lpips
from morse.evaluation.fid.reading import read_batches
from morse.evaluation.metrics import psnr
from morse.evaluation.report.scores import Score
from morse.evaluation.scoring import AXES, Axis, structural_similarity

FIDELITY = {
    "psnr": AXES["psnr"],
    "ssim": AXES["ssim"],
    "lpips": Axis("Same-noise LPIPS (AlexNet) to the reference", "", "lower", "fidelity"),
}


def fidelity_scores(
    images: ImageSet,
    references: ImageSet,
    batch_size: int,
    lpips: Lpips | None = None,
    device: torch.device | str = "cpu",
    on_images: Callable[[int, int], object] | None = None,
) -> dict[str, Score]:
    """Compare images with references made from the same noise, one by one, as 8-bit RGB.

    Args:
        images: What is measured.
        references: As many, in the same order.
        batch_size: Images at a time.
        lpips: From `load_lpips`; None leaves LPIPS out.
        device: Where to compute, LPIPS's own.
        on_images: Called with the numbers of images done and of all, for progress bars.

    Returns:
        Mean and standard error of "psnr", "ssim" and, if asked for, "lpips".
    """
    found: dict[str, list[Tensor]] = {}
    for image, reference in zip(
        _floats(images, batch_size, device), _floats(references, batch_size, device), strict=True
    ):
        found.setdefault("psnr", []).append(psnr(image, reference).cpu())
        found.setdefault("ssim", []).append(structural_similarity(image, reference).cpu())
        if lpips is not None:
            found.setdefault("lpips", []).append(lpips(image, reference).cpu())
        if on_images is not None:
            on_images(sum(map(len, found["psnr"])), len(images))
    return {axis: mean_score(torch.cat(parts)) for axis, parts in found.items()}


def _floats(images: ImageSet, batch_size: int, device: torch.device | str) -> Iterator[Tensor]:
    for batch in read_batches(images, 3, batch_size, ReadingFacts(), strict=True):
        yield batch.to(device).float() / 255


def mean_score(values: Tensor) -> Score:
    """Return the mean of values of single images, (N,), and its standard error."""
    values = values.double()
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return Score(float(values.mean()), error)
