"""Dash's latest estimate as Dot's base: raw, by its x_0, or by its velocity."""

import inspect

import diffusers
import pytest
import torch
from attached import difference, planned, text_pipe
from test_schedulers import CASES as ALL_SCHEDULERS
from test_schedulers import make, sample
from tiny_pipelines import loop_pipeline
from torch.testing import assert_close

from morse import MorseDot, enable_morse
from morse.rates import adds_noise, choose_base_space, noise_rates, prediction_type
from morse.schedulers import make_scheduler
from morse.spaces import from_clean, rebase, to_clean

KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")
VP = (torch.tensor(0.8), torch.tensor(0.6))


def tensors(count, channels=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, channels, 4, 4, generator=generator).unbind(0)


def reuse(base_space):
    """A Dot without a residual: what is left is the base."""

    def dot(sample, timestep, jump, **conditions):
        return torch.zeros_like(jump.model_output)

    dot.base_space = base_space
    return dot


class TestFormulas:
    @pytest.mark.parametrize("rates", [VP, (torch.tensor(0.3), torch.tensor(0.7))])
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, rates, kind):
        clean, noise = tensors(2)
        noisy = rates[0] * clean + rates[1] * noise
        output = {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": rates[0] * noise - rates[1] * clean,
            "flow_prediction": noise - clean,
        }[kind]
        assert_close(to_clean(output, noisy, rates, kind), clean, rtol=1e-4, atol=1e-5)
        assert_close(from_clean(clean, noisy, rates, kind), output, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("base_space", ["raw", "x0", "v"])
    def test_at_the_same_point_nothing_changes(self, base_space, kind):
        output, noisy = tensors(2)
        found = rebase(base_space, output, (noisy, VP), (noisy, VP), kind)
        assert_close(found, output, rtol=1e-4, atol=1e-5)

    def test_after_a_ddim_step_keeping_x0_keeps_epsilon(self):
        noise, noisy = tensors(2)
        end = (torch.tensor(0.96), torch.tensor(0.28))
        landed = end[0] * (noisy - VP[1] * noise) / VP[0] + end[1] * noise
        found = rebase("x0", noise, (noisy, VP), (landed, end), "epsilon")
        assert_close(found, noise, rtol=1e-4, atol=1e-5)
        with_fresh_noise = landed + 0.1
        found = rebase("x0", noise, (noisy, VP), (with_fresh_noise, end), "epsilon")
        assert_close(found, noise + 0.1 / 0.28, rtol=1e-4, atol=1e-5)

    def test_velocity_stays_for_a_model_of_velocity(self):
        velocity, noisy, landed = tensors(3)
        end = (torch.tensor(0.96), torch.tensor(0.28))
        found = rebase("v", velocity, (noisy, VP), (landed, end), "v_prediction")
        assert_close(found, velocity, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
    @pytest.mark.parametrize("base_space", ["x0", "v"])
    def test_half_precision_is_rounded_once(self, base_space, kind):
        """At this alpha an x_0 in float16 would be 14 times as far from what it is."""
        rates = [(torch.tensor(alpha), torch.tensor(1 - alpha**2).sqrt()) for alpha in (0.07, 0.6)]
        clean, noise = tensors(2)
        samples = [(alpha * clean + sigma * noise).half() for alpha, sigma in rates]
        output = from_clean(clean, rates[0][0] * clean + rates[0][1] * noise, rates[0], kind).half()

        def carried(dtype):
            there, here = zip([each.to(dtype) for each in samples], rates, strict=True)
            return rebase(base_space, output.to(dtype), there, here, kind)

        found, expected = carried(torch.half), carried(torch.double).half()
        assert_close(found, expected, rtol=torch.finfo(torch.half).eps, atol=1e-5)

    @pytest.mark.parametrize(("inputs", "outputs"), [(5, 2), (2, 4)])
    def test_only_the_channels_of_the_sample_are_carried(self, inputs, outputs):
        (output,), (noisy, landed) = tensors(1, outputs), tensors(2, inputs)
        end = (torch.tensor(0.96), torch.tensor(0.28))
        found = rebase("x0", output, (noisy, VP), (landed, end), "epsilon")
        arguments = ((noisy[:, :2], VP), (landed[:, :2], end), "epsilon")
        assert torch.equal(found[:, :2], rebase("x0", output[:, :2], *arguments))
        assert torch.equal(found[:, 2:], output[:, 2:])
        flat = [each.flatten(2).transpose(1, 2) for each in (output, noisy, landed)]
        packed = rebase("x0", flat[0], (flat[1], VP), (flat[2], end), "epsilon")
        assert torch.equal(packed, found.flatten(2).transpose(1, 2))


# PNDM mixes the epsilons of several samples, which have no common x_0.
CASES = [
    ("DDIM", {}),
    ("DDIMParallel", {}),
    ("DDPM", {}),
    ("DDPMParallel", {}),
    ("TCD", {}),
    ("LCM", {}),
    ("EulerDiscrete", {}),
    ("EulerDiscrete", {"use_karras_sigmas": True}),
    ("EulerAncestralDiscrete", {}),
    ("HeunDiscrete", {}),
    ("KDPM2Discrete", {}),
    ("KDPM2AncestralDiscrete", {}),
    ("LMSDiscrete", {}),
    ("DPMSolverMultistep", {}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("DPMSolverSinglestep", {}),
    ("DEISMultistep", {}),
    ("UniPCMultistep", {}),
    ("SASolver", {}),
    ("FlowMatchEulerDiscrete", {}),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
    ("FlowMatchHeunDiscrete", {}),
    ("FlowMatchLCM", {}),
]
CLIPPING = ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "LCM")
VELOCITY = [
    (name, {"prediction_type": "v_prediction"})
    for name in ("DDIM", "EulerDiscrete", "HeunDiscrete", "UniPCMultistep")
]


@pytest.fixture(scope="module")
def unet(build_unet):
    return build_unet(channels=(8, 16), sample_size=8)


@pytest.mark.parametrize(("name", "options"), CASES + VELOCITY)
def test_every_scheduler_ends_at_the_x0_that_is_kept(unet, name, options):
    """One evaluation of Dash, then reuse of its x_0: whatever the solver, that is the picture."""
    options = {"clip_sample": False, **options} if name in CLIPPING else options
    pipe = loop_pipeline(unet, make(name, **options))
    jumps, rates = [], []

    def dot(sample, timestep, jump):
        jumps.append(jump)
        return torch.zeros_like(sample)

    def note(dash, arguments):
        rates.append(noise_rates(pipe.scheduler, 0, arguments[1], arguments[0]))

    dot.base_space = "x0"
    hook = unet.register_forward_pre_hook(note)
    found = sample(enable_morse(pipe, dot), plan="Doooooo")
    hook.remove()
    assert pipe.last_run.num_dot == 6 and pipe.last_run.base_space == "x0"
    kind = prediction_type(pipe.scheduler)
    expected = to_clean(jumps[0].model_output, jumps[0].sample, rates[0], kind)
    # At the noisy end x_0 is the sample over a small alpha, which magnifies rounding.
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    assert expected.std() > 0.1


def exact_denoiser(scheduler):
    """Epsilon for data of mean 0 and standard deviation 1/2 in every pixel."""

    class Exact(torch.nn.Module):
        config = diffusers.configuration_utils.FrozenDict(in_channels=1, sample_size=8)
        device = torch.device("cpu")

        def forward(self, sample, timestep, return_dict=False):
            alpha_squared = scheduler.alphas_cumprod[timestep.long()]
            sigma = (1 - alpha_squared).sqrt()
            return (sigma * sample / (alpha_squared / 4 + sigma**2),)

    return Exact()


@pytest.mark.parametrize("name", ["DDPM", "LCM"])
def test_with_fresh_noise_reuse_of_x0_is_far_better_than_of_epsilon(name):
    scheduler = make(name, clip_sample=False)
    dash = exact_denoiser(scheduler)
    pipe = loop_pipeline(dash, scheduler)
    errors = {}
    for base_space in ("raw", "x0"):
        missed = []

        def dot(x, t, jump, base_space=base_space, missed=missed):
            here, then = (noise_rates(scheduler, 0, moment, x) for moment in (t, jump.timestep))
            arguments = (jump.model_output, (jump.sample, then), (x, here), "epsilon")
            base = rebase(base_space, *arguments)
            x0 = [to_clean(z, x, here, "epsilon") for z in (base, dash(x, t)[0])]
            missed.append((x0[0] - x0[1]).square().mean().sqrt())
            return torch.zeros_like(x)

        dot.base_space = base_space
        sample(enable_morse(pipe, dot), plan="Do" * 10)
        errors[base_space] = float(torch.stack(missed).mean())
    assert errors["x0"] < 0.5 * errors["raw"]


class TestChoice:
    def test_an_untrained_dot_is_reuse_in_its_space(self, unet):
        pipe = loop_pipeline(unet, make("DDPM"))
        for base_space, same_as in (("x0", "x0"), (None, "x0"), ("raw", "raw"), ("v", "v")):
            dot = MorseDot.from_dash(unet, num_down_blocks=1, base_space=base_space)
            found = sample(enable_morse(pipe, dot), plan="DooDo")
            assert pipe.last_run.base_space == same_as
            assert torch.equal(found, sample(enable_morse(pipe, reuse(same_as)), plan="DooDo"))
        assert not torch.equal(found, sample(enable_morse(pipe, reuse("raw")), plan="DooDo"))

    def test_it_is_saved(self, unet, tmp_path):
        MorseDot.from_dash(unet, base_space="x0").save_pretrained(tmp_path)
        assert MorseDot.from_pretrained(tmp_path).base_space == "x0"
        MorseDot.from_dash(unet).save_pretrained(tmp_path)
        assert MorseDot.from_pretrained(tmp_path).base_space is None

    @pytest.mark.parametrize(
        ("name", "options", "expected"),
        [
            ("DDPM", {}, "x0"),
            ("LCM", {}, "x0"),
            ("EulerAncestralDiscrete", {}, "x0"),
            ("KDPM2AncestralDiscrete", {}, "x0"),
            ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, "x0"),
            ("DPMSolverMultistep", {}, "raw"),
            ("DDIM", {}, "raw"),
            ("EulerDiscrete", {}, "raw"),
            ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, "x0"),
            ("FlowMatchEulerDiscrete", {}, "raw"),
            ("EDMDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, "raw"),
        ],
    )
    def test_left_to_the_scheduler(self, name, options, expected):
        scheduler = make(name, **options)
        assert choose_base_space(scheduler, None) == expected
        assert adds_noise(scheduler) == (expected == "x0" or name.startswith("EDM"))
        assert choose_base_space(scheduler, "raw") == "raw"

    def test_left_to_the_eta_of_a_call(self, unet):
        pipe = diffusers.DDIMPipeline(unet, make("DDIM"))
        pipe.set_progress_bar_config(disable=True)
        enable_morse(pipe, MorseDot.from_dash(unet, 1))
        for options, expected in (({}, "raw"), ({"eta": 0.5}, "x0")):
            pipe(plan="Do", output_type="np", **options)
            assert pipe.last_run.base_space == expected
        assert not adds_noise(make("DPMSolverMultistep"), eta=0.5)  # whose step takes none

    def test_unknown_rates_and_names(self, unet):
        pipe = enable_morse(loop_pipeline(unet, make("EDMEuler")), reuse("x0"))
        with pytest.raises(ValueError, match="not known for EDMEulerScheduler; use another"):
            sample(pipe, plan="Do")
        with pytest.raises(ValueError, match=r"base_space must be one of .*got 'eps'"):
            MorseDot.from_dash(unet, base_space="eps")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, {**options, "prediction_type": kinds[0]} if kinds[0] else options)
        for name, options, kinds, _ in ALL_SCHEDULERS
    ]
    + [("DDPMParallel", {}), ("FlowMatchLCM", {}), ("CMStochasticIterative", {}), ("UnCLIP", {})],
)
def test_those_that_add_noise_are_those_whose_end_a_seed_changes(name, options):
    def end(seed):
        own = {"noise_sampler_seed": seed} if name == "DPMSolverSDE" else {}
        scheduler = make(name, **{**options, **own})
        scheduler.set_timesteps(5)
        draws = "generator" in inspect.signature(scheduler.step).parameters
        drawn = {"generator": torch.Generator().manual_seed(seed)} if draws else {}
        scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        sample = tensors(1)[0]
        for timestep in scheduler.timesteps:
            output = 0.3 * scale(sample, timestep)
            sample = scheduler.step(output, timestep, sample, **drawn).prev_sample
        return sample

    assert adds_noise(make(name, **options)) != torch.equal(end(0), end(1))


