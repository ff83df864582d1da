"""The leapfrog solver for flow matching: closed forms, and the same run on the other path."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from morse import FlowMatchLeapfrogScheduler, LeapfrogScheduler
from morse.rates import adds_noise, is_flow
from morse.schedulers import check_scheduler, make_scheduler

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SPREAD = 0.5  # standard deviation of Gaussian data, whose exact denoiser is known


def exact_velocity(sample, sigma):
    """E[epsilon - x_0 | x] for x_0 ~ N(0, SPREAD^2)."""
    alpha = 1 - sigma
    variance = (alpha * SPREAD) ** 2 + sigma**2
    return sample * (sigma - alpha * SPREAD**2) / variance


def solve(scheduler, steps, **options):
    scheduler.set_timesteps(steps, **options)
    sample = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    for timestep in scheduler.timesteps:
        output = exact_velocity(sample, timestep.double() / 1000)
        sample = scheduler.step(output, timestep, sample).prev_sample
    return float(sample[0, 0, 0, 0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("clean_above", [4.0, 1e9, float("inf")])
def test_second_order_to_the_flow_s_own_end(shift, clean_above):
    """Such a flow only scales: from pure noise to SPREAD times as much."""
    scheduler = FlowMatchLeapfrogScheduler(shift=shift, clean_above=clean_above)
    coarse, fine = (abs(solve(scheduler, n) - SPREAD) for n in (20, 40))
    assert fine < 2e-3 and 3 < coarse / fine < 6


def test_far_better_than_euler():
    kinds = (FlowMatchLeapfrogScheduler, FlowMatchEulerDiscreteScheduler)
    errors = [abs(solve(kind(), 11) - SPREAD) for kind in kinds]
    assert errors[0] < errors[1] / 6


def test_the_same_run_as_on_a_variance_preserving_path():
    """For one denoiser, told the same signal-to-noise ratio of the same picture."""

    def noise_of(scaled, ratio):  # of x / alpha and sigma / alpha; no linear one
        normed = scaled / (1 + ratio**2).sqrt()
        return normed * (0.9 + 0.1 * torch.sin(normed))

    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    rows = [[999, 0.5, 0, 0], [800, 0.4, 0.2, 0.6], [450, 0.6, -0.1, 0.5], [120, 1, 0.3, 0]]
    known = LeapfrogScheduler(fitted_steps=rows)
    known.set_timesteps(4)
    alphas = torch.tensor([*(known.alphas_cumprod[t] for t in known._grid[:-1]), 1.0]).sqrt()
    ratios = ((1 - alphas**2).sqrt() / alphas).double()

    sample = noise
    for index, timestep in enumerate(known.timesteps):
        output = noise_of(sample / alphas[2 * index], ratios[2 * index])
        sample = known.step(output, timestep, sample).prev_sample

    levels = ratios / (1 + ratios)
    here, landed, later = levels[:-1:2], levels[1::2], torch.cat([levels[2::2], levels[-1:]])
    landings = (here - landed) / (here - later[: len(here)])
    own = [
        [1000 * float(level) - 1, float(landing), *row[2:]]
        for level, landing, row in zip(here, landings, rows, strict=True)
    ]
    scheduler = FlowMatchLeapfrogScheduler(fitted_steps=own)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(torch.tensor(scheduler._grid).double(), levels, rtol=1e-5, atol=1e-6)
    flow = noise / (alphas[0] * (1 + ratios[0]))
    for index, timestep in enumerate(scheduler.timesteps):
        clean_scaled = flow / (1 - levels[2 * index])
        epsilon = noise_of(clean_scaled, ratios[2 * index])
        clean = clean_scaled - ratios[2 * index] * epsilon
        flow = scheduler.step(epsilon - clean, timestep, flow).prev_sample
    torch.testing.assert_close(flow, sample, rtol=1e-3, atol=1e-3)


class TestTheGrid:
    """Twice as fine as the evaluations, and shifted as diffusers shifts it."""

    def test_documented_example(self):
        scheduler = FlowMatchLeapfrogScheduler(shift=3.0)
        scheduler.set_timesteps(2)
        assert scheduler.timesteps.tolist() == pytest.approx([1000, 600])
        assert scheduler._grid == pytest.approx([1, 6 / 7, 3 / 5, 0])
        assert scheduler.sigmas.tolist() == pytest.approx([1, 0.6, 0])

    @pytest.mark.parametrize(
        ("options", "mu"),
        [
            ({"shift": 3.0}, None),
            ({"use_dynamic_shifting": True}, 0.8),
            ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 0.8),
            ({"shift": 2.0, "shift_terminal": 0.1}, None),
        ],
    )
    def test_shifts_are_euler_s(self, options, mu):
        euler = FlowMatchEulerDiscreteScheduler(**options)
        euler.set_timesteps(sigmas=[1 - j / 9 for j in range(9)], mu=mu)
        scheduler = FlowMatchLeapfrogScheduler.from_config(euler.config)
        scheduler.set_timesteps(5, mu=mu)
        assert scheduler._grid == pytest.approx(euler.sigmas.tolist(), abs=1e-6)
        assert scheduler.timesteps.tolist() == pytest.approx(euler.timesteps[::2].tolist())

    def test_a_shift_set_later_is_euler_s(self):
        kinds = FlowMatchEulerDiscreteScheduler, FlowMatchLeapfrogScheduler
        euler, scheduler = schedulers = [kind(shift=3.0) for kind in kinds]
        for each in schedulers:
            each.set_shift(5.0)
            each.set_timesteps(sigmas=[0.9, 0.5, 0.2])
        assert scheduler.shift == euler.shift == 5.0
        assert scheduler.sigmas.tolist() == pytest.approx(euler.sigmas.tolist())
        assert scheduler.timesteps.tolist() == pytest.approx(euler.timesteps.tolist())

    def test_sigmas_that_a_caller_chose(self):
        scheduler = FlowMatchLeapfrogScheduler(fitted_steps=[[999, 0.3, 0, 9.0], [300, 1, 9, 9]])
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2])
        assert scheduler._grid == pytest.approx([0.9, 0.7, 0.5, 0.35, 0.2, 0.0])
        assert scheduler._weights is None and scheduler.num_inference_steps == 3

    def test_a_fit_begins_with_noise_alone_at_most(self):
        scheduler = FlowMatchLeapfrogScheduler(fitted_steps=[[999.5, 0.3, 0, 0], [300, 1, 0, 0]])
        scheduler.set_timesteps(2)
        assert scheduler._grid[0] == 1

    def test_sigmas_that_flux_gives_unasked_are_no_choice(self):
        asked, unasked = (FlowMatchLeapfrogScheduler(timestep_power=1.3) for _ in range(2))
        asked.set_timesteps(5)
        unasked.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
        assert unasked._grid == asked._grid

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sigmas": [0.5, 0.9]}, r"sigmas must fall and lie in \(0, 1\], got \[0.5, 0.9\]"),
            ({"sigmas": [1.0, 0.0]}, "sigmas must fall"),
            ({"sigmas": [1.2, 0.3]}, "sigmas must fall"),
            ({"num_inference_steps": 501}, "from 1 to 500, got 501"),
            ({}, "num_inference_steps is None and no sigmas"),
            ({"num_inference_steps": 3, "sigmas": [0.9, 0.5]}, "is 3, but there are 2 sigmas"),
        ],
    )
    def test_wrong_use(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            FlowMatchLeapfrogScheduler().set_timesteps(**arguments)

    def test_a_failed_call_changes_nothing(self):
        scheduler = FlowMatchLeapfrogScheduler()
        scheduler.set_timesteps(3)
        before = scheduler._grid, scheduler.num_inference_steps, scheduler._weights
        with pytest.raises(ValueError, match="sigmas must fall"):
            scheduler.set_timesteps(sigmas=[0.2, 0.4])
        assert (scheduler._grid, scheduler.num_inference_steps, scheduler._weights) == before

    def test_a_missing_shift_is_named(self):
        with pytest.raises(ValueError, match="`mu` must be passed"):
            FlowMatchLeapfrogScheduler(use_dynamic_shifting=True).set_timesteps(4)


def test_noise_is_added_as_euler_adds_it():
    euler, scheduler = (
        kind(shift=3.0) for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchLeapfrogScheduler)
    )
    sample, noise = torch.randn(2, 3, 1, 4, 4).unbind()
    scheduler.set_timesteps(3)
    euler.set_timesteps(sigmas=[1, 0.6, 0.2])
    for timestep in scheduler.timesteps[1:, None]:
        expected = euler.scale_noise(sample, timestep, noise)
        torch.testing.assert_close(scheduler.scale_noise(sample, timestep, noise), expected)


def test_saved_and_loaded(tmp_path):
    rows = [[999, 0.3, 0, 0], [300.5, 1, 0.2, 0]]
    FlowMatchLeapfrogScheduler(shift=2.5, fitted_steps=rows).save_pretrained(tmp_path)
    config = FlowMatchLeapfrogScheduler.from_pretrained(tmp_path).config
    assert (config.shift, config.fitted_steps) == (2.5, rows)


class TestShortNames:
    """`scheduler=` names the same methods for models trained by flow matching."""

    @pytest.mark.parametrize(
        ("name", "class_name"),
        [
            ("ddim", "FlowMatchEulerDiscreteScheduler"),
            ("euler", "FlowMatchEulerDiscreteScheduler"),
            ("heun", "FlowMatchHeunDiscreteScheduler"),
            ("dpmsolver++", "DPMSolverMultistepScheduler"),
            ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
            ("leapfrog-dense", "FlowMatchLeapfrogScheduler"),
        ],
    )
    @pytest.mark.parametrize("shift_is", ["shift", "flow_shift"])
    def test_what_is_made(self, name, class_name, shift_is):
        """It reaches zero noise, and names the shift in its class's own word alone."""
        known = FlowMatchEulerDiscreteScheduler(
            shift=3.0, base_image_seq_len=77, stochastic_sampling=True, use_beta_sigmas=True
        )
        if shift_is == "flow_shift":
            known = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
        made = make_scheduler(name, known.config)
        assert type(made).__name__ == class_name and is_flow(made) and not adds_noise(made)
        made.set_timesteps(4)
        assert made.sigmas[0] == pytest.approx(1, abs=2e-3) and made.sigmas[-1] == 0
        assert made.sigmas.max() <= 1
        words = {"shift", "flow_shift"} & set(made.config)
        assert len(words) == 1 and made.config[words.pop()] == 3.0
        assert ("use_flow_sigmas" in made.config) == ("Multistep" in class_name)
        if shift_is == "shift":  # pipelines compute a dynamic shift from it
            assert made.config.base_image_seq_len == 77
        again = make_scheduler("leapfrog", made.config)
        assert isinstance(again, FlowMatchLeapfrogScheduler) and again.config.shift == 3.0

    def test_the_shift_is_the_scheduler_s_own_word(self):
        """`from_config` keeps the words of the scheduler before."""
        euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        kind = diffusers.UniPCMultistepScheduler
        unipc = kind.from_config(euler.config, **FLOW, flow_shift=5.0)
        assert make_scheduler("leapfrog", unipc.config).config.shift == 5.0

    def test_a_power_is_leapfrog_s_own(self):
        config = FlowMatchEulerDiscreteScheduler().config
        dense = make_scheduler("leapfrog-dense", config)
        assert dense.config.timestep_power == 1.5
        assert make_scheduler("leapfrog", dense.config).config.timestep_power == 1.0

    @pytest.mark.parametrize(
        "known",
        [FlowMatchEulerDiscreteScheduler(), diffusers.UniPCMultistepScheduler(**FLOW)],
        ids=["FlowMatch", "UniPC"],
    )
    @pytest.mark.parametrize("name", ["pndm", "ddpm", "euler-ancestral", "DDIMScheduler"])
    def test_what_is_not_for_flows(self, known, name):
        message = r"is not for models trained by flow matching; use one of .*'leapfrog'"
        with pytest.raises(ValueError, match=message):
            make_scheduler(name, known.config)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("deis", {}, "'deis' stops before a flow's end"),
            ("DEISMultistepScheduler", {}, "stops before a flow's end"),
            ("SASolverScheduler", {}, "stops before a flow's end"),
            ("leapfrog", {"invert_sigmas": True}, "noise levels with invert_sigmas"),
            ("unipc", {"invert_sigmas": True}, "noise levels with invert_sigmas"),
            ("heun", {"shift_terminal": 0.1}, "noise levels with shift_terminal"),
            ("heun", {"use_dynamic_shifting": True}, "with use_dynamic_shifting"),
            (
                "dpmsolver++",
                {"use_dynamic_shifting": True, "time_shift_type": "linear"},
                "with time_shift_type; use one of .*'unipc'",
            ),
        ],
    )
    def test_what_diffusers_would_ignore(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            make_scheduler(name, FlowMatchEulerDiscreteScheduler(**options).config)

    def test_a_flow_s_scheduler_is_refused_elsewhere(self):
        pipe = diffusers.DDPMPipeline(torch.nn.Identity(), diffusers.DDPMScheduler())
        with pytest.raises(ValueError, match="was trained with a noise schedule of alphas"):
            check_scheduler(pipe, FlowMatchLeapfrogScheduler())

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_others_stay_as_they_are(self, prediction_type):
        config = diffusers.DPMSolverMultistepScheduler(prediction_type=prediction_type).config
        assert isinstance(make_scheduler("leapfrog", config), LeapfrogScheduler)
