import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from idx_files import write_idx
from PIL import Image

from morse.evaluation.features import (
    EMBEDDED,
    extract_features,
    features_sha256,
    load_features,
    load_reference,
    read_features_config,
)
from morse.evaluation.metrics import feature_statistics, frechet_distance
from morse.evaluation.train_features import TrainFeaturesConfig, augment, train_features

DATA = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist


@pytest.fixture
def tiny_data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for prefix, count in (("train", 96), ("t10k", 40)):
        write_idx(
            folder / f"{prefix}-images-idx3-ubyte.gz", draws.integers(0, 256, (count, 28, 28))
        )
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", draws.integers(0, 10, (count,)))
    return folder


def test_the_embedded_classifier_is_small_and_good():
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) < 1_000_000
    assert read_features_config()["test_accuracy"] >= 0.91
    assert len(features_sha256()) == 64
    model = load_features()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.features(torch.zeros(2, 1, 32, 32)).shape == (2, 32)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not installed")
def test_the_stored_statistics_are_those_of_the_images():
    from morse.training.data import open_images

    data = open_images(DATA, 32, 1, split="test")
    images = data.__getitems__(list(range(len(data))))
    model = load_features()
    features = extract_features(model, images, batch_size=50)
    mean, covariance = load_reference(split="test")
    torch.testing.assert_close(feature_statistics(features)[0], mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(feature_statistics(features)[1], covariance, rtol=1e-2, atol=1e-2)
    accuracy = (model.classify(features).argmax(dim=1) == data.labels).float().mean()
    assert float(accuracy) == pytest.approx(read_features_config()["test_accuracy"], abs=1e-3)


def test_real_test_images_are_close_to_the_training_images():
    distance = frechet_distance(*load_reference(split="test"), *load_reference(split="train"))
    assert 0 < distance < 0.02


def test_bytes_and_floats_give_the_same_features():
    model = load_features()
    images = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(
        extract_features(model, images, batch_size=2), extract_features(model, images.float() / 255)
    )


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\).*pad 28x28"):
        load_features().features(torch.zeros(2, 3, 32, 32))


def test_augmenting_moves_pixels_and_loses_none():
    images = torch.zeros(16, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 2:30, 2:30] = torch.randint(1, 256, (16, 1, 28, 28), dtype=torch.uint8)
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.dtype == torch.uint8 and not torch.equal(moved, images)
    assert torch.equal(moved.flatten(1).sort().values, images.flatten(1).sort().values)


def test_training_writes_what_loading_reads(tiny_data, tmp_path):
    config = TrainFeaturesConfig(
        tiny_data, tmp_path / "new" / "features", num_train_epochs=1, train_batch_size=32
    )
    accuracy = train_features(config)
    assert read_features_config(config.output_dir)["test_accuracy"] == round(accuracy, 4)
    features = extract_features(load_features(config.output_dir), torch.rand(3, 1, 32, 32))
    assert features.shape == (3, 32)
    mean, covariance = load_reference(config.output_dir)
    assert mean.dtype == covariance.dtype == torch.float64 and covariance.shape == (32, 32)
    with pytest.raises(FileExistsError, match="not empty"):
        train_features(config)


def test_processes_on_cpus_form_a_group(tiny_data, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    for name, value in {**launched, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    try:
        train_features(
            TrainFeaturesConfig(
                tiny_data, tmp_path / "out", num_train_epochs=1, train_batch_size=32
            )
        )
        assert PartialState().distributed_type == "MULTI_CPU"
        assert torch.distributed.is_initialized()
    finally:
        PartialState().destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def test_images_without_labels_or_too_few_are_refused(tiny_data, tmp_path):
    few = TrainFeaturesConfig(
        train_data_dir=tiny_data, output_dir=tmp_path / "out", train_batch_size=10_000
    )
    with pytest.raises(ValueError, match="train_batch_size is 10000"):
        train_features(few)
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    Image.new("L", (32, 32)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"train_data_dir is .* no labels"):
        train_features(replace(few, train_data_dir=tmp_path))


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-features"):
        load_features(tmp_path)
    folder = tmp_path / "cut"
    shutil.copytree(EMBEDDED, folder)
    for name in ("model.safetensors", "reference.safetensors"):
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_features(folder)
    with pytest.raises(ValueError, match=r"reference\.safetensors is damaged"):
        load_reference(folder)
    with pytest.raises(ValueError, match="choose one of"):
        load_reference(split="all")
