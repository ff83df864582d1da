import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from evaluation_fixtures import tiny_folder  # noqa: F401

from morse.evaluation.bench.loading import load_pipelines, make_pipeline
from morse.evaluation.bench.methods import AS_PLANNED, Method
from morse.evaluation.bench.runs import Samples, sample_images
from morse.evaluation.bench.solvers import SOLVERS, make_solver
from morse.evaluation.metrics import psnr
from morse.plan import MorsePlan
from morse.saved_plans import SavedPlan, scheduler_options
from morse.steps import find_steps
from morse.summary import MorseRun

CONFIG = DDPMScheduler(clip_sample=False, timestep_spacing="trailing").config
EVERY = tuple(SOLVERS)


@pytest.fixture(scope="module")
def pipelines(tiny_folder):  # noqa: F811
    return load_pipelines(str(tiny_folder), None, EVERY, "cpu")


@pytest.fixture
def calls(pipelines):
    """The timesteps at which Dash is evaluated."""
    seen = []
    unet = pipelines["ddim"].unet
    handle = unet.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    yield seen
    handle.remove()


def test_the_pipelines_share_one_dash_and_one_dot(pipelines):
    assert len({id(pipe.unet) for pipe in pipelines.values()}) == 1
    assert len({id(pipe.dot) for pipe in pipelines.values()}) == 1
    # Two names are another setting of a class that has one already.
    assert len({type(pipe.scheduler) for pipe in pipelines.values()}) == len(SOLVERS) - 2


@pytest.mark.parametrize("solver", EVERY)
@pytest.mark.parametrize("budget", [1, 2, 3, 8, 14])
def test_a_budget_counts_evaluations_of_the_denoiser(pipelines, calls, solver, budget):
    pipe = pipelines[solver]
    _, made = find_steps(pipe, {}, budget)
    samples = sample_images(pipe, made, range(1), 1)
    assert len(calls) == made == samples.num_dash <= budget
    expected = {"heun": budget - (budget % 2 == 0), "pndm": 1 if budget == 2 else budget}
    assert made == expected.get(solver, budget)
    assert samples.images.isfinite().all() and samples.note == ""


@pytest.mark.parametrize("solver", EVERY)
def test_morse_fits_every_solver(pipelines, calls, solver):
    pipe = pipelines[solver]
    for letters in ("DoDoD", "DooDoo", "Do", "DDDD", "D"):
        calls.clear()
        plan = MorsePlan.from_string(letters)
        plan = plan.shortened(find_steps(pipe, {}, len(plan))[1])
        samples = sample_images(pipe, plan, range(1), 1)
        assert (samples.num_dash, samples.num_dot) == (plan.num_dash, plan.num_dot)
        assert len(calls) == plan.num_dash and samples.fallbacks == {}
        assert len(letters) - 1 <= len(plan) <= len(letters)
        assert plan.num_dash == min(letters.count("D"), len(plan))


def test_a_saved_plan_brings_its_grid(pipelines, calls):
    pipe = pipelines["leapfrog"]
    saved = SavedPlan(3, "DDo", {"timestep_power": 2.0})
    samples = sample_images(pipe, saved, range(1), 1)
    assert (samples.plan, samples.note) == ("DDo", "timestep_power 2.0")
    with scheduler_options(pipe, {"timestep_power": 2.0}):
        pipe.scheduler.set_timesteps(3)
        expected = pipe.scheduler.timesteps
    assert [int(timestep) for timestep in calls] == expected[:2].tolist()
    assert pipe.scheduler.config.timestep_power == 1


def test_an_uneven_number_is_refused_by_name(pipelines):
    with pytest.raises(ValueError, match=r"8 evaluations, which HeunDiscreteScheduler .* 7 or 9"):
        sample_images(pipelines["heun"], 8, range(1), 1)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_the_loop_gives_the_bits_of_diffusers_own(make_pipe, dash, solver):
    theirs = make_pipe(solver, dash)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    expected = theirs(2, generators, num_inference_steps=4, output_type="np").images
    ours = sample_images(make_pipeline(dash, solver, theirs.scheduler.config), 4, range(2), 2)
    assert torch.equal(ours.images, torch.from_numpy(expected).permute(0, 3, 1, 2))


def test_a_pipeline_that_starts_from_a_picture_is_refused(tiny_folder, monkeypatch):  # noqa: F811
    components = property(lambda pipe: {"unet": pipe.unet, "scheduler": pipe.scheduler, "vae": 3})
    monkeypatch.setattr("diffusers.DDPMPipeline.components", components)
    monkeypatch.setattr("diffusers.DDPMPipeline.__call__", lambda self, image, batch_size: None)
    with pytest.raises(ValueError, match=r"DDPMPipeline, which takes \['image', 'batch_size'\]"):
        load_pipelines(str(tiny_folder), None, ("ddim",), "cpu")


