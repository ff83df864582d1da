"""Errors in features that a Dot is tuned on: closed forms, and which networks are taken."""

import math

import pytest
import torch
from torch import nn

from morse.evaluation.features import EMBEDDED, load_features
from morse.tuning.loss import MAX_PSNR, FeatureLoss, load_feature_loss, run_loss

CPU = torch.device("cpu")


class MapAndMean(nn.Module):
    """Gives the images themselves and the mean of their pixels."""

    def forward(self, images):
        return [images, images.mean((2, 3))]


class Scalar(nn.Module):
    """Gives one number for all images."""

    def forward(self, images):
        return images.mean()


def test_an_even_error_gives_its_logarithm_by_the_weights():
    targets = torch.rand(4, 1, 8, 8)
    flat, layered = FeatureLoss([nn.Flatten()]), FeatureLoss([MapAndMean()])
    error = math.log(0.1**2)
    assert float(flat(targets + 0.1, targets)) == pytest.approx((0.5 + 0.25) * error, rel=1e-4)
    assert float(layered(targets - 0.1, targets)) == pytest.approx(1.25 * error, rel=1e-4)
    both = FeatureLoss([nn.Flatten(), MapAndMean()])
    assert float(both(targets + 0.1, targets)) == pytest.approx(error, rel=1e-4)


def test_errors_that_cancel_in_a_batch_are_no_shift():
    targets = torch.rand(4, 1, 8, 8)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1)
    loss = FeatureLoss([nn.Flatten()])
    difference = loss(targets + 0.1, targets) - loss(targets + 0.1 * signs, targets)
    assert float(difference) == pytest.approx(0.25 * math.log(0.1**2 / 1e-6), rel=1e-3)


def test_equal_samples_have_a_finite_loss_and_no_gradient():
    samples = torch.rand(2, 1, 32, 32, requires_grad=True)
    loss = load_feature_loss([str(EMBEDDED)], CPU, samples.detach())(samples, samples.detach())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.25 * math.log(1e-6), rel=1e-5)
    assert not samples.grad.any()


def test_gradients_through_a_classifier_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    targets, samples = torch.rand(2, 3, 1, 32, 32, generator=generator, dtype=torch.float64)
    samples.requires_grad_(True)
    loss = FeatureLoss([load_feature_loss([str(EMBEDDED)], CPU, targets.float()).networks[0]])
    loss.double()
    loss(samples, targets).backward()
    direction = samples.grad / samples.grad.norm()
    with torch.no_grad():
        ahead, back = (loss(samples + step * direction, targets) for step in (1e-4, -1e-4))
    # Features are compared in float32, as autocast leaves it to them.
    assert float((ahead - back) / 2e-4) == pytest.approx(float(samples.grad.norm()), rel=0.05)


def test_a_run_is_compared_with_its_own_targets_and_is_no_nearer_than_80_db():
    targets, generator = torch.rand(4, 2, 1, 8, 8), torch.Generator().manual_seed(0)
    numbers, targets_of = torch.arange(4), [1, 0]
    loss = run_loss(targets_of)
    for _ in range(6):  # both are drawn
        found = loss(lambda _, run: targets[:, targets_of[run]], (numbers, targets), generator)
        assert float(found) == pytest.approx(math.log(10 ** (-MAX_PSNR / 10)))


def test_each_run_counts_by_the_logarithm_of_its_own_error():
    errors = torch.tensor([0.1, 0.001]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    targets, expected = torch.rand(2, 1, 8, 8), math.log(0.1 * 0.001)
    batch, generator = (torch.arange(2), targets[:, None]), torch.Generator()
    found = run_loss([0])(lambda *_: targets + errors, batch, generator)
    assert float(found) == pytest.approx(expected, rel=1e-3)
    vectors = FeatureLoss([nn.Flatten()])(targets + errors, targets)
    shift = math.log(0.0505**2)
    assert float(vectors) == pytest.approx(0.5 * expected + 0.25 * shift, rel=1e-3)


def test_layers_end_in_what_the_features_are_made_of():
    classifier, images = load_features(), torch.rand(2, 1, 32, 32)
    *maps, pooled = classifier.layers(images)
    sizes = [(32, 32, 32), (48, 16, 16), (64, 16, 16), (96, 8, 8)]
    assert [tuple(each.shape[1:]) for each in maps] == sizes
    torch.testing.assert_close(pooled, maps[-1].mean((2, 3)))
    features = nn.functional.gelu(classifier.embed(pooled))
    torch.testing.assert_close(classifier.features(images), features)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"feature_networks is 'nowhere', which is no folder of `morse train-features`"),
        ("torch.nn:Nothing", r"feature_networks is 'torch.nn:Nothing', which cannot be loaded"),
        ("test_tuning_loss:Scalar", r"which gives \(\) for 2 images; .* must be \(B, D\)"),
        ("torch.nn:Identity", r"which gives \(2, 1, 32, 32\) for 2 images"),
    ],
)
def test_networks_that_give_no_features_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        load_feature_loss([name], CPU, torch.rand(2, 1, 32, 32))
