"""What the benchmark measures, and how it spends each method's budget."""

import dataclasses
import functools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.utils import logging
from evaluation_fixtures import independent_folder, short_reference, tiny_folder  # noqa: F401
from safetensors.torch import load_file

from morse.cli import parse_config
from morse.dot.mixture import GaussianMixture
from morse.evaluation.bench import sampler
from morse.evaluation.bench.benchmark import BenchmarkConfig, measure_benchmark
from morse.evaluation.bench.grid import image_grid
from morse.evaluation.bench.loading import _quiet_loading
from morse.evaluation.bench.methods import AS_PLANNED, KINDS, Method
from morse.evaluation.bench.peers import PEERS, Peer
from morse.evaluation.bench.sampler import Bench
from morse.evaluation.bench.tasks import CHOOSABLE
from morse.evaluation.conditions import UNCONDITIONAL
from morse.graphs import graphed_call
from morse.plan import MorsePlan


@pytest.fixture(scope="module")
def config(tiny_folder, independent_folder):  # noqa: F811
    return BenchmarkConfig(
        pipeline=str(tiny_folder),
        independent_dot=str(independent_folder),
        num_images=3,
        batch_size=2,
        lsd=(2, 3),
        baseline_lsd=(4,),
        solvers=("ddim", "dpmsolver++"),
        planned_solvers=(),
        peers=("none",),
        ddim_ratios=(1.5,),
        dpm_ratios=(2.0,),
        speed_ratio=4.0,
        latency_batch_sizes=(1,),
        num_replicates=0,
        device="cpu",
    )


def test_loading_leaves_bars_as_they_were():
    for switch in (logging.disable_progress_bar, logging.enable_progress_bar):
        switch()
        before = logging.is_progress_bar_enabled()
        with _quiet_loading():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() is before


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="kinds has"):
        BenchmarkConfig(kinds=("deepcache",))
    with pytest.raises(ValueError, match="peers has"):
        BenchmarkConfig(peers=("toaster",))
    with pytest.raises(ValueError, match="share images"):
        BenchmarkConfig(seeds=(0, 30), device="cpu").resolved()
    with pytest.raises(ValueError, match="max_seconds is 0; it must be more than 0"):
        BenchmarkConfig(max_seconds=0)
    with pytest.raises(ValueError, match="speed_ratio is -1; it must be more than 0"):
        BenchmarkConfig(speed_ratio=-1)
    with pytest.raises(ValueError, match="lossless_delta has 'fid=1'"):
        BenchmarkConfig(lossless_delta=("fid=1",))
    with pytest.raises(ValueError, match="lossless_delta is chosen before a result is measured"):
        BenchmarkConfig(lossless_delta=("psnr=1",), from_json=Path("benchmark.json"))
    with pytest.raises(ValueError, match=r"has \['kernel'\], but with extractor none and"):
        BenchmarkConfig(lossless_delta=("psnr=1", "kernel=1"), extractor="none")
    with pytest.raises(ValueError, match=r"has \['frechet'\], but with extractor clip"):
        BenchmarkConfig(lossless_delta=("frechet=1",), extractor="clip")
    with pytest.raises(ValueError, match="with arch everything is timed anew: leave it out"):
        BenchmarkConfig(arch=("sd15",), resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--quick --planned_solvers leapfrog", r"planned_solvers has \['leapfrog'\], but solvers"),
        (
            "--kinds reuse --solvers leapfrog --control_solvers unipc",
            r"control_solvers has \['unipc'\], but solvers is \('leapfrog',\): name them there",
        ),
        (
            "--kinds reuse --solvers leapfrog",
            r"kinds is \('reuse',\) .* among control_solvers \('ddim', 'dpmsolver\+\+'\)",
        ),
    ],
)
def test_solvers_that_nothing_runs_with_are_refused(options, message):
    config = parse_config(BenchmarkConfig, ["--device", "cpu", *options.split()])
    with pytest.raises(ValueError, match=message):
        config.resolved()


def test_pfdiff_brings_its_own_solver():
    options = {"kinds": ("pfdiff",), "solvers": ("leapfrog",), "control_solvers": ("ddim",)}
    tasks = BenchmarkConfig(**options, peers=("none",), device="cpu").resolved().tasks()
    assert {method.label for method, _ in tasks} == {"PFDiff-DDIM"}


