import base64
import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import pytest
from diffusers import DDPMPipeline, EDMEulerScheduler
from evaluation_fixtures import (  # noqa: F401
    REFERENCE_STEPS,
    independent_folder,
    short_reference,
    tiny_folder,
)
from PIL import Image

from morse.evaluation.bench import benchmark, measuring, pipelines, sampler
from morse.evaluation.bench.benchmark import BenchmarkConfig, measure_benchmark, run_benchmark
from morse.evaluation.bench.loading import load_bare, load_pipelines
from morse.evaluation.bench.speed import measure_speed_table
from morse.evaluation.bench.tasks import list_tasks
from morse.saved_plans import SavedPlan


@pytest.fixture(scope="module")
def config(tiny_folder, independent_folder, tmp_path_factory):  # noqa: F811
    return BenchmarkConfig(
        output_dir=tmp_path_factory.mktemp("bench"),
        pipeline=str(tiny_folder),
        num_images=3,
        batch_size=2,
        lsd=(2, 3),
        baseline_lsd=(4,),
        ddim_ratios=(1.5,),
        dpm_ratios=(2.0,),
        independent_dot=str(independent_folder),
        solvers=("ddim",),
        planned_solvers=(),
        speed_ratio=4.0,
        latency_batch_sizes=(1,),
        num_replicates=2,
        seeds=(0, 10),
        lossless_delta=("psnr=0.3",),
        kinds=("baseline", "morse", "reuse", "independent"),
        peers=("none",),
        device="cpu",
    )


def check_grid(result):
    grid = result["grid"]
    assert grid["seeds"] == [0, 1, 2]
    labels = [row["label"] for row in grid["rows"]]
    assert labels[0] == f"DPM++ 2M, {REFERENCE_STEPS} LSD" and "Morse-DDIM r1.5, 3 LSD" in labels
    assert len(labels) == len(set(labels)) == 1 + 2 * 4
    for row in grid["rows"]:
        picture = Image.open(io.BytesIO(base64.b64decode(row["png_base64"])))
        assert (picture.size, picture.mode) == ((3 * 32, 32), "L")


def test_the_benchmark_end_to_end(config, tmp_path, monkeypatch):
    result = run_benchmark(config)
    assert len(result["rows"]) == 3 + 3 * 2
    assert {row["kind"] for row in result["rows"]} == set(config.kinds)
    assert result["not_measured"] == [] and result["seeds_left_out"] == []
    assert all(not row["fallbacks"] for row in result["rows"])
    assert result["settings"]["seeds"] == [0, 10]
    assert result["settings"]["lossless_delta"] == ["psnr=0.3"]
    assert len(result["models"]["dot_sha256"]) == len(result["models"]["independent_dot_sha256"])
    assert result["models"]["dash"]["class"] == "UNet2DModel"
    assert "DeepCache" not in result["packages"]  # it is installed, but did not run
    assert [entry["merged"] for entry in result["speed_ratios"]] == [True, False]
    # A Dot that starts at zero is reuse, so Morse and its control agree here.
    rows = {(row["kind"], row["solver"], row["budget"]): row for row in result["rows"]}
    morse, reuse = rows["morse", "ddim", 3], rows["reuse", "ddim", 3]
    assert morse["scores"]["psnr"]["value"] == pytest.approx(
        reuse["scores"]["psnr"]["value"], abs=1e-3
    )
    assert morse["plan"] == reuse["plan"] and morse["num_dot"] > 0
    by_seed = morse["scores"]["psnr"]["by_seed"]
    assert list(by_seed) == ["0", "10"] and len({*by_seed.values()}) == 2  # other noise
    check_grid(result)

    text = (config.output_dir / "benchmark.md").read_text()
    for wanted in ("Fréchet distance (Fashion-MNIST classifier features)", "Reuse-DDIM r1.5", "±"):
        assert wanted in text
    assert "FID" not in text
    assert f"Dot: sha256 {result['models']['dot_sha256'][:12]}; independent Dot" in text
    for words in ("has 2 replicates, fewer than 1,000", "No peak memory: it is measured on CUDA"):
        assert words in text

    # Resuming measures nothing again; redrawing needs the JSON only.
    monkeypatch.setattr(sampler, "sample_images", None)
    resumed = measure_benchmark(dataclasses.replace(config, resume=True).resolved())
    assert resumed["rows"] == result["rows"]
    run_benchmark(
        BenchmarkConfig(from_json=config.output_dir / "benchmark.json", output_dir=tmp_path)
    )
    assert (tmp_path / "benchmark.md").read_text().count("|") == text.count("|")
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    with pytest.raises(FileExistsError):
        run_benchmark(config)
    with pytest.raises(ValueError, match=r'lossless_delta was .* and is \["psnr=9"\]\)'):
        run_benchmark(dataclasses.replace(config, resume=True, lossless_delta=("psnr=9",)))

    # A repetition that lacks a cell would be averaged with others for some methods alone.
    folder = tmp_path / "partial"
    shutil.copytree(config.output_dir, folder)
    next(iter((folder / "cells").glob("*lsd3-seed10.json"))).unlink()
    stopped = dataclasses.replace(config, output_dir=folder, resume=True, max_seconds=1e-9)
    partial = measure_benchmark(stopped.resolved())
    assert partial["seeds_left_out"] == [{"seed": 10, "missing": 1}]
    assert partial["not_measured"] == []  # the figures of the other seed have every cell
    assert all(list(row["scores"]["psnr"]["by_seed"]) == ["0"] for row in partial["rows"])

    # The same command would measure another Dot, whose plans were searched meanwhile, other
    # weights, which the fingerprint that a Dot knows its Dash by does not tell, or the same
    # weights read as another estimate.
    load = pipelines.load_bare

    def scale(bare, dot):
        bare.unet.conv_out.weight.data *= 2

    def search(bare, dot):
        dot.register_to_config(plans={"DDIMScheduler": [SavedPlan(3, "DDD").to_config()]})

    def predict_velocity(bare, dot):
        bare.scheduler.register_to_config(prediction_type="v_prediction")

    changes = {"dot": search, "unet": scale, "scheduler": predict_velocity}
    for name, change in changes.items():

        def load_changed(*args, change=change, **options):
            loaded = load(*args, **options)
            change(*loaded)
            return loaded

        monkeypatch.setattr(pipelines, "load_bare", load_changed)
        with pytest.raises(ValueError, match=rf"{name}_sha256 was .* go on with those"):
            run_benchmark(dataclasses.replace(config, resume=True))


