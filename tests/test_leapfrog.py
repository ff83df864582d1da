"""The leapfrog solver against closed forms, PFDiff's published update and diffusers' DDIM."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler
from tiny_pipelines import loop_pipeline

from morse import FlowMatchLeapfrogScheduler, LeapfrogScheduler, MorsePipeline
from morse.leapfrog_moves import resample_steps
from morse.saved_plans import SavedPlan
from morse.schedulers import make_scheduler

SPREAD = 0.5  # standard deviation of Gaussian data, whose exact denoiser is known


def exact_epsilon(scheduler, sample, timestep):
    """E[epsilon | x_t] for x_0 ~ N(0, SPREAD^2)."""
    squared = scheduler.alphas_cumprod[timestep]
    return sample * (1 - squared).sqrt() / (squared * SPREAD**2 + 1 - squared)


def solve(scheduler, steps, prediction_type="epsilon", dtype=torch.float64, forget=False):
    """Sample from x_T = 1 with the exact denoiser; `forget` where a caller may change it."""
    scheduler.set_timesteps(steps)
    sample = torch.ones(1, 1, 2, 2, dtype=dtype)
    for timestep in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[timestep].sqrt()
        sigma = (1 - alpha**2).sqrt()
        output = epsilon = exact_epsilon(scheduler, sample, timestep)
        clean = (sample - sigma * epsilon) / alpha
        if prediction_type == "v_prediction":
            output = alpha * epsilon - sigma * clean
        elif prediction_type == "sample":
            output = clean
        sample = scheduler.step(output, timestep, sample).prev_sample
        if forget:
            scheduler._handed = None
    assert sample.dtype == dtype
    return float(sample[0, 0, 0, 0])


def exact_end(scheduler):
    """The probability flow of Gaussian data scales with the standard deviation of x_t."""
    squared = scheduler.alphas_cumprod[-1]
    return float(SPREAD / (squared * SPREAD**2 + 1 - squared).sqrt())


@pytest.mark.parametrize("clean_above", [4.0, 1e9])
def test_second_order(clean_above):
    scheduler = LeapfrogScheduler(clean_above=clean_above)
    coarse, fine = (abs(solve(scheduler, n) - exact_end(scheduler)) for n in (10, 20))
    assert 3 < coarse / fine < 6


def test_better_than_extrapolating_from_the_past():
    other = DPMSolverMultistepScheduler(
        beta_schedule="linear", timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler = LeapfrogScheduler()
    errors = [abs(solve(each, 12) - exact_end(scheduler)) for each in (scheduler, other)]
    assert errors[0] < errors[1] / 3


def test_prediction_types_agree():
    ends = [
        solve(LeapfrogScheduler(prediction_type=kind), 9, kind)
        for kind in ("epsilon", "v_prediction", "sample")
    ]
    assert ends == pytest.approx([ends[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("clean_above", [4.0, 1e9])
def test_half_precision_costs_no_more_than_its_own_rounding(clean_above):
    """A sample that no caller has changed moves no anchor."""
    scheduler = LeapfrogScheduler(clean_above=clean_above)
    half, single = (solve(scheduler, 20, dtype=dtype) for dtype in (torch.half, torch.float32))
    assert half == pytest.approx(single, rel=4 * torch.finfo(torch.half).eps)
    assert half == solve(scheduler, 20, dtype=torch.half, forget=True)


@pytest.mark.parametrize("clean_above", [4.0, 1e9])
def test_half_precision_ends_where_float32_does_if_epsilon_stays(clean_above):
    """No exact denoiser that would mend on the way what rounding has done."""

    def end(dtype):
        scheduler = LeapfrogScheduler(clean_above=clean_above)
        scheduler.set_timesteps(20)
        sample = torch.linspace(-2, 2, 16).half().reshape(1, 1, 4, 4).to(dtype)
        noise = sample.flip(3)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(noise, timestep, sample).prev_sample
        return sample.float()

    eps = torch.finfo(torch.half).eps
    torch.testing.assert_close(end(torch.half), end(torch.float32), rtol=eps, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.4]},
    ],
)
def test_noise_schedules_are_those_of_ddim(options):
    expected = DDIMScheduler(**options).alphas_cumprod
    assert torch.equal(LeapfrogScheduler(**options).alphas_cumprod, expected)


def test_the_grid_is_twice_as_fine_and_trailing():
    scheduler, fine = LeapfrogScheduler(), DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    fine.set_timesteps(7)
    assert scheduler.timesteps.tolist() == fine.timesteps[::2].tolist()


def test_a_power_moves_timesteps_to_low_noise_and_keeps_them_distinct():
    even, steep = LeapfrogScheduler(), LeapfrogScheduler(timestep_power=3.0)
    for scheduler in (even, steep):
        scheduler.set_timesteps(400)
    assert (steep.timesteps <= even.timesteps).all() and steep.timesteps[0] == 999
    assert steep._grid == sorted(set(steep._grid), reverse=True)


def test_a_step_waits_for_no_accelerator():
    """On "meta" there are no values to wait for."""
    rows = [[999.0, 0.5, 0.1, 0.1], [300.0, 1.0, 0.0, 0.0]]
    scheduler = LeapfrogScheduler(clean_above=0.5, fitted_steps=rows)
    scheduler.set_timesteps(2)
    sample = torch.empty(1, 1, 2, 2, dtype=torch.float16, device="meta")
    for timestep in scheduler.timesteps:
        sample = scheduler.step(sample, timestep, sample).prev_sample
    assert sample.dtype == torch.float16 and sample.device.type == "meta"


@pytest.mark.parametrize("clean_above", [0.0, 1e9])
def test_what_a_caller_changes_between_steps_stays_changed(clean_above):
    """The same estimates from a start further away; both moves are linear in the sample."""

    def end(shift, copy=False):
        scheduler = LeapfrogScheduler(clean_above=clean_above)
        scheduler.set_timesteps(3)
        sample = torch.ones(1, 1, 2, 2, dtype=torch.float64)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(0.3 * torch.ones_like(sample), timestep, sample).prev_sample
            sample = sample.clone() if copy else sample
            if timestep == scheduler.timesteps[0] and shift:
                sample = sample.add_(shift) if copy else sample + shift
        return sample

    assert torch.equal(end(0), end(0, copy=True))
    assert torch.equal(end(0.1), end(0.1, copy=True))
    one, two = end(0.1) - end(0), end(0.2) - end(0)
    assert (one.abs() > 0.01).all()
    torch.testing.assert_close(2 * one, two)
    if clean_above:  # epsilon is what stays: x_0 takes the change over alpha at the second of three
        alpha = LeapfrogScheduler().alphas_cumprod[599].sqrt()
        torch.testing.assert_close(one, torch.full_like(one, 0.1 / alpha), rtol=1e-5, atol=0)


def test_one_evaluation_is_ddim(build_unet):
    unet, noise = build_unet(channels=(8, 16), sample_size=8), torch.Generator().manual_seed(0)
    images = [
        loop_pipeline(
            unet, make_scheduler(name, {"timestep_spacing": "trailing", "clip_sample": False})
        )(num_inference_steps=1, generator=noise.manual_seed(0)).images
        for name in ("leapfrog", "ddim")
    ]
    torch.testing.assert_close(*images)


def test_pfdiff_follows_its_published_update():
    """A round written out: past estimate to the springboard, future estimate over two steps."""
    scheduler = make_scheduler("pfdiff", {})
    scheduler.set_timesteps(2)
    first, second, third = scheduler._grid[:3]
    alphas = scheduler.alphas_cumprod.double()
    generator, options = torch.Generator().manual_seed(0), {"dtype": torch.float64}
    x0, z0, z1 = torch.randn(3, 1, 1, 4, 4, generator=generator, **options)

    def ddim(x, z, start, end):
        alpha, end_alpha = alphas[start], alphas[end] if end >= 0 else torch.tensor(1.0)
        clean = (x - (1 - alpha).sqrt() * z) / alpha.sqrt()
        return end_alpha.sqrt() * clean + (1 - end_alpha).sqrt() * z

    x1 = ddim(x0, z0, first, second)
    springboard = scheduler.step(z0, first, x0).prev_sample
    torch.testing.assert_close(springboard, ddim(x1, z0, second, third), rtol=1e-5, atol=1e-5)
    clean = scheduler.step(z1, third, springboard).prev_sample
    torch.testing.assert_close(clean, ddim(x1, z1, second, -1), rtol=1e-5, atol=1e-5)


def test_a_run_may_begin_in_the_middle():
    """As image-to-image pipelines do it, by index or by giving the first timestep alone."""
    ends = []
    for told in (True, False):
        scheduler = LeapfrogScheduler()
        scheduler.set_timesteps(6)
        if told:
            scheduler.set_begin_index(2)
        clean, noise = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.3)
        sample = scheduler.add_noise(clean, noise, scheduler.timesteps[2:3])
        for timestep in scheduler.timesteps[2:]:
            sample = scheduler.step(noise, timestep, sample).prev_sample  # an exact estimate
        ends.append(sample)
        scheduler.set_timesteps(6)
        assert scheduler.begin_index is None  # the next run is a whole one
    torch.testing.assert_close(ends[0], clean)
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", [LeapfrogScheduler, FlowMatchLeapfrogScheduler])
def test_a_learned_variance_is_left_aside(kind):
    """Such denoisers give it as further channels."""
    ends = []
    for variance in ([], [torch.full((1, 3, 2, 2), 9.0)]):
        scheduler, sample = kind(), torch.ones(1, 3, 2, 2)
        scheduler.set_timesteps(3)
        for timestep in scheduler.timesteps:
            output = torch.cat([0.3 * sample, *variance], dim=1)
            sample = scheduler.step(output, timestep, sample).prev_sample
        ends.append(sample)
    assert torch.equal(*ends)


def test_outputs_may_come_in_the_same_memory():
    """As from CUDA graphs; fitted steps compare an x_0 with the one before."""
    rows, ends = [[900.0, 0.5, 0.2, 0.3], [600.0, 0.5, 0.2, 0.3], [300.0, 1.0, 0.2, 0.3]], []
    for memory in (None, torch.empty(1, 1, 2, 2)):
        scheduler = LeapfrogScheduler(prediction_type="sample", clean_above=0, fitted_steps=rows)
        scheduler.set_timesteps(3)
        sample = torch.ones(1, 1, 2, 2)
        for timestep in scheduler.timesteps:
            output = sample.tanh() if memory is None else memory.copy_(sample.tanh())
            sample = scheduler.step(output, timestep, sample).prev_sample
        ends.append(sample)
    assert torch.equal(*ends)


def test_zero_terminal_snr_is_kept_from_another_scheduler():
    other = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler = make_scheduler("leapfrog", other.config)
    torch.testing.assert_close(scheduler.alphas_cumprod, other.alphas_cumprod, atol=1e-7, rtol=0)
    assert not torch.equal(scheduler.alphas_cumprod, LeapfrogScheduler().alphas_cumprod)
    end = solve(scheduler, 20, "v_prediction")
    assert end == pytest.approx(exact_end(scheduler), rel=0.02)


OPEN = """
import sys
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "morse.leapfrog" in str(error)
else:
    raise AssertionError("it opened")
