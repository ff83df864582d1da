import numpy as np
import pytest
import torch

from morse.evaluation.metrics import feature_statistics, frechet_distance
from morse.evaluation.scoring import ImageScores
from morse.evaluation.stats.bootstrap import (
    Estimate,
    SeedBootstrap,
    draw_counts,
    percentile_interval,
)
from morse.evaluation.stats.frechet import Gaussians, draw_real, frechet_distances, resample


def random_scores(count=60, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ImageScores(
        torch.randn(count, size, generator=generator),
        torch.rand(count, generator=generator),
        torch.rand(count, generator=generator),
    )


def test_two_gaussians_with_a_known_distance():
    # In one dimension it is (difference of means)^2 + (difference of deviations)^2.
    first = Gaussians(np.array([[0.0], [1.0]]), np.array([[[1.0]], [[4.0]]]))
    second = Gaussians(np.array([[3.0], [1.0]]), np.array([[[4.0]], [[9.0]]]))
    np.testing.assert_allclose(frechet_distances(first, second), [10.0, 1.0], rtol=1e-12)


def test_a_resample_is_its_images_repeated():
    rng = np.random.default_rng(0)
    counts = draw_counts(40, 3, rng)
    assert counts[0].tolist() == [1] * 40 and (counts.sum(axis=1) == 40).all()
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)) + 50
    others = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    batch = frechet_distances(resample(features.numpy(), counts), resample(others.numpy(), counts))
    for distance, row in zip(batch, counts, strict=True):
        index = torch.arange(40).repeat_interleave(torch.from_numpy(row).long())
        expected = frechet_distance(
            *feature_statistics(features[index]), *feature_statistics(others[index])
        )
        assert distance == pytest.approx(expected, rel=1e-9)


def test_real_statistics_spread_as_those_of_resampled_normal_features():
    mean = torch.tensor([1.0, -2.0])
    covariance = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    number = 8  # so few that a degree of freedom too many shows
    drawn = draw_real((mean, covariance), number, 4000, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.means[0], mean)
    np.testing.assert_allclose(drawn.covariances[0], covariance, rtol=1e-7)
    means, covariances = drawn.means[1:], drawn.covariances[1:]
    np.testing.assert_allclose(np.cov(means.T), covariance / number, rtol=0.1)
    np.testing.assert_allclose(covariances.mean(axis=0), covariance, rtol=0.02)
    # Wishart: the variance of S_ij is (C_ij^2 + C_ii C_jj) / (n - 1).
    variances = np.diag(covariance)
    expected = (covariance.numpy() ** 2 + np.outer(variances, variances)) / (number - 1)
    np.testing.assert_allclose(covariances.var(axis=0), expected, rtol=0.1)
    assert abs(np.corrcoef(means[:, 0], covariances[:, 0, 0])[0, 1]) < 0.05


def test_statistics_of_an_unknown_number_of_images_are_exact():
    real = torch.tensor([1.0, -2.0]), torch.eye(2)
    drawn = draw_real(real, None, 30, np.random.default_rng(0))
    assert drawn.means.tolist() == [[1.0, -2.0]]
    scores, reference = random_scores(20, 2), random_scores(20, 2, seed=1)
    bootstrap = SeedBootstrap(20, reference.features, drawn, 30, np.random.default_rng(0))
    assert bootstrap.draws(scores)["frechet"].shape == (31,)
    alone = SeedBootstrap(20, reference.features, None, 30, np.random.default_rng(0))
    assert list(alone.draws(scores)) == ["frechet_to_reference", "psnr", "ssim"]


def coverage(truth, simulate, simulations):
    """How often an interval holds `truth`; `simulate(rng)` returns draws, row 0 the estimate."""
    hits = 0
    for i in range(simulations):
        low, high = percentile_interval(simulate(np.random.default_rng(i))[1:])
        hits += low <= truth <= high
    return hits / simulations


def test_the_interval_of_a_mean_covers_it():
    def simulate(rng):
        return draw_counts(100, 400, rng) @ rng.normal(3.0, 2.0, size=100) / 100

    assert 0.90 <= coverage(3.0, simulate, 200) <= 0.98


