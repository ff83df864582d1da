"""The kernel distance's value, and its resamples."""

import numpy as np
import pytest
import torch
from test_bootstrap import coverage

from morse.evaluation.fid.feature_sets import FeatureSet
from morse.evaluation.metrics import feature_statistics
from morse.evaluation.scoring import ImageScores
from morse.evaluation.stats import kernel
from morse.evaluation.stats.bootstrap import SeedBootstrap, draw_counts, resample_real
from morse.evaluation.stats.kernel import (
    KernelDistances,
    Resampled,
    mean_apart,
    mean_between,
    polynomial_kernel,
)
from morse.evaluation.torch_fidelity_loader import fidelity_module

POLYNOMIAL = {
    "kid_kernel_poly_degree": 3,
    "kid_kernel_poly_gamma": None,
    "kid_kernel_poly_coef0": 1,
}


def normal(count, size, seed, shift=0.0):
    return shift + torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def resampled(features, num_replicates, seed):
    counts = draw_counts(
        len(features), num_replicates, np.random.default_rng(seed), None, distinct=True
    )
    return Resampled.make(features, counts, "cpu")


def distance(images, real, num_replicates=0, seed=0):
    """The draws of the distance to real images, a resample of each; row 0 is the distance."""
    counts = draw_counts(len(images), num_replicates, np.random.default_rng(seed), distinct=True)
    real = resampled(real, num_replicates, seed + 1000)
    return KernelDistances(counts, images, real).draws(images)["kernel"]


@pytest.mark.parametrize("block", [3, 1000])
def test_equal_weights_give_torch_fidelitys_estimates(block, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", block)
    module = fidelity_module("metric_kid")
    images, real = normal(20, 150, 0, 0.3), normal(20, 150, 1)
    sides = [part.double().numpy() for part in (images, real)]
    (xx, yy, xy) = (
        module.kernel_poly(*pair, **POLYNOMIAL)
        for pair in ((sides[0],) * 2, (sides[1],) * 2, sides)
    )
    assert distance(images, real)[0] == pytest.approx(module.mmd2(xx, xy, yy), rel=1e-9)
    paired = KernelDistances(np.ones((1, 20)), real, None).draws(images)
    expected = module.mmd2(xx, xy, yy, mmd_est="u-statistic")
    assert paired["kernel_to_reference"][0] == pytest.approx(expected, rel=1e-9)
    assert set(paired) == {"kernel_to_reference"}


@pytest.mark.parametrize("block", [4, 1000])
def test_a_resample_leaves_out_an_image_with_its_copies(block, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", block)
    features, others = normal(6, 4, 0).double(), normal(6, 4, 1).double()
    counts = torch.tensor([[2.0, 0, 3, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    found = mean_apart(features, Resampled(others, counts.double()))
    for value, row in zip(found, counts, strict=True):
        index = torch.arange(6).repeat_interleave(row.long())
        pairs = polynomial_kernel(features[index], others[index])
        assert float(value) == pytest.approx(float(pairs[index[:, None] != index].mean()))
    two = [Resampled(part, counts.double()) for part in (features, others)]
    for value, row in zip(mean_between(*two), counts, strict=True):
        index = torch.arange(6).repeat_interleave(row.long())
        pairs = polynomial_kernel(features[index], others[index])
        assert float(value) == pytest.approx(float(pairs.mean()))


def expected_kernel(first, second, size):
    """E (x.y / D + 1)^3 of x, y from N(first, 1), N(second, 1) in each of D dimensions."""
    mean = first * second
    square = (first**2 + 1) * (second**2 + 1)
    cube = (first**3 + 3 * first) * (second**3 + 3 * second)
    variance, skew = square - mean**2, cube - 3 * mean * square + 2 * mean**3
    return (1 + mean) ** 3 + 3 * (1 + mean) * variance / size + skew / size**2


def expected_distance(shift, size):
    kernels = [expected_kernel(*pair, size) for pair in ((shift, shift), (0, 0), (shift, 0))]
    return kernels[0] + kernels[1] - 2 * kernels[2]


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_it_is_unbiased_for_gaussians_of_a_known_distance(shift):
    size, count = 5, 12
    found = [
        distance(normal(count, size, i, shift), normal(count, size, -i))[0] for i in range(1, 801)
    ]
    error = np.std(found) / np.sqrt(len(found))
    # With images' kernels with themselves it would be too large by this.
    itself = (1 + (1 + shift**2)) ** 3 + expected_kernel(0, 0, size) - 2
    assert error < 0.1 * itself / count
    assert abs(np.mean(found) - expected_distance(shift, size)) < 3 * error


def test_replicates_have_the_mean_of_the_value_itself():
    """So that nothing need be moved, as Fréchet distances are."""
    draws = distance(normal(40, 150, 0, 0.2), normal(30, 150, 1), 2000)
    assert draws[1:].mean() == pytest.approx(draws[0], abs=4 * draws[1:].std() / 2000**0.5)


@pytest.mark.parametrize(("shift", "most"), [(0.4, 0.985), (0.0, 1.0)])
def test_the_interval_covers_the_distance_of_the_distributions(shift, most):
    """Where there is no distance, it is wider than it need be."""
    size, count = 6, 100

    def simulate(rng):
        images, real = rng.standard_normal((2, count, size))
        seed = int(rng.integers(10**6))
        return distance(torch.from_numpy(images + shift), torch.from_numpy(real), 200, seed)

    assert 0.90 <= coverage(expected_distance(shift, size), simulate, 150) <= most


def test_equal_images_are_at_no_distance_and_methods_share_their_resamples():
    reference, real = normal(12, 150, 0), normal(30, 150, 1)
    reals = resampled(real, 20, 3)
    scores = ImageScores(torch.cat([reference, normal(6, 150, 5)]), torch.ones(12), torch.ones(12))
    first, second = (
        SeedBootstrap(18, reference, reals, 20, np.random.default_rng(7)).draws(scores)
        for _ in range(2)
    )
    assert list(first) == ["kernel_to_reference", "kernel", "psnr", "ssim"]
    for axis in first:
        np.testing.assert_array_equal(first[axis], second[axis])
    np.testing.assert_allclose(first["kernel_to_reference"], 0, atol=1e-12)
    assert first["kernel"][0] == pytest.approx(distance(scores.features, real)[0])
    alone = SeedBootstrap(18, reference, None, 20, np.random.default_rng(7)).draws(scores)
    assert list(alone) == ["kernel_to_reference", "psnr", "ssim"]


def test_real_images_are_resampled_too():
    images, real = normal(50, 150, 0, 0.3), normal(8, 150, 1)
    features = FeatureSet("real", *feature_statistics(real), len(real), real)
    reals = resample_real(features, 400, np.random.default_rng(0))
    counts = draw_counts(50, 400, np.random.default_rng(1))
    spread = KernelDistances(counts, images, reals).draws(images)["kernel"][1:].std()
    fixed = Resampled.make(real, np.ones((401, 8)), "cpu")
    assert spread > 1.3 * KernelDistances(counts, images, fixed).draws(images)["kernel"][1:].std()


def test_every_resample_has_a_pair_to_compare():
    counts = draw_counts(5, 500, np.random.default_rng(0), 2, distinct=True)
    assert (counts[:, :2] > 0).all() and (counts.sum(axis=1) == 5).all()