def test_what_is_left_out_depends_on_the_device_and_on_quick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    slow = BenchmarkConfig(device="cpu").resolved()
    assert slow.num_images == 32 and max(slow.lsd) == 30 and max(slow.baseline_lsd) == 40
    assert BenchmarkConfig(lsd=(50,), device="cpu").resolved().lsd == (50,)
    guided = BenchmarkConfig(guidance_scale=(3.0,), device="cpu").resolved()
    assert guided.latency_batch_sizes == (0,) and slow.latency_batch_sizes == (1, 16, 64)
    assert BenchmarkConfig(device="cuda").resolved().num_images == 5000
    assert BenchmarkConfig(num_images=7, device="cuda").resolved().num_images == 7
    quick = BenchmarkConfig(quick=True, lsd=(5,), device="cpu").resolved()
    assert (quick.num_images, quick.lsd) == (12, (5,))
    assert {method.kind for method, _ in quick.tasks()} == {"baseline", "morse", "reuse"}
    # What is written out stays, be it what there would be with a GPU.
    argv = ["--device", "cpu", "--lsd", *map(str, BenchmarkConfig.lsd)]
    assert parse_config(BenchmarkConfig, argv).resolved().lsd[-1] == 50


def test_a_run_without_a_gpu_fits_into_an_hour():
    """18.7 ms an image and evaluation of the embedded Dash, on two cores of an EPYC."""
    for quick, most in ((True, 120), (False, 3600)):
        config = BenchmarkConfig(quick=quick, device="cpu").resolved()
        # What the embedded pipeline can't run is left out: its peers but DeepCache, and so on.
        kinds = {"baseline", "morse", "reuse", "extrapolation", "pfdiff", "mixture", "deepcache"}
        lsd = sum(budget for method, budget in config.tasks() if method.kind in kinds)
        seconds = (lsd + 100) * config.num_images * 0.0187
        assert seconds < 0.85 * most  # leaves time for loading, warm-ups and N


def test_baselines_and_morse_are_measured_first():
    tasks = BenchmarkConfig().tasks()
    kinds = [method.kind for method, _ in tasks]
    assert len(set(tasks)) == len(tasks)
    assert set(kinds) == set(KINDS)
    asked = sum(kind == "baseline" for kind in kinds[: kinds.index("morse")])
    assert asked == 8 * 7
    assert kinds.index("reuse") > max(i for i, kind in enumerate(kinds) if kind == "baseline")
    planned = {method.solver for method, _ in tasks if method.setting == AS_PLANNED}
    assert planned == {"leapfrog", "ddim", "dpmsolver++"}
    solvers = {method.solver for method, _ in tasks if method.kind == "morse"}
    assert solvers == set(BenchmarkConfig().solvers)
    assert {method.solver for method, _ in tasks if method.kind == "pfdiff"} == {"ddim"}
    assert {m.label for m, _ in tasks if m.kind == "ays"} == {"AYS-DPM++ 2M 11 levels"}
    alone = BenchmarkConfig(solvers=("leapfrog",), kinds=("baseline", "pfdiff"), peers=("none",))
    assert {method.label for method, _ in alone.tasks()} == {"Leapfrog", "PFDiff-DDIM"}
    # What Morse is compared with has the solvers of its strongest rows, and no holes.
    assert {method.solver for method, _ in tasks if method.kind == "mixture"} == planned
    for kind in ("baseline", "pfdiff", "mixture"):
        assert {lsd for method, lsd in tasks if method.kind == kind} >= {3, 5, 10, 15, 25, 40}


