from functools import partial

import pytest
import torch

from morse.evaluation.features import extract_features, load_features, load_reference
from morse.evaluation.fid.feature_sets import FeatureSet
from morse.evaluation.metrics import FRECHET_LABEL, feature_statistics, frechet_distance, psnr
from morse.evaluation.scoring import (
    AXES,
    REFERENCE_AXES,
    Scorer,
    axis_names,
    is_fashion_like,
    structural_similarity,
)


def random_images(count, channels=1, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, size, size, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_of_each_image_alone(channels, monkeypatch):
    monkeypatch.setattr("morse.evaluation.scoring.SSIM_PIXELS", 4 * channels * 32 * 32)
    images, reference = random_images(5, channels, seed=1), random_images(5, channels, seed=2)
    together = structural_similarity(images, reference)
    alone = [structural_similarity(images[i : i + 1], reference[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_ssim_has_closed_forms():
    images = random_images(3)
    torch.testing.assert_close(structural_similarity(images, images), torch.ones(3))
    # Without variance only the means count: (2 a b + c) / (a^2 + b^2 + c), c = 1e-4.
    dark, bright = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
    expected = torch.tensor([(0.24 + 1e-4) / (0.4 + 1e-4)])
    torch.testing.assert_close(
        structural_similarity(dark, bright), expected, rtol=1e-3, atol=0
    )  # variances are differences of float32 squares


def test_the_scorer_returns_every_image_for_itself():
    classifier, statistics = load_features(), load_reference()
    extract = partial(extract_features, classifier)
    real = FeatureSet("real", *statistics, 60_000)
    reference = random_images(5)
    images = (reference + 0.1 * random_images(5, seed=3)).clamp(max=1)
    scorer = Scorer(extract, real, reference)
    scores = scorer.score(images)
    assert {name: value.dtype for name, value in vars(scores).items()} == dict.fromkeys(
        ("features", "psnr", "ssim"), torch.float32
    )
    assert scores.features.shape == (5, 32) and scores.ssim.shape == (5,)
    torch.testing.assert_close(scores.features, extract_features(classifier, images))
    torch.testing.assert_close(scores.psnr, psnr(images, reference).float())
    alone = Scorer(extract, real, reference[2:3]).score(images[2:3])
    torch.testing.assert_close(alone.ssim, scores.ssim[2:3])
    distance = frechet_distance(*feature_statistics(scores.features), *statistics)
    assert scorer.summary(scores).startswith(f"Fréchet {distance:.3f}, PSNR ")
    torch.testing.assert_close(scorer.reference_features, extract_features(classifier, reference))


def test_images_of_other_shapes_are_scored_without_features():
    reference, images = random_images(3, 3, 16), random_images(3, 3, 16, seed=1)
    assert not is_fashion_like(images) and is_fashion_like(random_images(2))
    scorer = Scorer(None, None, reference)
    scores = scorer.score(images)
    assert scores.features.shape == (3, 0)
    torch.testing.assert_close(scores.psnr, psnr(images, reference).float())
    assert scorer.summary(scores) == f"PSNR {scores.psnr.mean():.2f} dB"


def test_the_reference_scores_perfectly_against_itself():
    reference = random_images(3)
    scores = Scorer(None, None, reference).score(reference)
    assert scores.psnr.tolist() == [100.0] * 3
    torch.testing.assert_close(scores.ssim, torch.ones(3))


def test_an_axis_turns_its_values_so_that_lower_is_better():
    signs = {name: axis.sign for name, axis in AXES.items()}
    assert signs.pop("psnr") == signs.pop("ssim") == -1
    assert set(signs.values()) == {1} and len(signs) == 4
    assert set(AXES) - set(REFERENCE_AXES) == {"frechet", "kernel"}
    assert "FID" not in "".join(axis.title for axis in AXES.values())
    assert AXES["frechet"].title == f"{FRECHET_LABEL} to real images"


def test_the_distance_depends_on_the_number_of_features():
    assert axis_names(0, True) == ["psnr", "ssim"]
    assert axis_names(32, True) == ["frechet", "frechet_to_reference", "psnr", "ssim"]
    assert axis_names(2048, True) == ["kernel", "kernel_to_reference", "psnr", "ssim"]
    assert axis_names(2048, False) == ["kernel_to_reference", "psnr", "ssim"]
