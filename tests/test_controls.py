import pytest
import torch
from diffusers import DDIMScheduler
from evaluation_fixtures import tiny_folder  # noqa: F401

from morse.attach import enable_morse
from morse.evaluation.bench.controls import ExtrapolationDot, ShrunkDash, reuse_dot
from morse.evaluation.bench.loading import make_pipeline
from morse.evaluation.bench.runs import sample_images
from morse.evaluation.bench.solver_pipeline import SolverPipeline
from morse.plan import MorsePlan
from morse.sampling import JumpPoint

CONFIG = DDIMScheduler(clip_sample=False, timestep_spacing="trailing").config


class LinearInTime(torch.nn.Module):
    """An estimate that changes linearly with the timestep; counts its calls."""

    def __init__(self, dash):
        super().__init__()
        self.config, self.dtype, self.device = dash.config, dash.dtype, dash.device
        self.timesteps = []

    def forward(self, sample, timestep, return_dict=True):
        from diffusers.models.unets.unet_2d import UNet2DOutput

        self.timesteps.append(int(timestep))
        return UNet2DOutput(sample=torch.ones_like(sample) * (timestep / 1000 - 0.3))


@pytest.fixture
def linear(dash):
    return LinearInTime(dash)


def sample(unet, dot, plan, seeds=range(2), batch_size=2, solver="dpmsolver++1"):
    pipe = enable_morse(make_pipeline(unet, solver, CONFIG), dot)
    if not isinstance(dot, ExtrapolationDot):
        return sample_images(pipe, MorsePlan.from_string(plan), seeds, batch_size).images
    with dot.watching(pipe):
        return sample_images(pipe, MorsePlan.from_string(plan), seeds, batch_size).images


@pytest.mark.parametrize("plan", ["DDoDo", "DDDoo", "DDooo"])
def test_extrapolation_is_exact_where_the_estimate_is_a_line(linear, plan):
    exact = sample(linear, None, "DDDDD")
    torch.testing.assert_close(sample(linear, ExtrapolationDot(), plan), exact)
    assert (sample(linear, reuse_dot, plan) - exact).abs().max() > 1e-3


def test_extrapolation_is_twice_the_latest_less_the_one_before_on_even_gaps(dash):
    outputs, zeros = torch.randn(2, 1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    dot = ExtrapolationDot()
    with dot.watching(SolverPipeline(dash, DDIMScheduler())):
        for timestep, output in zip((900, 600), outputs, strict=True):
            dot._observe(torch.tensor(timestep), output)
        residual = dot(zeros, torch.tensor(300), None)
    torch.testing.assert_close(outputs[1] + residual, 2 * outputs[1] - outputs[0])


def test_extrapolation_is_reuse_before_there_are_two(dash):
    extrapolated = sample(dash, ExtrapolationDot(), "Dooo")
    assert torch.equal(extrapolated, sample(dash, reuse_dot, "Dooo"))


def test_reuse_keeps_the_channels_of_a_learned_variance():
    noisy, output = torch.zeros(2, 4, 8, 8), torch.ones(2, 8, 8, 8)
    jump = JumpPoint(noisy, torch.tensor(900), output)
    for dot in (reuse_dot, ExtrapolationDot()):
        residual = dot(noisy, torch.tensor(800), jump)
        assert torch.equal(output + residual, output)


@pytest.mark.parametrize("solver", ["dpmsolver++", "heun"])
def test_extrapolation_forgets_between_batches_and_runs(dash, solver):
    dot, plan = ExtrapolationDot(), "DoDDo"
    first = sample(dash, dot, plan, range(3, 4), 1, solver)
    both = sample(dash, dot, plan, range(2, 4), 1, solver)
    assert torch.equal(both[1:], first)
    assert dot._evaluations == []


def test_a_shrunk_dash_is_the_independent_dot_at_every_step(dash, make_dot):
    dot = make_dot(dash, independent=True)
    noise, timestep = torch.randn(2, 1, 16, 16), torch.tensor(400)
    with torch.no_grad():
        shrunk = ShrunkDash(dot, dash)(noise, timestep).sample
        assert torch.equal(shrunk, dot(noise, timestep, None))
    images = sample_images(make_pipeline(ShrunkDash(dot, dash), "heun", CONFIG), 5, range(2), 2)
    assert images.num_dash == 5 and images.images.isfinite().all()
    with pytest.raises(ValueError, match="--independent"):
        ShrunkDash(make_dot(dash), dash)