def test_every_control_is_measured(config, tmp_path):
    few = {"output_dir": tmp_path, "num_reference_images": 2}
    result = measure_benchmark(dataclasses.replace(config, **few))
    for file in (tmp_path / "cells").glob("*.safetensors"):
        assert {name: len(value) for name, value in load_file(file).items()} == {
            "features": 3, "psnr": 2, "ssim": 2}  # fmt: skip
    # Three budgets of each bare solver and of PFDiff with DDIM, two of the five other kinds that
    # this pipeline can run.
    assert len(result["rows"]) == 2 * (3 + 5 * 2) + 3
    rows = {(row["kind"], row["solver"], row["budget"]): row for row in result["rows"]}
    assert {kind for kind, _, _ in rows} == set(CHOOSABLE) - {"ays", "mixture"}
    shrunk, pfdiff = rows["shrunk", "ddim", 3], rows["pfdiff", "ddim", 3]
    assert (shrunk["num_dash"], shrunk["num_dot"], shrunk["lsd"]) == (0, 12, 3.0)
    assert (pfdiff["num_dash"], pfdiff["num_dot"], pfdiff["lsd"]) == (3, 0, 3.0)
    assert rows["extrapolation", "ddim", 3]["plan"] == rows["morse", "ddim", 3]["plan"]


def test_a_mixture_begins_a_bare_solver(config):
    bench = Bench(config)
    begun = Method("ddim", "mixture")
    assert "no Gaussian mixture" in bench.obstacle(begun)
    dot = bench.pipelines.by_solver["ddim"].dot
    dot.set_mixture(GaussianMixture.fit(torch.randn(8, 1, 32, 32), num_components=2, rank=1))
    assert bench.obstacle(begun) is None
    samples = bench.sample(begun, 3, range(2), 4.0, UNCONDITIONAL)
    assert (samples.plan, samples.num_dash, samples.spent(4.0)) == ("gggDDD", 3, 3.0)
    assert samples.fallbacks == {}
    bare = bench.sample(Method("ddim"), 3, range(2), 4.0, UNCONDITIONAL)
    assert not torch.equal(samples.images, bare.images)


def test_methods_that_cannot_run_are_listed_with_the_reason(config, tmp_path, monkeypatch):
    monkeypatch.setattr("morse.evaluation.bench.deepcache.find_spec", lambda name: None)
    chosen = {"kinds": ("baseline", "shrunk"), "peers": ("deepcache", "tomesd")}
    few = {"independent_dot": None, "solvers": ("ddim",), "output_dir": tmp_path}
    result = measure_benchmark(dataclasses.replace(config, **few, **chosen))
    assert {row["kind"] for row in result["rows"]} == {"baseline"}
    reasons = "\n".join(result["not_measured"])
    assert "tomesd: not applicable" in reasons
    assert "Shrunk-DDIM: no --independent_dot was given" in reasons
    assert "DeepCache-DDIM interval 5: the package DeepCache is not installed" in reasons


def test_deepcache_is_sampled_within_its_budget(config):
    pytest.importorskip("DeepCache")
    bench = Bench(dataclasses.replace(config, peers=("deepcache",)))
    peer = {"cached_lsd": 0.25, "engaged": False, "note": "not engaged: because"}
    method = Method("ddim", "deepcache", setting="interval 3")
    samples = bench.sample(method, 3, range(2), 4.0, UNCONDITIONAL, peer)
    assert (samples.num_dash, samples.lsd, samples.engaged) == (2, 3.0, False)
    assert samples.note == (
        "6 steps, 2 of them full; a cached one costs 0.25 LSD; not engaged: because"
    )
    assert bench.measure_peer(method, UNCONDITIONAL)["cached_lsd"] > 0


def test_a_peers_images_alone_are_timed_in_the_precision_asked_for(config, monkeypatch):
    found = set()
    monkeypatch.setitem(PEERS, "pab", Peer(lambda *_: nullcontext(), lambda pipe: None))
    monkeypatch.setattr(sampler, "peer_facts", lambda *given: ({}, f"{len(given[3])} calls"))
    bench = Bench(dataclasses.replace(config, mixed_precision="bf16", merge_lora=False))
    bench.pipelines.bare.unet.register_forward_hook(
        lambda unet, given, output: found.add(output.sample.dtype)
    )
    method = Method("ddim", "pab", setting="every 2")
    samples = bench.sample(method, 3, range(3), 4.0, UNCONDITIONAL, {"step_lsd": 0.5})
    assert samples.note == "12 calls"  # six steps of two batches, without the warm-up's
    assert found == {torch.bfloat16} and not bench.pipelines.main.dot.is_merged


