"""`morse plan`, `bench` and `tune-dot` on models trained by flow matching."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from evaluation_fixtures import QUICK_PLAN, short_reference  # noqa: F401
from tiny_pipelines import text_inputs, tiny_vae
from tiny_text import sd3_pipeline
from tiny_transformers import tiny_flux

from eval.flow_solvers import FlowDash
from morse import FlowMatchLeapfrogScheduler, MorseDot, MorsePipeline
from morse.evaluation.bench.benchmark import BenchmarkConfig, run_benchmark
from morse.evaluation.bench.loading import load_bare, with_solver
from morse.evaluation.bench.methods import REFERENCE_SOLVER
from morse.evaluation.planning import best_fit
from morse.evaluation.planning.command import PlanConfig, run_plan
from morse.saved_plans import SavedPlan
from morse.tuning.command import TuneDotConfig, tune_dot

PLAN = {**QUICK_PLAN, "speed_ratio": 4.0, "fit_margin": 99.0, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(build_unet, tmp_path_factory):
    """An unconditional pipeline of pixels with a Dot."""
    unet = build_unet(channels=(8, 8), sample_size=8)
    pipe = DDPMPipeline(unet, FlowMatchEulerDiscreteScheduler(shift=2.0))
    torch.manual_seed(1)
    dot = MorseDot.from_dash(unet, num_down_blocks=1, block_out_channels=(8,), lora_rank=2)
    torch.nn.init.normal_(dot.conv_out.weight, std=0.05)
    path = tmp_path_factory.mktemp("flow") / "pipeline"
    MorsePipeline.from_pipe(pipe, dot).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def planned(folder, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(best_fit, "REFERENCE_STEPS", 10)
        run_plan(PlanConfig(pipeline=str(folder), output_dir=output_dir, **PLAN))
    return output_dir


@pytest.mark.parametrize("scheduler", ["leapfrog", "ddim", "heun"])
def test_diffusers_own_pipeline_runs_flows(folder, scheduler):
    pipe = MorsePipeline.from_pretrained(folder, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe(plan="DoDoo", generator=torch.Generator().manual_seed(0))
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (2, 3)
    assert pipe.last_run.fallbacks == {}


@pytest.mark.slow
def test_plans_are_saved_for_the_flow_s_scheduler(folder, planned):
    report = json.loads((planned / "plan_search.json").read_text())
    (search,) = report["searches"]
    assert (
        report["reference"] == "dpmsolver++, 100 steps" and search["psnr"] >= search["uniform_psnr"]
    )
    assert any("fitted_steps" in fit["scheduler"] for fit in search["fits"])
    pipe = MorsePipeline.from_pretrained(folder, dot=planned, scheduler="leapfrog")
    assert list(pipe.dot.config.plans) == ["FlowMatchLeapfrogScheduler"]
    pipe.speed_ratio = 4.0
    assert pipe.plan_for(3).plan == search["plan"]
    scheduler = FlowMatchLeapfrogScheduler.from_pretrained(planned / "leapfrog-3")
    best = next(fit["scheduler"] for fit in search["fits"] if fit["plan"] == "DDD")
    assert scheduler.config.shift == 2.0
    assert {name: scheduler.config[name] for name in best} == best


@pytest.mark.slow
def test_the_benchmark_measures_what_there_is_for_flows(folder, planned, tmp_path):
    solvers = ("ddim", "dpmsolver++", "unipc", "deis", "pndm", "heun", "leapfrog")
    config = BenchmarkConfig(
        output_dir=tmp_path,
        pipeline=str(folder),
        dot=str(planned),
        num_images=2,
        batch_size=2,
        lsd=(3,),
        baseline_lsd=(5,),
        solvers=solvers,
        planned_solvers=("leapfrog",),
        kinds=("baseline", "morse", "extrapolation", "pfdiff"),
        control_solvers=("ddim",),
        peers=("none",),
        dpm_ratios=(1.5,),
        speed_ratio=4.0,
        latency_batch_sizes=(0,),
        num_replicates=2,
        device="cpu",
    )
    result = run_benchmark(config)
    measured = {(row["kind"], row["solver"]) for row in result["rows"]}
    bare = {solver for kind, solver in measured if kind == "baseline"}
    assert bare == {*solvers} - {"pndm", "deis"}
    assert {("pfdiff", "ddim"), ("extrapolation", "ddim"), ("morse", "leapfrog")} < measured
    markdown = (tmp_path / "benchmark.md").read_text("utf-8")
    assert "PNDM is not for models trained by flow matching" in markdown
    assert "DEIS stops before a flow's end" in markdown


@pytest.mark.slow
def test_a_dot_is_tuned_on_its_plans(folder, planned, tmp_path):
    dot = MorseDot.from_pretrained(planned)
    rows = [[999.0, 0.4, 0.0, 0.0], [500.5, 0.5, 0.2, 0.3], [90.0, 1.0, 0.0, 0.1]]
    plan = SavedPlan(3, "DoD", {"fitted_steps": rows})
    dot.register_to_config(plans={"FlowMatchLeapfrogScheduler": [plan.to_config()]})
    dot.save_pretrained(tmp_path / "dot")
    settings = {
        "pretrained_model_name_or_path": str(folder),
        "dot": str(tmp_path / "dot"),
        "output_dir": tmp_path / "tuned",
        "solver": ("leapfrog", "dpmsolver++"),
        "lsd": (3,),
        "target_lsd": 5,
        "num_images": 4,
        "validation_images": 2,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "speed_ratio": 4.0,
    }
    found = tune_dot(TuneDotConfig(**settings))
    report = json.loads((found / "tuning.json").read_text())
    before, after = report["decibels_by_step"]["0"], report["decibels_as_saved"]
    assert set(before) == {"leapfrog, 3 LSD", "dpmsolver++, 3 LSD"}
    assert all(before[name] != after[name] for name in before)


def test_text_encoders_that_were_saved_in_half_precision_are_loaded_as_the_rest(tmp_path):
    pipe = sd3_pipeline()
    for each in (pipe.text_encoder, pipe.text_encoder_2):
        each.half()
    pipe.save_pretrained(tmp_path)
    bare, _ = load_bare(str(tmp_path), None, "cpu", needs_dot=False)
    assert bare.text_encoder.dtype == bare.text_encoder_2.dtype == torch.float32


class ExactNoise(torch.nn.Module):
    """The exact estimate of epsilon for data of N(0, 1/4), told a fractional timestep."""

    config = {"sample_size": 4, "in_channels": 1}  # noqa: RUF012
    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, alphas_cumprod):
        super().__init__()
        self.log_ratios = ((1 - alphas_cumprod) / alphas_cumprod).log().double().numpy() / 2

    def forward(self, sample, timestep):
        ratio = np.exp(np.interp(float(timestep), np.arange(1000), self.log_ratios))
        alpha = 1 / np.hypot(1, ratio)
        noise = sample * alpha * ratio / (alpha**2 / 4 + (alpha * ratio) ** 2)
        return SimpleNamespace(sample=noise)


@pytest.mark.parametrize("level", [0.02, 0.3, 0.9, 1.0])
def test_the_embedded_dash_as_a_flow_estimates_the_same(level):
    alphas_cumprod = DDPMScheduler().alphas_cumprod
    dash = FlowDash(ExactNoise(alphas_cumprod), alphas_cumprod)
    sample = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    found = dash(sample, torch.tensor(1000 * level, dtype=torch.float64)).sample
    clean, noise = (1 - level) / 4, level  # times the sample over its variance
    expected = sample * (noise - clean) / ((1 - level) ** 2 / 4 + level**2)
    torch.testing.assert_close(found, expected, rtol=1e-3 if level < 1 else 2e-2, atol=1e-4)


def test_an_image_to_image_run_begins_in_the_middle(tmp_path):
    pipe = sd3_pipeline()
    pipe.scheduler = FlowMatchLeapfrogScheduler(shift=3.0)
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))
    pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(tmp_path, **absent)
    assert type(pipe.scheduler) is FlowMatchLeapfrogScheduler and pipe.scheduler.config.shift == 3
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def latents(scheduler, steps):
        pipe.scheduler = scheduler
        seeded = torch.Generator().manual_seed(0)
        return pipe(
            "cat", image=image, strength=0.5, num_inference_steps=steps, generator=seeded,
            height=8, width=8, output_type="latent",
        ).images  # fmt: skip

    kinds = (FlowMatchLeapfrogScheduler, FlowMatchEulerDiscreteScheduler)
    # Where half of the run begins, both are at the same noise level.
    exact = latents(FlowMatchEulerDiscreteScheduler(), 400)
    leapfrog, euler = (latents(kind(), 20) for kind in kinds)
    assert (leapfrog - exact).abs().mean() < (euler - exact).abs().mean()
    assert torch.equal(latents(pipe.scheduler, 20), euler)


def test_leapfrog_comes_near_to_what_flux_s_plans_are_held_to():
    missing = dict.fromkeys(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(transformer=tiny_flux(), scheduler=scheduler, vae=tiny_vae(), **missing)
    pipe.set_progress_bar_config(disable=True)
    given = text_inputs(pooled=True)
    given = {name: given[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}

    def latents(solver, steps):
        other = with_solver(pipe, solver)
        generator = torch.Generator().manual_seed(0)
        return other(
            **given, height=32, width=32, num_inference_steps=steps, generator=generator,
            output_type="latent",
        ).images  # fmt: skip

    exact = latents(REFERENCE_SOLVER, 60)
    errors = [(latents(solver, 6) - exact).square().mean() for solver in ("leapfrog", "ddim")]
    assert errors[0] < errors[1] / 4
