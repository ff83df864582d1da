import json
from dataclasses import replace

import pytest
import torch
from evaluation_fixtures import save_tiny_pipeline, tiny_folder  # noqa: F401
from PIL import Image

from morse.evaluation import demo_sampling
from morse.evaluation.bench.loading import load_pipelines
from morse.evaluation.bench.runs import sample_images
from morse.evaluation.demo import DemoConfig, run_demo
from morse.plan import MorsePlan


def test_the_demo_writes_pictures_and_figures(tiny_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(demo_sampling, "REFERENCE_STEPS", 20)
    config = DemoConfig(
        pipeline=str(tiny_folder),
        output_dir=tmp_path / "with space",
        json=tmp_path / "new" / "demo.json",
        lsd=(4, 8),
        num_images=3,
        speed_ratio=4.0,
        device="cpu",
    )
    rows = run_demo(config)
    assert len(rows) == 2 * 6
    for row in rows:
        assert row.lsd <= row.budget
        assert (row.num_dot > 0) == (row.kind == "morse")
    assert Image.open(config.output_dir / "grid.png").height > 13 * 64
    assert (config.output_dir / "quality.png").stat().st_size > 10_000
    facts = json.loads(config.json.read_text())
    assert facts["num_images"] == 3 and len(facts["rows"]) == len(rows)
    printed = " ".join(capsys.readouterr().out.split())
    assert "biased" in printed and "grid.png" in printed and "FID" not in printed
    # Into the same folder, with N measured.
    fewer = run_demo(replace(config, lsd=(4,), num_images=2, speed_ratio=None))
    assert len(fewer) == 6 and Image.open(config.output_dir / "grid.png").height < 13 * 64
    facts = json.loads(config.json.read_text())
    assert facts["num_images"] == 2 and len(facts["rows"]) == len(fewer)


@pytest.mark.parametrize("steps", [3, MorsePlan.from_string("Doo")])
def test_batch_size_never_changes_a_picture(tiny_folder, steps):  # noqa: F811
    pipe = load_pipelines(str(tiny_folder), None, ("ddim",), "cpu")["ddim"]
    together = sample_images(pipe, steps, range(5, 9), batch_size=4)
    apart = sample_images(pipe, steps, range(5, 9), batch_size=3)
    # Convolutions of other batch sizes may sum in another order.
    torch.testing.assert_close(together.images, apart.images, rtol=0, atol=1e-4)
    assert together.images.shape == (4, 1, 32, 32)
    assert not torch.equal(together.images[0], together.images[1])


def test_steps_are_reported(tiny_folder):  # noqa: F811
    pipe = load_pipelines(str(tiny_folder), None, ("dpmsolver++",), "cpu")["dpmsolver++"]
    ticks = []
    samples = sample_images(
        pipe, MorsePlan.from_string("Doo"), range(2), 1, on_step=lambda: ticks.append(1)
    )
    assert len(ticks) == 2 * 3
    assert (samples.num_dash, samples.num_dot, samples.plan) == (1, 2, "Doo")
    assert samples.fallbacks == {}
    assert "progress_bar" not in vars(pipe)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="num_images is 1"):
        DemoConfig(num_images=1)
    with pytest.raises(ValueError, match="2 or more each"):
        DemoConfig(lsd=(1, 5))
    with pytest.raises(ValueError, match="one budget or more"):
        DemoConfig(lsd=())
    with pytest.raises(ValueError, match="speed_ratio is 0; it must be more than 0"):
        DemoConfig(speed_ratio=0)


def test_other_images_have_no_distances(tmp_path, monkeypatch):
    for module in ("demo_sampling", "bench.methods"):
        monkeypatch.setattr(f"morse.evaluation.{module}.REFERENCE_STEPS", 6)
    folder = save_tiny_pipeline(tmp_path / "pipeline", sample_size=16)
    config = DemoConfig(
        pipeline=str(folder), output_dir=tmp_path / "out", lsd=(4, 6), num_images=2,
        speed_ratio=4.0, device="cpu", json=tmp_path / "demo.json",
    )  # fmt: skip
    rows = run_demo(config)
    assert {row.frechet for row in rows} == {row.frechet_to_reference for row in rows} == {None}
    without = [(row.label, row.budget) for row in rows if row.psnr is None]
    assert without == [("DPM++ 2M", 6)]
    assert (config.output_dir / "grid.png").exists()


def test_pipelines_that_take_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pipeline is 'fashion-mnist-text', which takes prompt"):
        run_demo(DemoConfig(pipeline="fashion-mnist-text", output_dir=tmp_path, num_images=2))


def test_an_unknown_device_is_named(tiny_folder, monkeypatch):  # noqa: F811
    with pytest.raises(ValueError, match="use auto, cpu"):
        load_pipelines(str(tiny_folder), None, ("ddim",), "toaster")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda:0', but torch finds no CUDA"):
        load_pipelines(str(tiny_folder), None, ("ddim",), "cuda:0")


@pytest.mark.slow
def test_the_embedded_default_runs_quickly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_sampling, "REFERENCE_STEPS", 20)
    config = DemoConfig(num_images=2, lsd=(4, 8), speed_ratio=6.0, output_dir=tmp_path)
    rows = run_demo(config)
    best = {row.budget: row.psnr for row in rows if row.solver == "dpmsolver++"}
    assert best[8] > best[4] > 10
    assert "…" not in capsys.readouterr().out  # the table fits
    planned = {row.budget: row for row in rows if row.label == "Morse-Leapfrog"}
    assert planned[8].plan == "ggDoDDoDoDoDoDo" and planned[8].psnr > best[8]