def test_the_grid_shows_what_engaged(config):
    peers = dataclasses.replace(config, kinds=("baseline",), peers=("deepcache",))
    store = SimpleNamespace(
        has=lambda method, budget, seed: True,
        is_engaged=lambda method, budget, seed: method.setting != "interval 2",
        images=lambda name, make: torch.zeros(2, 1, 4, 4),
        once=lambda name, make: "",
    )
    labels = [row["label"] for row in image_grid(peers, store)["rows"]]
    assert "DeepCache-DDIM interval 3, 2 LSD" in labels
    assert not any("interval 2" in label for label in labels)


def test_a_solver_that_cannot_use_the_whole_budget_says_so(config):
    bench = Bench(dataclasses.replace(config, solvers=("heun",)))
    samples = bench.sample(Method("heun"), 4, range(2), 4.0, UNCONDITIONAL)
    note = "3 evaluations, which Heun can make well, instead of 4"
    assert samples.num_dash == 3 and samples.note == note
    morse = bench.sample(Method("heun", "morse", 2.0), 4, range(2), 4.0, UNCONDITIONAL)
    assert morse.spent(4.0) <= 4 and len(morse.plan) % 2 == 1


def test_morse_as_planned_is_what_a_call_does(config):
    bench = Bench(dataclasses.replace(config, solvers=("leapfrog",)))
    pipe = bench.pipelines.by_solver["leapfrog"]
    entry = {"lsd": 3, "plan": "DooD", "scheduler": {"timestep_power": 2.0}}
    pipe.dot.register_to_config(plans={"LeapfrogScheduler": [entry]})
    method = Method("leapfrog", "morse", setting=AS_PLANNED)
    samples = bench.sample(method, 3, range(2), 4.0, UNCONDITIONAL)
    assert (samples.plan, samples.note) == ("DooD", "timestep_power 2.0")
    assert samples.scheduler_options == {"timestep_power": 2.0}
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    images = pipe(batch_size=2, lsd=3, generator=generators, output_type="np").images
    assert torch.equal(samples.images, torch.from_numpy(images).permute(0, 3, 1, 2).float())
    slow = bench.sample(method, 3, range(2), 1.5, UNCONDITIONAL)  # it would cost 3.3
    assert slow.plan == str(MorsePlan.from_budget(3, 1.5, pipe.plan_ratio(3)))


def test_graphs_are_made_of_dash_and_dot_and_not_of_peers(config):
    bench = Bench(dataclasses.replace(config, cuda_graphs=True))
    bench.hasten()
    pipe = bench.pipelines.by_solver["ddim"]
    assert bench.mode == "cuda_graph" and graphed_call(pipe.unet) and graphed_call(pipe.dot)
    assert "have recorded" in bench.obstacle(Method("ddim", "deepcache", setting="interval 2"))
    with pytest.raises(ValueError, match="cuda_graphs needs a CUDA device, and device is cpu"):
        measure_benchmark(dataclasses.replace(config, cuda_graphs=True))
    with pytest.raises(ValueError, match="choose one"):
        dataclasses.replace(config, cuda_graphs=True, compile=True)


@pytest.mark.slow
def test_compiled_models_sample_the_same(config, tmp_path, monkeypatch):
    """Traced, but without the minutes that generating code takes."""
    compile_model = torch.nn.Module.compile
    traced = functools.partialmethod(compile_model, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    settings = {"compile": True, "kinds": ("baseline", "morse")}
    settings |= {"solvers": ("ddim",), "lsd": (4,), "baseline_lsd": (), "num_images": 2}
    settings |= {"latency_batch_sizes": (2,)}  # each shape is traced once
    compiled = measure_benchmark(
        dataclasses.replace(config, **settings, output_dir=tmp_path / "compiled")
    )
    modes = [(entry["mode"], entry["merged"]) for entry in compiled["speed_ratios"]]
    assert modes == [("eager", True), ("eager", False), ("compiled", True)]
    eager = measure_benchmark(
        dataclasses.replace(config, **{**settings, "compile": False}, output_dir=tmp_path / "eager")
    )
    for one, other in zip(compiled["rows"], eager["rows"], strict=True):
        one, other = (row["scores"]["psnr"]["value"] for row in (one, other))
        assert one == pytest.approx(other, abs=0.05)
