import base64
import dataclasses
import io
import json

import pytest
import torch
from evaluation_fixtures import independent_folder, tiny_folder  # noqa: F401
from PIL import Image

from morse.evaluation.benchmark import BenchmarkConfig, run_benchmark
from morse.evaluation.features import load_features, load_reference
from morse.evaluation.loading import load_pipelines
from morse.evaluation.runs import Method
from morse.evaluation.scoring import AXES, Score, Scorer, standard_error
from morse.evaluation.speed import measure_speed_table
from morse.evaluation.store import Cell, CellStore
from morse.evaluation.summary import BEST, summarize


def quality_cells(make_quality, methods, budgets, seed=0, replicates=()):
    """Cells whose every axis has the given quality; `make_quality(method, budget)`."""
    for method in methods:
        for budget in budgets[method.kind]:
            value = make_quality(method, budget)
            scores = {
                axis: Score(
                    value if better == "lower" else -value,
                    tuple((value if better == "lower" else -value) * r for r in replicates),
                )
                for axis, better in AXES.items()
            }
            seconds = budget / 10
            yield Cell(method, budget, seed, "", budget, 0, budget, seconds, {}, scores)


def test_a_method_twice_as_fast_shows_as_two_on_every_axis_and_cost():
    ddim, solver, fast = Method("ddim"), Method("dpmsolver++"), Method("ddim", "morse", 2.0)
    rate = {ddim: 1.0, solver: 1.5, fast: 2.0}
    budgets = {"baseline": range(2, 101), "morse": (5, 10, 20)}
    cells = list(
        quality_cells(lambda method, n: 1 / (rate[method] * n), rate, budgets, replicates=(0.9, 1))
    )
    result = summarize(cells)
    means = {
        (entry["method"], entry["baseline"], entry["axis"], entry["cost"]): entry
        for entry in result["speedups"]
    }
    for axis in AXES:
        for cost in ("lsd", "seconds"):
            entry = means[fast.label, "DDIM", axis, cost]
            assert entry["mean"]["value"] == pytest.approx(2, rel=5e-3)
            assert [point["budget"] for point in entry["points"]] == [5, 10, 20]
        over_best = means[fast.label, BEST, axis, "lsd"]
        assert over_best["mean"]["value"] == pytest.approx(4 / 3, rel=5e-3)
        assert means[solver.label, "DDIM", axis, "lsd"]["mean"]["num_points"] == 3
        # All replicates scale both curves alike, so the speed-up does not spread.
        assert over_best["mean_standard_error"] == pytest.approx(0, abs=0.01)
    assert len(result["rows"]) == 2 * 99 + 3


def test_seeds_are_averaged():
    methods, budgets = [Method("ddim")], {"baseline": (5,)}
    cells = [
        *quality_cells(lambda m, n: 1.0, methods, budgets, seed=0, replicates=(1.0, 2.0)),
        *quality_cells(lambda m, n: 3.0, methods, budgets, seed=9, replicates=(1.0, 2.0)),
    ]
    (row,) = summarize(cells)["rows"]
    assert row["frechet"] == 2.0 and row["frechet_by_seed"] == {"0": 1.0, "9": 3.0}
    assert row["frechet_standard_error"] == pytest.approx(standard_error((2.0, 4.0)))


def test_the_scorer_shares_its_draws_between_methods():
    reference = torch.rand(12, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    scorers = [
        Scorer(load_features(), load_reference(), reference, num_replicates=3, seed=4)
        for _ in range(2)
    ]
    noisy = (reference + 0.1).clamp(max=1)
    assert scorers[0].score(noisy) == scorers[1].score(noisy)
    same = scorers[0].score(reference)
    assert same["psnr"].value == 100
    assert same["frechet_to_reference"].value == pytest.approx(0, abs=1e-5)
    assert same["frechet_to_reference"].replicates == pytest.approx([0, 0, 0], abs=1e-5)


def test_a_store_resumes_only_the_same_run(tmp_path):
    store = CellStore(tmp_path, {"num_images": 8}, resume=False)
    (cell,) = quality_cells(lambda m, n: 1.0, [Method("dpmsolver++")], {"baseline": (5,)})
    store.add(cell)
    assert store.once("answer", lambda: 42) == store.once("answer", lambda: 0) == 42
    with pytest.raises(FileExistsError, match="--resume"):
        CellStore(tmp_path, {"num_images": 8}, resume=False)
    with pytest.raises(ValueError, match="num_images is 9"):
        CellStore(tmp_path, {"num_images": 9}, resume=True)
    again = CellStore(tmp_path, {"num_images": 8}, resume=True)
    assert again.has(cell.method, 5, 0) and not again.has(cell.method, 6, 0)
    assert again.get(cell.method, 5, 0) == cell


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
        solvers=("ddim", "dpmsolver++"),
        speed_ratio=4.0,
        latency_batch_sizes=(1,),
        num_replicates=2,
        seeds=(0, 10),
        kinds=("baseline", "morse", "reuse", "independent"),
        peers=("none",),
        device="cpu",
    )


