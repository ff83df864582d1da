import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from morse.evaluation.fid.extractors import Extractor
from morse.evaluation.fid.feature_sets import FeatureSet, load_statistics, save_statistics
from morse.evaluation.fid.fidelity import fidelity_scores
from morse.evaluation.fid.image_metrics import (
    Score,
    axes,
    clip_score,
    cmmd,
    feature_scores,
    frechet_error,
    inception_score,
    kernel_distance,
    precision_recall,
)
from morse.evaluation.fid.image_sets import ImageSet
from morse.evaluation.fid.lpips import alexnet_features, load_lpips
from morse.evaluation.metrics import FRECHET_LABEL, feature_statistics, frechet_distance
from morse.evaluation.torch_fidelity_loader import fidelity_module, torchmetrics_module


def random_features(count, dim=6, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mixing + shift


def extractor(name="inception", sha256="0" * 64):
    return Extractor(name, f"{name} features", sha256, "none", 3, True, lambda images: None)


def feature_set(features, logits=None, name="set"):
    return FeatureSet(name, *feature_statistics(features), len(features), features, logits)


def frechet_between(real, fake):
    return frechet_distance(*feature_statistics(real), *feature_statistics(fake))


def test_frechet_distance_equals_scipy_and_torch_fidelity():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    real, fake = random_features(300), random_features(200, shift=0.3, seed=1)
    (mean_a, cov_a), (mean_b, cov_b) = feature_statistics(real), feature_statistics(fake)
    root = scipy_linalg.sqrtm((cov_a @ cov_b).numpy()).real
    expected = float((mean_a - mean_b).square().sum() + (cov_a + cov_b).trace()) - 2 * root.trace()
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-4)
    fid = fidelity_module("metric_fid")
    statistics = [fid.fid_features_to_statistics(part.double()) for part in (real, fake)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(theirs, rel=1e-4)


def test_kernel_distance_equals_torch_fidelity_and_torchmetrics():
    real, fake = random_features(200), random_features(150, shift=0.3, seed=1)
    score = kernel_distance(real, fake, subset_size=50)
    theirs = fidelity_module("metric_kid").kid_features_to_metric(
        fake, real, kid_subset_size=50, verbose=False
    )
    assert score.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    # Averaged over subsets, the unbiased estimate is that of all images, up to the subsets' draw.
    poly_mmd = torchmetrics_module("image.kid").poly_mmd
    whole = float(poly_mmd(real[:150].double(), fake.double()))
    assert abs(score.value - whole) < 3 * score.standard_error


def test_the_standard_error_is_the_spread_over_repeated_draws():
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(40):
        real = torch.randn(100, 3, generator=generator)
        score = kernel_distance(real, torch.randn(100, 3, generator=generator) + 0.7, 20)
        values.append(score.value)
        errors.append(score.standard_error)
    # The spread of 40 draws is itself known to about 11 percent.
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.35)


@pytest.mark.parametrize("metric", ["frechet", "cmmd"])
def test_jackknifed_errors_are_the_spread_over_repeated_draws(metric):
    real, scores = random_features(200), []
    everything = random_features(40 * 150, shift=0.7)  # of the same distribution, but for the shift
    for fake in everything.split(150):
        if metric == "cmmd":
            scores.append(cmmd(real, fake))
        else:
            error = frechet_error(feature_set(real), feature_set(fake))
            scores.append(Score(frechet_between(real, fake), error))
    errors = [score.standard_error for score in scores]
    # The spread of 40 draws is itself known to about 11 percent.
    spread = np.std([score.value for score in scores], ddof=1)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.35)


def test_a_subset_is_never_more_than_half():
    features = random_features(10)
    score = kernel_distance(features, features + 1, subset_size=1000)
    assert math.isfinite(score.standard_error) and score.standard_error > 0


def test_precision_and_recall_equal_torch_fidelity_and_know_their_sides():
    real, fake = random_features(120), random_features(90, shift=0.5, seed=1)
    precision, recall = precision_recall(real, fake)
    module = fidelity_module("metric_prc")
    expected = module.calculate_precision_recall_full(fake, real)
    assert (precision.value, recall.value) == expected
    share = precision.value
    assert precision.standard_error == pytest.approx((share * (1 - share) / 90) ** 0.5)
    # Fakes that all sit in one place among the real images are precise and recall little.
    narrow = real[:1] + 0.01 * random_features(90, seed=2)
    precision, recall = precision_recall(real, narrow)
    assert precision.value > 0.9 and recall.value < 0.2


def test_inception_score_has_closed_forms():
    certain = torch.eye(4).repeat(250, 1) * 100  # each image is surely one of four classes
    # Undo torch-fidelity's shuffling, so that each of its ten splits has every class equally often.
    certain = certain[np.argsort(np.random.RandomState(2020).permutation(1000))]
    assert inception_score(certain).value == pytest.approx(4, rel=1e-6)
    same = inception_score(torch.ones(200, 4))
    assert same.value == pytest.approx(1) and same.standard_error == pytest.approx(0, abs=1e-9)