def test_the_speed_table_leaves_the_pipeline_as_it_was(tiny_folder):  # noqa: F811
    pipe = load_pipelines(str(tiny_folder), None, ("ddim",), "cpu")["ddim"]
    pipe.speed_ratio, merged = 3.0, pipe.dot.is_merged
    table = measure_speed_table(pipe, (1, 2))
    assert [(entry["merged"], entry["batch_size"]) for entry in table] == [
        (True, 1),
        (True, 2),
        (False, 1),
        (False, 2),
    ]
    assert all(entry["speed_ratio"] > 0 for entry in table)
    assert pipe.speed_ratio == 3.0 and pipe.dot.is_merged == merged


def test_a_ratio_of_zero_leaves_the_saved_plans_alone():
    config = BenchmarkConfig(solvers=("leapfrog",), dpm_ratios=(0.0,), peers=("none",))
    labels = {method.label for method, _ in list_tasks(config) if method.kind == "morse"}
    assert labels == {"Morse-Leapfrog as planned"}


def test_n_is_measured_at_batches_that_are_sampled():
    for options, sizes in (({}, (1, 16, 64)), ({"batch_size": 8}, (1,))):
        assert BenchmarkConfig(device="cpu", **options).resolved().latency_batch_sizes == sizes


def test_nothing_begins_when_time_is_over(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sampler.Bench, "sample", None)
    monkeypatch.setattr(sampler.Bench, "speed_table", None)
    hurried = dataclasses.replace(config, output_dir=tmp_path, max_seconds=1e-9)
    result = run_benchmark(hurried)
    assert not result["rows"] and "real_images" not in result
    report = (tmp_path / "benchmark.md").read_text("utf-8")
    assert "Reference:" not in report and "Real images" not in report


def test_no_method_begins_when_time_is_over(config, tmp_path, monkeypatch):
    now, sample = [0], sampler.Bench.sample

    def take_a_minute(*arguments):
        now[0] += 60
        return sample(*arguments)

    monkeypatch.setattr(sampler.Bench, "sample", take_a_minute)
    for module in (benchmark, measuring):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    few = {"seeds": (0,), "kinds": ("baseline",), "independent_dot": None, "lossless_delta": ()}
    few |= {"output_dir": tmp_path, "max_seconds": 150}
    result = measure_benchmark(dataclasses.replace(config, **few))
    assert len(result["rows"]) == 1 and now == [180]  # the reference's first image, its rest, that


def test_other_noise_schedules_are_refused(build_unet, tmp_path):
    DDPMPipeline(build_unet(), EDMEulerScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a EDMEulerScheduler, but"):
        load_bare(str(tmp_path), None, "cpu", needs_dot=False)


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="solver 'euler' is unknown"):
        BenchmarkConfig(solvers=("euler",))
    with pytest.raises(ValueError, match="share images"):
        BenchmarkConfig(seeds=(0, 100), num_images=500)
    with pytest.raises(ValueError, match="ddim_ratios"):
        BenchmarkConfig(ddim_ratios=(0.5,))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version is 99"):
        run_benchmark(BenchmarkConfig(from_json=other, output_dir=tmp_path))


def test_networks_in_half_precision(config, tmp_path):
    kinds = ("baseline", "morse", "reuse", "extrapolation", "pfdiff", "independent", "shrunk")
    result = run_benchmark(
        dataclasses.replace(
            config,
            dtype="bfloat16",
            kinds=kinds,
            seeds=(0,),
            lossless_delta=(),
            num_replicates=0,
            output_dir=tmp_path,
        )
    )
    assert result["dtype"] == "bfloat16" and result["not_measured"] == []
    assert {row["kind"] for row in result["rows"]} == set(kinds)
    assert all(not row["fallbacks"] for row in result["rows"])
    with pytest.raises(ValueError, match='dtype was "bfloat16" and is "float32"'):
        run_benchmark(
            dataclasses.replace(
                config, kinds=kinds, seeds=(0,), lossless_delta=(), resume=True, output_dir=tmp_path
            )
        )


def test_one_precision_is_chosen(config):
    with pytest.raises(ValueError, match="dtype is float16 and mixed_precision fp16; leave one"):
        dataclasses.replace(config, dtype="float16", mixed_precision="fp16")
