"""What the benchmark compares sets of images in, other than the embedded classifier's features."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from evaluation_fixtures import save_tiny_pipeline, short_reference, tiny_folder  # noqa: F401
from idx_files import write_idx
from PIL import Image
from torch import nn

from morse.cli import parse_config
from morse.evaluation.bench import real_images
from morse.evaluation.bench.benchmark import BenchmarkConfig, measure_benchmark, run_benchmark
from morse.evaluation.bench.feature_space import FeatureSpace, as_image_set, choose_extractor
from morse.evaluation.bench.parts import join_parts
from morse.evaluation.bench.real_images import open_real, read_real, real_words
from morse.evaluation.bench.store import CellStore
from morse.evaluation.features import extract_features, features_sha256, load_features
from morse.evaluation.fid.extractors import load_extractor
from morse.evaluation.fid.feature_sets import extract_feature_set, load_feature_set, save_statistics

CPU = torch.device("cpu")


class Pixels(nn.Module):
    """150 of the pixels of images of 16x16."""

    def forward(self, images):
        if images.shape[1:] != (3, 16, 16):
            raise RuntimeError("made for 16x16")
        return images.flatten(1)[:, 300:450]


class Few(nn.Module):
    channels = 1

    def forward(self, images):
        return images.mean(dim=2)[:, 0, :3]


PIXELS, FEW = f"{__name__}:Pixels", f"{__name__}:Few"


def random_images(count, channels=3, size=16, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def write_images(folder, count, size=16):
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(count, size, size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("real") / "images", 6)


@pytest.fixture(scope="module")
def colour_folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("colour") / "pipeline", sample_size=16)


@pytest.fixture(scope="module")
def config(colour_folder, real_folder, tmp_path_factory):
    return BenchmarkConfig(
        output_dir=tmp_path_factory.mktemp("bench"),
        pipeline=str(colour_folder),
        extractor=PIXELS,
        real=str(real_folder),
        num_images=4,
        lsd=(2,),
        baseline_lsd=(4,),
        solvers=("ddim",),
        planned_solvers=(),
        kinds=("baseline", "morse"),
        peers=("none",),
        ddim_ratios=(1.5,),
        speed_ratio=4.0,
        latency_batch_sizes=(0,),
        num_replicates=4,
        device="cpu",
    )


@pytest.fixture(scope="module")
def result(config):
    return run_benchmark(config)


def test_any_pipeline_has_a_distribution_axis(config, result):
    assert list(result["axes"]) == ["kernel", "kernel_to_reference", "psnr", "ssim"]
    title = f"Kernel distance (features of {PIXELS})"
    assert result["axes"]["kernel"]["title"] == f"{title} to real images"
    assert result["metric"] == title
    for row in result["rows"]:
        for axis in ("kernel", "kernel_to_reference"):
            assert row["scores"][axis]["interval"] is not None
    extractor = load_extractor(PIXELS, CPU)
    assert result["extractor"] == {
        **extractor.identity(), "words": f"features of {PIXELS}", "feature_dim": 150
    }  # fmt: skip
    assert result["real_images"] == f"{config.real} (6)"
    assert (result["real"]["num_images"], result["real"]["reading"]["sizes"]) == (6, {"16x16": 6})
    assert "features_test_accuracy" not in result
    text = (config.output_dir / "benchmark.md").read_text()
    assert f"{title} to real images" in text and "FID" not in text and "KID" not in text
    assert "Fréchet" not in text and f"compared in features of {PIXELS}, 150 numbers" in text


def test_a_run_goes_on_with_the_same_extractor_alone(config, result, monkeypatch, tmp_path):
    again = dataclasses.replace(config, resume=True, json=tmp_path / "again.json")
    with monkeypatch.context() as patched:
        patched.setattr("morse.evaluation.bench.sampler.sample_images", None)
        patched.setattr(real_images, "extract_feature_set", None)
        assert measure_benchmark(again)["rows"] == result["rows"]
    # No cell depends on real images, so that others may be compared with, and nothing is sampled.
    with monkeypatch.context() as patched:
        patched.setattr("morse.evaluation.bench.sampler.sample_images", None)
        others = dataclasses.replace(again, real=str(write_images(tmp_path / "others", 7)))
        found = measure_benchmark(others)
    assert found["real"]["num_images"] == 7
    for row, before in zip(found["rows"], result["rows"], strict=True):
        assert row["scores"]["psnr"] == before["scores"]["psnr"]
        assert row["scores"]["kernel"] != before["scores"]["kernel"]
    with pytest.raises(ValueError, match=r"extractor\.extractor was .* and is "):
        measure_benchmark(dataclasses.replace(again, extractor=FEW))
    settings = config.output_dir / "settings.json"
    kept = settings.read_text()
    try:
        changed = json.loads(kept) | {"extractor": {"extractor": PIXELS, "sha256": "0"}}
        settings.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r'extractor\.sha256 was "0" and is '):
            measure_benchmark(again)
    finally:
        settings.write_text(kept)


def test_the_option_has_its_old_name_too():
    assert parse_config(BenchmarkConfig, ["--features", "none"]).extractor == "none"
    assert parse_config(BenchmarkConfig, ["--extractor", "clip"]).extractor == "clip"


def test_what_is_missing_is_told_before_anything_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr("morse.evaluation.bench.benchmark.Bench", None)
    config = dataclasses.replace(config, output_dir=tmp_path / "out")
    for changes, error, words in (
        ({"extractor": "inception"}, ValueError, "needs --inception_weights"),
        ({"extractor": "vgg"}, ValueError, "choose inception, clip, dinov2"),
        ({"real": str(tmp_path / "none")}, FileNotFoundError, "does not exist"),
    ):
        with pytest.raises(error, match=words):
            measure_benchmark(dataclasses.replace(config, **changes))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="name what to compare images in, such as --extractor"):
        BenchmarkConfig(real="photos")


def test_statistics_allow_a_frechet_distance_alone(tmp_path, real_folder):
    few, pixels = (load_extractor(name, CPU) for name in (FEW, PIXELS))
    for extractor, file in ((few, "few.npz"), (pixels, "pixels.npz")):
        save_statistics(tmp_path / file, load_feature_set(str(real_folder), extractor), extractor)
    real = open_real(str(tmp_path / "few.npz"), few)
    assert real.num_images == 6 and real_words(real) == f"{tmp_path / 'few.npz'} (6)"
    with pytest.raises(ValueError, match="150 features the kernel distance is measured, which"):
        open_real(str(tmp_path / "pixels.npz"), pixels)
    unknown = dataclasses.replace(real, num_images=None)
    assert real_words(unknown).endswith("(of an unknown number)")
    store = CellStore(tmp_path / "run", {}, False)
    opened = open_real(str(write_images(tmp_path / "two", 2)), few)
    with pytest.raises(ValueError, match="has 2 images that can be read, but a Fréchet distance"):
        read_real(opened, few, store)
    assert open_real(None, few) is None and open_real(None, None) is None


def test_real_images_are_drawn_at_random_and_kept(tmp_path, real_folder, monkeypatch):
    monkeypatch.setattr(real_images, "MAX_REAL", 4)
    extractor, store = load_extractor(PIXELS, CPU), CellStore(tmp_path, {}, False)
    opened = open_real(str(real_folder), extractor)
    real = read_real(opened, extractor, store)
    assert real_words(real) == f"{real_folder} (4 drawn at random from 6)"
    every = extract_feature_set(opened, extractor).features
    assert sum((every == one).all(dim=1).any() for one in real.features) == 4
    with monkeypatch.context() as patched:
        patched.setattr(real_images, "extract_feature_set", None)
        kept = read_real(opened, extractor, store)
    torch.testing.assert_close(kept.features, real.features, rtol=0, atol=0)
    assert (kept.facts, kept.num_images) == (real.facts, 4)


@pytest.mark.parametrize("kind", ["images", "idx"])
def test_real_images_that_were_replaced_are_read_anew(tmp_path, kind):
    extractor, store = load_extractor(FEW, CPU), CellStore(tmp_path / "run", {}, False)

    def read(shade):
        folder = tmp_path / "real"
        folder.mkdir(exist_ok=True)
        pixels = np.full((6, 28, 28), shade, dtype=np.uint8)
        if kind == "idx":
            write_idx(folder / "train-images-idx3-ubyte", pixels)
        for i in range(6 if kind == "images" else 0):
            Image.fromarray(pixels[i]).save(folder / f"{i}.png")
        for file in folder.iterdir():
            os.utime(file, (shade, shade))  # a clock may stand still for a moment
        return read_real(open_real(str(folder), extractor), extractor, store).features.mean()

    assert float(read(102)) == pytest.approx(2 * float(read(51)))


@pytest.mark.parametrize(("channels", "name"), [(3, PIXELS), (1, PIXELS), (3, FEW)])
def test_sampled_images_are_seen_as_files_of_them_would_be(channels, name, tmp_path):
    images, extractor = random_images(3, channels), load_extractor(name, CPU)
    space = FeatureSpace(extractor, None, False, CPU)
    sampled = as_image_set(images)
    for i in range(3):
        sampled.open(i).save(tmp_path / f"{i}.png")
    files = load_feature_set(str(tmp_path), extractor)
    torch.testing.assert_close(space.extract(images), files.features, rtol=0, atol=0)
    if name == PIXELS and channels == 3:
        expected = (images * 255).round() / 255
        torch.testing.assert_close(files.features, expected.flatten(1)[:, 300:450])


def test_what_makes_sets_of_images_differ_is_told(real_folder, capsys):
    resizing = dataclasses.replace(load_extractor(FEW, CPU), resizes=True)
    real = load_feature_set(str(real_folder), resizing)
    FeatureSpace(resizing, real, False, CPU).check(random_images(2, size=20))
    assert "real images are 16x16 (6) and sampled ones 20x20" in capsys.readouterr().out
    auto = choose_extractor(BenchmarkConfig(), CPU)
    FeatureSpace(auto, None, True, CPU).check(random_images(2))
    assert "fidelity alone is measured: give --extractor" in capsys.readouterr().out


def test_the_embedded_classifier_sees_the_pixels_as_sampled():
    config = BenchmarkConfig(device="cpu")
    space = FeatureSpace(choose_extractor(config, CPU), None, True, CPU)
    images = random_images(3, 1, 32)
    expected = extract_features(load_features(), images)
    torch.testing.assert_close(space.scorer(images).reference_features, expected, rtol=0, atol=0)
    assert space.scorer(random_images(3)).reference_features.shape == (3, 0)
    asked = dataclasses.replace(space, is_optional=False)
    with pytest.raises(ValueError, match="pad 28x28"):
        asked.check(random_images(3))
    facts = asked.facts(32)
    assert facts["metric"] == "Fréchet distance (Fashion-MNIST classifier features)"
    assert facts["features_sha256"] == features_sha256() and facts["features_test_accuracy"] > 0.9
    nothing = FeatureSpace(
        choose_extractor(BenchmarkConfig(extractor="none"), CPU), None, False, CPU
    )
    assert nothing.facts(0) == {} and nothing.scorer(images).extract is None


def test_sizes_that_an_extractor_does_not_take_are_refused(tmp_path, real_folder):
    extractor = load_extractor(PIXELS, CPU)
    real = load_feature_set(str(real_folder), extractor)
    with pytest.raises(ValueError, match=r"images are 16x16 \(6\) and sampled ones 20x20, but"):
        FeatureSpace(extractor, real, False, CPU).check(random_images(2, size=20))
    with pytest.raises(ValueError, match=r"does not resize, and fails on sampled images of 20x20"):
        FeatureSpace(extractor, None, False, CPU).check(random_images(2, size=20))


def test_parts_may_know_different_axes():
    """As where time was over before a guidance scale was begun."""
    psnr, kernel = {"psnr": {"title": "PSNR"}}, {"kernel": {"title": "KID"}}
    lists = {"rows": [], "speedups": [], "lossless": []}
    begun = {"axes": kernel | psnr, "baseline_curves": {"kernel": [{"cost": 1}], "psnr": []}}
    figures = [begun | lists, {"axes": psnr, "baseline_curves": {"psnr": []}} | lists]
    joined = join_parts((1.0, 2.0), [{"speed_ratio": {}}] * 2, figures)
    assert list(joined["axes"]) == ["kernel", "psnr"]
    assert joined["baseline_curves"]["kernel"] == [{"cost": 1, "guidance_scale": 1.0}]