def test_the_inception_score_of_few_images_has_fewer_splits_or_is_none():
    logits = torch.eye(4).repeat(50, 1) * 100
    errors = [inception_score(logits[:count]).standard_error for count in (100, 199, 200)]
    assert errors[:2] == [None, None] and errors[2] > 0
    assert inception_score(logits[:100]).value == pytest.approx(4, rel=1e-6)
    assert not feature_scores(extractor(), None, feature_set(torch.rand(99, 6), logits[:99]))


def unit(count, seed, dim=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator) + 1, dim=1)


def test_cmmd_equals_the_biased_estimate_of_torch_fidelity():
    real, fake = unit(30, 0), -unit(30, 1)
    kid = fidelity_module("metric_kid")
    a, b = real.double().numpy(), fake.double().numpy()
    pairs = ((a, a), (a, b), (b, b))
    kernels = [kid.kernel_rbf(x, y, kid_kernel_rbf_sigma=10) for x, y in pairs]
    expected = 1000 * kid.mmd2(*kernels, mmd_est="biased")
    assert cmmd(real, fake, block=7).value == pytest.approx(expected, rel=1e-9)


def test_cmmd_of_unequal_sets_does_not_depend_on_repetition():
    real, fake = unit(10, 0), -unit(15, 1)
    assert cmmd(real.repeat(3, 1), fake).value == pytest.approx(cmmd(real, fake).value, rel=1e-9)
    assert cmmd(real, real.repeat(2, 1)).value == pytest.approx(0, abs=1e-9)
    # Two points at distance d: 2 - 2 exp(-d^2 / 200), times 1000.
    point = torch.tensor([[1.0, 0.0]])
    assert cmmd(point, -point).value == pytest.approx(2000 * (1 - math.exp(-4 / 200)), rel=1e-9)


def test_clip_score_is_100_cosines_without_negative_ones():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    score = clip_score(images, texts)
    assert score.value == pytest.approx((100 + 0 + 60) / 3)
    assert score.standard_error == pytest.approx(np.std([100, 0, 60], ddof=1) / math.sqrt(3))


def test_statistics_alone_allow_the_frechet_distance_only():
    real = feature_set(random_features(50))
    alone = FeatureSet("statistics", real.mean, real.covariance, None)
    fake = feature_set(random_features(50, seed=1), logits=torch.randn(100, 4))
    assert set(feature_scores(extractor(), alone, fake)) == {"frechet", "inception_score"}
    assert set(feature_scores(extractor(), None, fake)) == {"inception_score"}
    everything = {"frechet", "kernel_distance", "precision", "recall", "cmmd"}
    assert set(feature_scores(extractor("clip"), real, feature_set(fake.features))) == everything


def test_features_of_different_lengths_are_not_compared():
    with pytest.raises(ValueError, match="6 features an image and set 5"):
        feature_scores(extractor(), feature_set(random_features(9)), feature_set(torch.rand(9, 5)))


def test_only_inception_gives_names_like_fid():
    titles = {name: axes(extractor(name))["frechet"].title for name in ("inception", "clip")}
    assert titles == {"inception": "FID", "clip": "Fréchet distance (clip features)"}
    for title in extractor("my.module:Net").titles.values():
        assert not {"FID", "KID", "Inception score"} & {title}
    words = FRECHET_LABEL.partition("(")[2].rstrip(")")
    own = Extractor("fashion-mnist", words, "", "", 1, False, lambda images: None)
    assert own.titles["frechet"] == FRECHET_LABEL


def test_too_few_images_are_warned_of():
    assert "singular" in feature_set(random_features(6)).warnings()[0]
    assert feature_set(random_features(7)).warnings() == []


def test_statistics_survive_the_file_and_have_pytorch_fids_layout(tmp_path):
    file, features = tmp_path / "deep" / "stats.npz", feature_set(random_features(40))
    save_statistics(file, features, extractor())
    with np.load(file, allow_pickle=False) as content:
        assert content["mu"].dtype == content["sigma"].dtype == np.float64
        assert content["mu"].shape == (6,) and content["sigma"].shape == (6, 6)
    loaded = load_statistics(file, extractor())
    torch.testing.assert_close(loaded.mean, features.mean, rtol=0, atol=0)
    torch.testing.assert_close(loaded.covariance, features.covariance, rtol=0, atol=0)
    assert loaded.num_images == 40 and loaded.notes == []
    assert [path.name for path in file.parent.iterdir()] == ["stats.npz"]


def test_statistics_of_another_extractor_are_refused(tmp_path):
    save_statistics(tmp_path / "s.npz", feature_set(random_features(40)), extractor())
    with pytest.raises(ValueError, match="made with extractor inception, but this is clip"):
        load_statistics(tmp_path / "s.npz", extractor("clip"))
    with pytest.raises(ValueError, match="made with sha256"):
        load_statistics(tmp_path / "s.npz", extractor(sha256="1" * 64))