def check_grid(result):
    grid = result["grid"]
    assert grid["seeds"] == [0, 1, 2]
    labels = [row["label"] for row in grid["rows"]]
    assert labels[0] == "DPM++ 2M, 100 LSD" and "Morse-DDIM r1.5, 3 LSD" in labels
    assert len(labels) == len(set(labels)) == 1 + 2 * (2 * 4)
    for row in grid["rows"]:
        picture = Image.open(io.BytesIO(base64.b64decode(row["png_base64"])))
        assert (picture.size, picture.mode) == ((3 * 32, 32), "L")


def test_the_benchmark_end_to_end(config, tmp_path, monkeypatch):
    result = run_benchmark(config)
    assert len(result["rows"]) == 2 * (3 + 3 * 2)
    assert {row["kind"] for row in result["rows"]} == set(config.kinds)
    assert result["not_measured"] == []
    assert all(not row["fallbacks"] for row in result["rows"])
    assert result["settings"]["seeds"] == [0, 10]
    assert [entry["merged"] for entry in result["speed_ratios"]] == [True, False]
    # A Dot that starts at zero is reuse, so Morse and its control agree here.
    rows = {(row["kind"], row["solver"], row["budget"]): row for row in result["rows"]}
    morse, reuse = rows["morse", "ddim", 3], rows["reuse", "ddim", 3]
    assert morse["psnr"] == pytest.approx(reuse["psnr"], abs=1e-3)
    assert morse["plan"] == reuse["plan"] and morse["num_dot"] > 0
    check_grid(result)

    text = (config.output_dir / "benchmark.md").read_text()
    for wanted in ("Fréchet distance (Fashion-MNIST classifier features)", "Reuse-DDIM r1.5", "±"):
        assert wanted in text
    assert "FID" not in text

    # Resuming measures nothing again; redrawing needs the JSON only.
    monkeypatch.setattr("morse.evaluation.bench.sample_images", None)
    resumed = run_benchmark(dataclasses.replace(config, resume=True))
    assert resumed["rows"] == result["rows"]
    run_benchmark(
        BenchmarkConfig(from_json=config.output_dir / "benchmark.json", output_dir=tmp_path)
    )
    assert (tmp_path / "benchmark.md").read_text().count("|") == text.count("|")
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    with pytest.raises(FileExistsError):
        run_benchmark(config)


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


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="solver 'euler' is unknown"):
        BenchmarkConfig(solvers=("euler",))
    with pytest.raises(ValueError, match="share images"):
        BenchmarkConfig(seeds=(0, 100), num_images=500)
    with pytest.raises(ValueError, match="ddim_ratios"):
        BenchmarkConfig(ddim_ratios=(0.5,))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version 99"):
        run_benchmark(BenchmarkConfig(from_json=other, output_dir=tmp_path))


def test_the_reference_is_no_point_of_its_own_fidelity_curve():
    solver = Method("dpmsolver++")
    cells = list(quality_cells(lambda m, n: 1 / n, [solver], {"baseline": (50, 100)}))
    rows = {row["budget"]: row for row in summarize(cells)["rows"]}
    assert rows[100]["psnr"] is None and rows[100]["frechet_to_reference"] is None
    assert rows[100]["frechet"] == 0.01 and rows[50]["psnr"] == -0.02