def test_the_interval_of_a_frechet_distance_covers_what_so_many_images_give():
    # A small distance of few images: what a resample adds to it is wider than the interval.
    size, count, shift = 8, 150, 0.2
    real = torch.zeros(size), torch.eye(size)

    def images(rng):
        return torch.from_numpy(rng.standard_normal((count, size)) + shift)

    rng = np.random.default_rng(99)
    many = [frechet_distance(*feature_statistics(images(rng)), *real) for _ in range(1000)]

    def simulate(rng):
        scores = ImageScores(images(rng), torch.zeros(count), torch.zeros(count))
        reals = draw_real(real, 10**7, 300, rng)
        return SeedBootstrap(count, scores.features, reals, 300, rng).draws(scores)["frechet"]

    assert 0.90 <= coverage(np.mean(many), simulate, 100) <= 0.985


def test_methods_share_their_resamples():
    reference, scores = random_scores(seed=1), random_scores(seed=2)
    real = feature_statistics(random_scores(200, seed=3).features)
    reals = draw_real(real, 200, 30, np.random.default_rng(0))
    bootstraps = [
        SeedBootstrap(60, reference.features, reals, 30, np.random.default_rng(7)) for _ in range(2)
    ]
    first, second = (bootstrap.draws(scores) for bootstrap in bootstraps)
    for axis in first:
        np.testing.assert_array_equal(first[axis], second[axis])
    better = ImageScores(reference.features, scores.psnr + 2, scores.ssim)
    pair = bootstraps[0].draws(better)
    np.testing.assert_allclose(pair["psnr"] - first["psnr"], 2, rtol=1e-6)
    np.testing.assert_allclose(pair["frechet_to_reference"], 0, atol=1e-9)
    assert first["psnr"][0] == pytest.approx(float(scores.psnr.mean()), rel=1e-6)
    direct = frechet_distance(*feature_statistics(scores.features), *real)
    assert first["frechet"][0] == pytest.approx(direct, rel=1e-9)
    assert first["frechet"][1:].mean() == pytest.approx(direct)


def test_another_number_of_images_than_the_reference_is_refused():
    real = draw_real((torch.zeros(5), torch.eye(5)), 100, 2, np.random.default_rng(0))
    bootstrap = SeedBootstrap(9, random_scores(9).features, real, 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"of 60 images, 60 of them paired .* but 9 and 9"):
        bootstrap.draws(random_scores(60))


def test_a_reference_of_fewer_images_pairs_with_the_first_ones():
    reference, scores = random_scores(20, seed=1), random_scores(60, seed=2)
    real = feature_statistics(random_scores(200, seed=3).features)
    reals = draw_real(real, 200, 40, np.random.default_rng(0))
    bootstrap = SeedBootstrap(60, reference.features, reals, 40, np.random.default_rng(7))
    paired = ImageScores(scores.features, scores.psnr[:20], scores.ssim[:20])
    draws = bootstrap.draws(paired)
    assert draws["psnr"][0] == pytest.approx(float(scores.psnr[:20].mean()), rel=1e-6)
    statistics = [feature_statistics(f) for f in (scores.features[:20], reference.features)]
    expected = frechet_distance(*statistics[0], *statistics[1])
    assert draws["frechet_to_reference"][0] == pytest.approx(expected, rel=1e-9)
    level = ImageScores(scores.features, torch.ones(20), torch.ones(20))
    np.testing.assert_allclose(bootstrap.draws(level)["psnr"], 1)
    # The other axis still counts all 60 images.
    assert draws["frechet"][0] == pytest.approx(
        frechet_distance(*feature_statistics(scores.features), *real), rel=1e-9
    )


def test_resamples_of_few_references_have_a_spread():
    counts = draw_counts(40, 2000, np.random.default_rng(0), 3)
    assert counts[1:, :3].sum(1).min() == 2 and (counts.sum(1) == 40).all()


def test_an_estimate_without_replicates_or_seeds_claims_no_error():
    lone = Estimate(np.array([2.0]), {0: 2.0})
    assert (lone.value, lone.standard_error, lone.interval, lone.seed_deviation) == (2.0,) + (
        None,
    ) * 3
    draws = np.concatenate([[0.0], np.arange(1001.0)])
    estimate = Estimate(draws, {0: 1.0, 50: 4.0})
    assert estimate.interval == [25.0, 975.0]
    assert estimate.standard_error == pytest.approx(np.std(np.arange(1001.0), ddof=1))
    assert estimate.seed_deviation == pytest.approx(3 / np.sqrt(2))


def test_the_interval_stays_finite_with_up_to_two_and_a_half_percent_infinite():
    replicates = np.concatenate([np.ones(975), np.full(25, np.inf)])
    assert percentile_interval(replicates) == [1.0, 1.0]
    assert percentile_interval(-replicates) == [-1.0, -1.0]
