import pytest
import torch

from morse.evaluation.metrics import feature_statistics, frechet_distance, psnr


def random_rotation(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix)[0]


def test_commuting_covariances_have_a_closed_form():
    # With one eigenbasis the distance is |difference of means|^2 + sum (sqrt a - sqrt b)^2.
    rotation = random_rotation(8)
    variances_a = torch.linspace(0.1, 3, 8, dtype=torch.float64)
    variances_b = torch.linspace(5, 0.2, 8, dtype=torch.float64)
    cov_a = rotation @ variances_a.diag() @ rotation.T
    cov_b = rotation @ variances_b.diag() @ rotation.T
    mean_a, mean_b = torch.zeros(8), torch.arange(8.0)
    expected = mean_b.square().sum() + (variances_a.sqrt() - variances_b.sqrt()).square().sum()
    distance = torch.tensor(frechet_distance(mean_a, cov_a, mean_b, cov_b))
    torch.testing.assert_close(distance.double(), expected.double(), rtol=1e-6, atol=0)


def test_non_commuting_covariances_match_the_matrix_square_root():
    # tr (A B)^1/2 through the eigenvalues of the non-symmetric product.
    rotation = random_rotation(5, seed=1)
    cov_a = torch.diag(torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64))
    cov_b = rotation @ torch.diag(torch.tensor([5.0, 1, 1, 2, 0.5]).double()) @ rotation.T
    roots = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    expected = cov_a.trace() + cov_b.trace() - 2 * roots
    distance = frechet_distance(torch.zeros(5), cov_a, torch.zeros(5), cov_b)
    torch.testing.assert_close(torch.tensor(distance).double(), expected, rtol=1e-6, atol=0)


def test_a_shift_of_the_mean_counts_squared():
    covariance = torch.eye(4)
    distance = frechet_distance(torch.zeros(4), covariance, torch.full((4,), 0.5), covariance)
    assert distance == pytest.approx(1.0)


def test_equal_sets_have_distance_zero_even_with_a_singular_covariance():
    features = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    statistics = feature_statistics(features)
    assert frechet_distance(*statistics, *statistics) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_symmetric():
    generator = torch.Generator().manual_seed(2)
    a = feature_statistics(torch.randn(40, 8, generator=generator))
    b = feature_statistics(torch.randn(50, 8, generator=generator) * 2 + 1)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-9)


def test_statistics_are_float64_and_unbiased():
    mean, covariance = feature_statistics(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    torch.testing.assert_close(mean, torch.tensor([1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(covariance, torch.tensor([[2.0, 4.0], [4.0, 8.0]]).double())


def test_one_vector_has_no_covariance():
    with pytest.raises(ValueError, match="sample more images"):
        feature_statistics(torch.zeros(1, 32))


def test_psnr_of_a_known_error():
    reference = torch.zeros(2, 1, 4, 4)
    images = torch.stack([torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 0.01)])
    torch.testing.assert_close(psnr(images, reference), torch.tensor([20.0, 40.0]).double())


def test_psnr_of_equal_images_is_finite():
    images = torch.rand(2, 1, 4, 4)
    assert psnr(images, images).tolist() == [100.0, 100.0]


def test_psnr_wants_one_shape():
    with pytest.raises(ValueError, match="same seeds"):
        psnr(torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4))