def test_a_file_of_pytorch_fid_is_read_with_a_note(tmp_path):
    others = np.array([{}], dtype=object)  # as files of other tools may hold images too
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=others)
    loaded = load_statistics(tmp_path / "s.npz", extractor())
    assert loaded.num_images is None and "does not say which extractor" in loaded.notes[0]
    assert f"resized by {extractor().resize}: pytorch-fid" in loaded.notes[0]


@pytest.mark.parametrize(
    "arrays", [{"mu": np.zeros(3)}, {"mu": np.zeros(3), "sigma": np.array([{}], dtype=object)}]
)
def test_files_of_another_layout_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match="is no statistics file"):
        load_statistics(tmp_path / "s.npz", extractor())


def test_broken_and_missing_files_are_refused(tmp_path):
    for content in (b"", b"PK broken"):
        (tmp_path / "s.npz").write_bytes(content)
        with pytest.raises(ValueError, match="is no statistics file"):
            load_statistics(tmp_path / "s.npz", extractor())
    for sigma, told in ((np.eye(2), "must be"), (np.eye(3) * np.nan, "holds NaN or infinity")):
        np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=sigma)
        with pytest.raises(ValueError, match=told):
            load_statistics(tmp_path / "s.npz", extractor())
    with pytest.raises(FileNotFoundError):
        load_statistics(tmp_path / "nowhere.npz", extractor())


def image_set(arrays):
    from PIL import Image

    names = [str(i) for i in range(len(arrays))]
    return ImageSet("set", names, lambda i: Image.fromarray(arrays[i]))


def test_fidelity_of_a_known_error():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 200, (5, 16, 16, 3), dtype=np.uint8)
    scores = fidelity_scores(image_set(references + 51), image_set(references), batch_size=2)
    assert scores["psnr"].value == pytest.approx(20 * math.log10(5))
    assert scores["psnr"].standard_error == pytest.approx(0, abs=1e-6)
    ssim = torchmetrics_module("functional.image").structural_similarity_index_measure
    pixels = torch.from_numpy(references).permute(0, 3, 1, 2).float() / 255
    expected = ssim(pixels + 0.2, pixels, data_range=1.0)
    assert scores["ssim"].value == pytest.approx(float(expected), rel=1e-4)


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory):
    """AlexNet's convolutions with random weights, and a tensor of its classifier."""
    torch.manual_seed(0)
    state = {f"features.{k}": v for k, v in alexnet_features().state_dict().items()}
    file = tmp_path_factory.mktemp("alexnet") / "alexnet.safetensors"
    save_file({**state, "classifier.6.bias": torch.zeros(3)}, file)
    return file


def test_lpips_is_the_published_formula_over_alexnet(alexnet_file):
    """Zhang et al. 2018, Equation 1, with torchmetrics' linear layers."""
    theirs = torchmetrics_module("functional.image.lpips")
    heads = Path(theirs.__file__).parent / "lpips_models" / "alex.pth"
    weights = torch.load(heads, map_location="cpu", weights_only=True)
    network = alexnet_features()
    prefix = "features."
    state = {k.removeprefix(prefix): v for k, v in load_file(alexnet_file).items() if prefix in k}
    network.load_state_dict(state)
    generator = torch.Generator().manual_seed(0)
    images, references = torch.rand(2, 3, 3, 32, 32, generator=generator)
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    pair, expected = [(2 * x - 1 - shift) / scale for x in (images, references)], 0
    with torch.no_grad():
        for index, layer in enumerate(network[:12]):
            pair = [layer(x) for x in pair]
            if index in (1, 4, 7, 9, 11):  # after each ReLU
                unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-8) for x in pair]
                head = weights[f"lin{(1, 4, 7, 9, 11).index(index)}.model.1.weight"]
                expected = expected + ((unit[0] - unit[1]) ** 2 * head).sum(1).mean((1, 2))
    measure = load_lpips(alexnet_file)
    torch.testing.assert_close(measure(images, references), expected, rtol=1e-4, atol=1e-5)
    assert measure(images, images).abs().max() < 1e-6


def test_lpips_is_measured_beside_psnr(alexnet_file):
    rng = np.random.default_rng(0)
    first, second = (image_set(rng.integers(0, 256, (3, 32, 32, 3), np.uint8)) for _ in range(2))
    scores = fidelity_scores(first, second, 2, load_lpips(alexnet_file))
    assert set(scores) == {"psnr", "ssim", "lpips"} and scores["lpips"].value > 0


def test_lpips_without_weights_names_file_and_option(tmp_path, alexnet_file):
    with pytest.raises(ValueError, match=r"--lpips_weights: download alexnet-owt-7be5be79\.pth"):
        load_lpips(None)
    with pytest.raises(FileNotFoundError, match="lpips_weights is"):
        load_lpips(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"features.0.weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="does not hold the tensors of alexnet-owt-7be5be79"):
        load_lpips(other)


def test_a_missing_package_is_named(monkeypatch):
    from morse.evaluation import torch_fidelity_loader

    monkeypatch.setattr(torch_fidelity_loader, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        fidelity_module("metric_kid")