@pytest.mark.parametrize(
    "name",
    ["CogVideoXDPM", "CosineDPMSolverMultistep", "DDPMWuerstchen", "LTXEulerAncestralRF", "SCM"],
)
def test_those_that_add_noise_in_steps_called_otherwise(name):
    assert adds_noise(make(name))


def test_without_its_noise_ltx_ancestral_euler_adds_none():
    assert not adds_noise(diffusers.LTXEulerAncestralRFScheduler(eta=0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_in_half_precision(dtype):
    """After DDIM's steps an x_0 that is kept is the epsilon that is kept, but for rounding."""
    pipe, found = text_pipe().to(dtype), {}
    for base_space in ("x0", "raw", "v"):
        enable_morse(pipe, reuse(base_space))
        found[base_space] = planned(pipe, "DoDo", guidance_scale=1.0)
        assert pipe.last_run.base_space == base_space and found[base_space].dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps * float(found["raw"].abs().max())
    assert difference(found["x0"], found["raw"]) < rounding < difference(found["v"], found["raw"])


def test_flow_matching_with_fresh_noise_keeps_the_clean_image():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    lcm = make_scheduler("lcm", flow.config)
    assert type(lcm) is diffusers.FlowMatchLCMScheduler and adds_noise(lcm)
    assert choose_base_space(lcm, None) == "x0"
    assert choose_base_space(flow, None) == "raw" and not adds_noise(flow)