def test_images_that_are_not_finite_are_told(pipelines, monkeypatch):
    broken = torch.zeros(3, 8, 8, 1)
    broken[1, 0, 0] = float("nan")
    result = type("Output", (), {"images": broken.numpy()})()
    monkeypatch.setattr(type(pipelines["ddim"]), "__call__", lambda self, **kwargs: result)
    samples = sample_images(pipelines["ddim"], 2, range(3), 3)
    assert samples.note.startswith("1 images are not finite")
    assert samples.images.isfinite().all()


def test_every_batch_counts_for_costs_and_fallbacks(pipelines, monkeypatch):
    """The last batch, of one image, falls back where the first, of two, does not."""
    runs = [MorseRun(MorsePlan.from_string("Doo"), 2.0, num_dash=1, num_dot=2) for _ in range(2)]
    runs[1].num_dash, runs[1].num_dot, runs[1].fallbacks["odd batch"] = 3, 0, 2
    ahead = iter(runs)

    def call(self, generator, **_):
        self.last_run = next(ahead)
        return type("Output", (), {"images": np.zeros((len(generator), 8, 8, 1))})()

    monkeypatch.setattr(type(pipelines["ddim"]), "__call__", call)
    samples = sample_images(pipelines["ddim"], runs[0].plan, range(3), 2)
    assert (samples.num_dash, samples.num_dot) == (5 / 3, 4 / 3)
    assert samples.fallbacks == {"odd batch": 2} and len(samples.images) == 3


def test_batch_times_come_from_full_batches():
    samples = Samples(torch.zeros(7, 1, 2, 2), 5, 10, 9.0, "", {}, (2.0, 4.0, 3.0, 0.1), 2)
    assert samples.quartiles == (2.5, 3.0, 3.5)
    assert samples.spent(5.0) == 7.0
    assert dataclasses.replace(samples, lsd=6.5).spent(5.0) == 6.5
    single = Samples(torch.zeros(3, 1, 2, 2), 5, 0, 2.0, "", {}, (2.0,), 8)
    assert single.quartiles is None


def test_labels():
    assert Method("ddim").label == "DDIM"
    assert Method("dpmsolver++", "morse", 1.5).label == "Morse-DPM++ 2M r1.5"
    assert Method("ddim", "pfdiff").label == "PFDiff-DDIM"
    peer = Method("unipc", "deepcache", setting="interval 3")
    assert peer.label == "DeepCache-UniPC interval 3"
    planned = Method("leapfrog", "morse", setting=AS_PLANNED)
    assert planned.label == "Morse-Leapfrog as planned"
    assert Method("leapfrog-dense").label == "Leapfrog, power 1.5"


class ExactNoise(torch.nn.Module):
    """The exact estimate of epsilon for data of N(0, 1/4)."""

    config = SimpleNamespace(sample_size=8, in_channels=1)
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, alphas_cumprod):
        super().__init__()
        self.alphas_cumprod = alphas_cumprod.double().numpy()

    def forward(self, sample, timestep):
        alpha = np.interp(float(timestep), np.arange(1000), self.alphas_cumprod)
        noise = sample * float((1 - alpha) ** 0.5 / (alpha / 4 + 1 - alpha))
        return SimpleNamespace(sample=noise)


def test_every_solver_converges_to_the_reference():
    """With an exact model: more evaluations always bring its images nearer."""
    dash = ExactNoise(DDPMScheduler.from_config(CONFIG).alphas_cumprod)
    solvers = [solver for solver in EVERY if solver != "leapfrog-dense"]
    pipelines = {solver: make_pipeline(dash, solver, CONFIG) for solver in solvers}
    reference = sample_images(pipelines["dpmsolver++"], 40, range(1), 1).images
    for solver, pipe in pipelines.items():
        ratios = []
        # 20 and PNDM's 21: steps of DDIM and PNDM land as meant where they divide 1000.
        for budget in (6, 21 if solver == "pndm" else 20):
            made = find_steps(pipe, {}, budget)[1]
            images = sample_images(pipe, made, range(1), 1).images
            ratios.append(float(psnr(images, reference).mean()))
        assert ratios == sorted(ratios) and ratios[-1] > 25, (solver, ratios)


@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
def test_all_solvers_start_from_the_references_noise(spacing):
    chosen = {} if spacing is None else {"timestep_spacing": spacing}
    config = DDPMScheduler(clip_sample=False, **chosen).config
    for solver in SOLVERS:
        scheduler = make_solver(solver, config)
        scheduler.set_timesteps(8)
        assert solver == "pndm" or round(float(scheduler.timesteps[0])) == 999, solver


def test_make_solver_keeps_the_pipelines_own_config():
    for solver in SOLVERS:
        scheduler = make_solver(solver, CONFIG)
        assert scheduler.config.beta_end == CONFIG.beta_end
        assert not scheduler.config.get("clip_sample", False)
        spacing = "leading" if solver == "pndm" else "trailing"
        assert scheduler.config.timestep_spacing == spacing