from morse import LeapfrogScheduler
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
print(type(pipe).__name__, type(pipe.scheduler).__name__)
"""


def test_saved_with_a_pipeline(make_dot, build_unet, tmp_path):
    """A Dot with plans and N, and the solver: loaded they give the same image for a budget."""
    unet = build_unet(channels=(8, 16), sample_size=8)
    dot = make_dot(unet, num_down_blocks=1)
    plan = SavedPlan(4, "DoDoD", {"timestep_power": 1.2}).to_config()
    dot.register_to_config(plans={"LeapfrogScheduler": [plan]}, speed_ratio=2.0)
    # With little noise, or a random Dash's images are all black and white.
    scheduler = LeapfrogScheduler(beta_end=0.001, timestep_power=1.5)
    pipe = MorsePipeline.from_pipe(DDPMPipeline(unet, scheduler), dot)
    pipe.save_pretrained(tmp_path)
    loaded, plain = MorsePipeline.from_pretrained(tmp_path), DDPMPipeline.from_pretrained(tmp_path)
    images = []
    for each, budget in (
        (pipe, {"lsd": 4}),
        (loaded, {"lsd": 4}),
        (loaded, {"num_inference_steps": 3}),
        (plain, {"num_inference_steps": 3}),
    ):
        each.set_progress_bar_config(disable=True)
        assert type(each.scheduler) is LeapfrogScheduler
        assert each.scheduler.config.timestep_power == 1.5
        noise = torch.Generator().manual_seed(0)
        images.append(torch.from_numpy(each(generator=noise, output_type="np", **budget).images))
        if "lsd" in budget:
            assert (str(each.last_run.plan), each.last_run.lsd) == ("DoDoD", 4.0)
    # Where weights lie in memory may change a rounding.
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(images[2], images[3], rtol=0, atol=1e-4)
    assert not torch.equal(images[1], images[2])
    assert "DPMSolverMultistepScheduler" in {each.__name__ for each in pipe.scheduler.compatibles}


@pytest.mark.slow
def test_plain_diffusers_opens_it_once_the_scheduler_is_imported(build_unet, tmp_path):
    DDPMPipeline(build_unet(channels=(8, 16)), LeapfrogScheduler()).save_pretrained(tmp_path)
    opened = subprocess.run(
        [sys.executable, "-c", OPEN, tmp_path], capture_output=True, text=True, check=True
    )
    assert opened.stdout.split() == ["DDPMPipeline", "LeapfrogScheduler"]


class TestFittedSteps:
    """Rows (timestep, landing, now, ahead), as `morse plan` saves them."""

    def rows(self, count, power=1.0, now=0.0, ahead=0.0):
        """What the grid of `timestep_power` is as rows, with weights of extrapolation."""
        scheduler = LeapfrogScheduler(timestep_power=power)
        scheduler.set_timesteps(count)
        here, there = scheduler._grid[::2], scheduler._grid[1::2]
        landings = [(a - b) / (a - c) for a, b, c in zip(here, there, here[1:], strict=False)]
        return [[t, s, now, ahead] for t, s in zip(here, [*landings, 1.0], strict=True)]

    @pytest.mark.parametrize(("count", "power"), [(1, 1.0), (2, 2.0), (9, 1.5)])
    def test_those_of_a_plain_grid_change_nothing(self, count, power):
        plain = LeapfrogScheduler(timestep_power=power)
        fitted = LeapfrogScheduler(fitted_steps=self.rows(count, power))
        assert solve(fitted, count) == pytest.approx(solve(plain, count), rel=1e-6)
        assert fitted._grid == plain._grid

    @pytest.mark.parametrize("count", [1, 4, 7, 20])
    def test_another_number_of_evaluations_takes_rows_between(self, count):
        """An even grid stays even, and extrapolation stays as it was."""
        fitted, plain = LeapfrogScheduler(fitted_steps=self.rows(8, now=0.25)), LeapfrogScheduler()
        for scheduler in (fitted, plain):
            scheduler.set_timesteps(count)
        for found, expected in zip(fitted._grid, plain._grid, strict=True):
            assert abs(found - expected) <= 1  # the rows' timesteps are rounded
        assert fitted._weights == [[0.25, 0.0]] * count

    def test_many_more_evaluations_than_rows_keep_a_timestep_each(self):
        """Beyond the last row's timestep there is no room for the shares of a run that are left."""
        steep = LeapfrogScheduler(fitted_steps=[[999, 0.5, 0, 0], [300, 0.5, 0, 0], [0.6, 1, 0, 0]])
        steep.set_timesteps(20)
        timesteps = steep.timesteps.tolist()
        assert timesteps[0] == 999 and timesteps[-1] >= 0
        assert all(later < earlier for earlier, later in pairwise(timesteps))
        rows = resample_steps(steep.config.fitted_steps, 20)[:, 0].tolist()
        assert rows[-1] >= 0 and all(later < earlier for earlier, later in pairwise(rows))

    @pytest.mark.parametrize("clean_above", [0.0, 20.0, 1e9])  # 20: x_0 first, then epsilon
    def test_moves_extrapolate_what_they_hold_fixed(self, clean_above):
        rows = self.rows(3, now=0.5, ahead=2.0)
        scheduler = LeapfrogScheduler(fitted_steps=rows, clean_above=clean_above)
        scheduler.set_timesteps(3)
        generator = torch.Generator().manual_seed(0)
        x0, z0, z1 = torch.randn(3, 1, 1, 4, 4, generator=generator).double()
        alphas, grid = scheduler.alphas_cumprod.double(), scheduler._grid

        def rates(index):
            return alphas[grid[index]].sqrt(), (1 - alphas[grid[index]]).sqrt()

        def clean(x, z, index):
            return (x - rates(index)[1] * z) / rates(index)[0]

        def move(x, start, end, held, is_clean):
            """A DDIM step: the other of x_0 and epsilon follows from the sample."""
            alpha, sigma = rates(start)
            x_0, z = held, (x - alpha * held) / sigma
            if not is_clean:
                x_0, z = (x - sigma * held) / alpha, held
            return rates(end)[0] * x_0 + rates(end)[1] * z

        is_clean = [rates(index)[1] > clean_above * rates(index)[0] for index in (0, 2)]
        assert is_clean == [clean_above < 1e9, clean_above == 0]
        first = clean(x0, z0, 0) if is_clean[0] else z0
        landed = move(x0, 0, 1, first, is_clean[0])
        x1 = scheduler.step(z0, grid[0], x0).prev_sample
        expected = move(landed, 1, 2, first, is_clean[0])
        torch.testing.assert_close(x1, expected, rtol=1e-5, atol=1e-5)
        first, second = (clean(x0, z0, 0), clean(x1, z1, 2)) if is_clean[1] else (z0, z1)
        change = second - first
        landed = move(landed, 1, 3, second + change / 2, is_clean[1])
        expected = move(landed, 3, 4, second + 2 * change, is_clean[1])
        found = scheduler.step(z1, grid[2], x1).prev_sample
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_a_run_from_the_middle_and_a_second_run_forget_the_first(self):
        scheduler = LeapfrogScheduler(fitted_steps=self.rows(5, ahead=0.7))
        assert solve(scheduler, 5) == solve(scheduler, 5)
        scheduler.set_timesteps(5)
        sample = torch.ones(1, 1, 2, 2)
        assert scheduler.step(sample, scheduler.timesteps[3], sample).prev_sample.isfinite().all()

    def test_saved_and_loaded(self, tmp_path):
        rows = self.rows(4, ahead=0.5)
        LeapfrogScheduler(fitted_steps=rows).save_pretrained(tmp_path)
        assert LeapfrogScheduler.from_pretrained(tmp_path).config.fitted_steps == rows

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "must hold rows"),
            ([[999, 0.5]], "must hold rows"),
            ([[500, 0.5, 0, 0], [600, 1, 0, 0]], r"must fall and lie in \[0, 1000\), got"),
            ([[500, 0.5, 0, 0], [500, 1, 0, 0]], "must fall"),
            ([[1000, 1, 0, 0]], r"must fall and lie in \[0, 1000\), got"),
            ([[999, 1.5, 0, 0], [400, 1, 0, 0]], r"must lie in \(0, 1\), got \[1.5\]"),
            ([[999, 0, 0, 0], [400, 1, 0, 0]], r"must lie in \(0, 1\), got \[0\]"),
        ],
    )
    def test_wrong_rows(self, rows, message):
        with pytest.raises(ValueError, match=message):
            LeapfrogScheduler(fitted_steps=rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_power": 0.0}, "timestep_power must be positive, got 0.0"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid'; give others as trained_betas"),
        ({"prediction_type": "flow"}, "prediction_type must be one of"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        LeapfrogScheduler(**options)


def test_wrong_use():
    scheduler = LeapfrogScheduler()
    with pytest.raises(ValueError, match="call set_timesteps before"):
        scheduler.step(torch.zeros(1), 0, torch.zeros(1))
    with pytest.raises(ValueError, match="from 1 to 500, got 501"):
        scheduler.set_timesteps(501)
