"""Dots that use the Dash evaluation before the latest: the line through both, seen and followed."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from idx_files import write_parts
from pipeline_checks import latents, make_dot
from test_guidance import SeparateGuidance
from test_schedulers import make, sample
from tiny_pipelines import loop_pipeline, picture, stable_diffusion, text_inputs, text_unet
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from train_runs import save_pixels

from morse import MorseDot, MorsePlan, enable_morse, morse_sample
from morse.clock import scheduler_index
from morse.history import extrapolate, line_coefficient
from morse.rates import noise_rates
from morse.sampling import JumpPoint, dot_estimate
from morse.spaces import rebase
from morse.training.frozen import FrozenDash
from morse.training.graphs import _OnPairs, _tensors
from morse.training.history import draw_triples
from morse.training.loop import TrainDotConfig, build_dot, train_dot
from morse.training.schedule import NoiseSchedule
from morse.training.validation import residual_ratios, sample_rows
from morse.training.windows import fresh_window, pick_pairs

ALPHAS = diffusers.DDPMScheduler().alphas_cumprod
SCHEDULERS = [
    ("DDIM", {"clip_sample": False}),
    ("EulerDiscrete", {}),
    ("DPMSolverMultistep", {}),
    ("UniPCMultistep", {"use_karras_sigmas": True}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),
]


def rates(half_log_snr):
    alpha = torch.sigmoid(2 * torch.as_tensor(half_log_snr).double()).sqrt()
    return alpha, (1 - alpha**2).sqrt()


def half_log_snr(rates):
    return (rates[0] / rates[1]).log()


def tensors(count):
    return torch.randn(count, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)


def zero_dot(history=1, cap=20.0, seen=None):
    def dot(sample, timestep, jump, **conditions):
        if seen is not None:
            seen.append(jump)
        return torch.zeros_like(jump.model_output)

    dot.history, dot.extrapolation_cap = history, cap
    return dot


@pytest.fixture(scope="module")
def unet(build_unet):
    return build_unet(channels=(8, 16), sample_size=8)


class TestFormula:
    def test_the_coefficient_is_a_share_of_log_snr(self):
        assert_close(
            line_coefficient(rates(-2), rates(-1), rates(-0.5)), torch.tensor(0.5).double()
        )
        assert line_coefficient(rates(-1), rates(-1), rates(0)) == 0
        assert line_coefficient(rates(1), rates(-1), rates(0)) == 0  # another pass
        assert line_coefficient(rates(1), rates(-1), rates(-2)) == 0
        assert line_coefficient(rates(-2), rates(0), rates(-1)) == 0  # back to more noise
        noise = (torch.tensor(0.0), torch.tensor(1.0))
        assert line_coefficient(noise, rates(-1), rates(0)) == 0
        assert line_coefficient(noise, noise, rates(0)) == 0

    @pytest.mark.parametrize(
        ("cap", "base", "seen"), [(0, 0, 1), (0.5, 0.5, 1), (2, 2, 2), (9, 3, 3)]
    )
    def test_the_cap(self, cap, base, seen):
        output, noisy, before, other, here = tensors(5)
        evaluations = (output, noisy, rates(0.0)), (before, other, rates(-1.0))
        found = extrapolate("raw", *evaluations, (here, rates(3.0)), "epsilon", cap)
        assert_close(found[0], output + base * (output - before))
        assert_close(found[1], seen * (output - before))

    def test_nothing_is_float64_beside_the_sample(self):
        """As on MPS, which has no such tensors; "meta" stands in for it."""

        class NoDoubles(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                found = function(*args, **kwargs or {})
                assert found.device.type == "cpu" or found.dtype != torch.float64, function
                return found

        output, noisy, before, other, here = (each.to("meta") for each in tensors(5))
        evaluations = (output, noisy, rates(0.0)), (before, other, rates(-1.0))
        with NoDoubles():
            base, trend = extrapolate("x0", *evaluations, (here, rates(3.0)), "epsilon", 2)
        assert base.dtype == trend.dtype == torch.float32

    def test_rates_in_full_precision_leave_half_of_it_as_it_is(self):
        output, noisy, before, other, here = (each.half() for each in tensors(5))
        then, earlier, now = (
            tuple(rate.float().reshape(1, 1, 1, 1) for rate in rates(at)) for at in (0.0, -1.0, 3.0)
        )
        evaluations = (output, noisy, then), (before, other, earlier)
        for each in extrapolate("x0", *evaluations, (here, now), "epsilon", 2):
            assert each.dtype == torch.float16

    @pytest.mark.parametrize("base_space", ["raw", "x0", "v"])
    def test_both_estimates_are_carried_and_without_history_it_is_the_papers_base(self, base_space):
        output, noisy, before, other, here = tensors(5)
        latest, there = (output, noisy, rates(0.0)), (here, rates(1.0))
        alone = rebase(base_space, output, latest[1:], there, "epsilon")
        found = extrapolate(base_space, latest, None, there, "epsilon", 1.0)
        assert torch.equal(found[0], alone) and found[1] is None
        # An earlier estimate at the same noise tells no slope.
        found = extrapolate(base_space, latest, (before, other, rates(0.0)), there, "epsilon", 1.0)
        assert torch.equal(found[0], alone) and not found[1].any()
        found = extrapolate(base_space, latest, (before, other, rates(-2.0)), there, "epsilon", 1.0)
        carried = rebase(base_space, before, (other, rates(-2.0)), there, "epsilon")
        assert_close(found[0], alone + 0.5 * (alone - carried))

    def test_pure_noise_has_no_x0_and_does_no_harm(self):
        output, noisy, before, other, here = tensors(5)
        noise = (torch.tensor(0.0), torch.tensor(1.0))
        evaluations = (output, noisy, rates(0.0)), (before, other, noise)
        found = extrapolate("x0", *evaluations, (here, rates(1.0)), "epsilon", 1.0)
        assert found[0].isfinite().all() and not found[1].any()


class Linear(nn.Module):
    """A denoiser whose output is linear in half the log-SNR, whatever the sample."""

    config = diffusers.configuration_utils.FrozenDict(in_channels=1, sample_size=8)
    device = torch.device("cpu")

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler = scheduler

    def forward(self, sample, timestep, return_dict=False):
        index = scheduler_index(self.scheduler, timestep)
        here = half_log_snr(noise_rates(self.scheduler, index, timestep, sample)).float()
        pattern = torch.linspace(-0.2, 0.2, 8)
        here = here.clamp(min=-9)  # a flow begins at pure noise
        return ((pattern + here * pattern.roll(3) / 4).expand_as(sample),)


@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
def test_a_line_needs_no_correction(name, options):
    scheduler = make(name, **options)
    pipe = loop_pipeline(Linear(scheduler), scheduler)
    expected = sample(pipe, num_inference_steps=9)
    difference = {}
    for history in (0, 1):
        images = sample(enable_morse(pipe, zero_dot(history)), plan="DDDoDooDo")
        assert pipe.last_run.num_dot == 4 and pipe.last_run.fallbacks == {}
        difference[history] = (images - expected).abs().max() / expected.abs().max()
    assert difference[1] < 1e-6 and difference[0] > 1e-4


@pytest.mark.parametrize("name", ["EDMEuler", "DDPM", "LCM", "HeunDiscrete", "PNDM"])
def test_other_schedulers(unet, name):
    pipe = loop_pipeline(unet, make(name))
    length = 15 if name == "PNDM" else 7
    seen = []
    enable_morse(pipe, zero_dot(cap=1.0, seen=seen))
    plan = str(MorsePlan.uniform(3, length - 3))
    assert sample(pipe, plan=plan).isfinite().all()
    assert pipe.last_run.num_dot == length - 3 and pipe.last_run.fallbacks == {}
    # Rates that are not known: no line. Otherwise one after the second Dash step.
    assert (seen[-1].trend is None) == (name == "EDMEuler")
    assert seen[0].trend is None and seen[0].earlier is None
    assert seen[-1].earlier.earlier is None


def test_one_dash_step_is_the_papers_dot(unet):
    """Without history the new channels are zero, and the base is the latest estimate."""
    plain = make_dot(unet)
    dot = MorseDot.from_dash(unet, 1, lora_rank=2, history=1)
    state = plain.state_dict()
    added = dot.conv_in.weight[:, 3:].detach()
    state["conv_in.weight"] = torch.cat([state["conv_in.weight"], added], 1)
    dot.load_state_dict(state)
    pipe = loop_pipeline(unet, make("DDIM"))
    found = {each: sample(enable_morse(pipe, each.eval()), plan="Dooo") for each in (plain, dot)}
    assert torch.equal(found[plain], found[dot])
    found = {each: sample(enable_morse(pipe, each.eval()), plan="DoDo") for each in (plain, dot)}
    assert (found[plain] - found[dot]).abs().max() > 1e-4


@pytest.mark.parametrize("base_space", ["raw", "x0"])
def test_pipeline_and_reference_loop_agree(unet, base_space):
    scheduler = make("DDIM", clip_sample=False)
    dot = make_dot(unet, history=1, base_space=base_space)
    plan = MorsePlan.parse("DoDooDo")
    pipe = loop_pipeline(unet, scheduler)
    expected = sample(enable_morse(pipe, dot), plan=plan)

    def at(jump):
        return jump.model_output, jump.sample, noise_rates(scheduler, 0, jump.timestep, jump.sample)

    def based(x, t, jump):
        here = (x, noise_rates(scheduler, 0, t, x))
        before = None if jump.earlier is None else at(jump.earlier)
        base, trend = extrapolate(base_space, at(jump), before, here, "epsilon", 1.0)
        return dot_estimate(dot, x, t, replace(jump, trend=trend), base)

    based.independent = True
    scheduler.set_timesteps(7)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = morse_sample(
        lambda x, t: unet._call_impl(x, t).sample,
        based,
        lambda z, x, t, _: scheduler.step(z, t, x).prev_sample,
        noise,
        scheduler.timesteps.tolist(),
        plan,
    )
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


class HistoryCheckingDot:
    """Insists that both estimates are Dash's for the very same text."""

    history, extrapolation_cap = 1, 1.0

    def __init__(self, unet):
        self.unet, self.lines = unet, 0

    def __call__(self, sample, timestep, jump, encoder_hidden_states, **conditions):
        for point in filter(None, (jump, jump.earlier)):
            arguments = (point.sample, point.timestep, encoder_hidden_states)
            dash = self.unet._call_impl(*arguments, return_dict=False)[0]
            assert torch.equal(point.model_output, dash)
        self.lines += jump.trend is not None
        return 0.05 * torch.tanh(sample - jump.sample)


def test_branches_of_guidance_do_not_mix():
    unet = text_unet()
    pipe = SeparateGuidance(unet, diffusers.DDIMScheduler(clip_sample=False))
    for guided, lines in (((0, 8), 8), ((3, 8), 4), ((4, 8), 4)):
        dot = HistoryCheckingDot(unet)
        enable_morse(pipe, dot)
        latents(pipe, plan="DooDoooo", **text_inputs(), guided=guided)
        # At the second Dash step the text's branch has history, the other if it was guided before.
        assert dot.lines == lines


def test_image_to_image():
    pipe = stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, text_unet())
    enable_morse(pipe, make_dot(pipe.unet, history=1))
    for _ in range(2):
        found = latents(pipe, plan="DoDoo", image=picture(), strength=0.5, **text_inputs())
        assert found.isfinite().all() and pipe.last_run.num_dot == 3


class TestDot:
    @staticmethod
    def inputs(trend=True):
        one, before, output, line = torch.randn(
            4, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)
        ).unbind(0)
        jump = JumpPoint(before, torch.tensor([700] * 2), output, trend=line if trend else None)
        return one, torch.tensor([600] * 2), jump

    def test_it_sees_the_line_only_with_history(self, unet):
        plain, dot = make_dot(unet), make_dot(unet, history=1)
        assert torch.equal(plain(*self.inputs()), plain(*self.inputs(trend=False)))
        assert (dot(*self.inputs()) - dot(*self.inputs(trend=False))).abs().max() > 1e-4

    def test_it_is_saved_and_files_of_before_load(self, unet, tmp_path):
        dot = make_dot(unet, history=1, extrapolation_cap=0.5)
        dot.save_pretrained(tmp_path / "new")
        loaded = MorseDot.from_pretrained(tmp_path / "new").bind(unet)
        assert (loaded.history, loaded.extrapolation_cap) == (1, 0.5)
        assert torch.equal(loaded(*self.inputs()), dot(*self.inputs()))
        plain = make_dot(unet)
        plain.save_pretrained(tmp_path / "old")
        path = tmp_path / "old" / "config.json"
        config = json.loads(path.read_text())
        assert config.pop("history") == 0 and config.pop("extrapolation_cap") == 1
        path.write_text(json.dumps(config))
        loaded = MorseDot.from_pretrained(tmp_path / "old").bind(unet)
        assert loaded.history == 0
        assert torch.equal(loaded(*self.inputs()), plain(*self.inputs()))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"history": 2}, "history must be 0 or 1"),
            ({"history": 1, "extrapolation_cap": -1.0}, "extrapolation_cap must be 0 or more"),
            ({"history": 1, "independent": True}, "choose one"),
        ],
    )
    def test_errors(self, unet, options, message):
        with pytest.raises(ValueError, match=message):
            MorseDot.from_dash(unet, 1, **options)


def config(tmp_path, **options):
    options = {"window_steps": 5, "block_out_channels": (16,), "lora_rank": 2, **options}
    return TrainDotConfig(
        pretrained_model_name_or_path="",
        train_data_dir=tmp_path,
        output_dir=tmp_path,
        num_down_blocks=1,
        **options,
    )


def test_a_plain_dot_is_widened(unet, tmp_path):
    plain = make_dot(unet)
    plain.save_pretrained(tmp_path)
    dot = build_dot(unet, config(tmp_path, history=1, extrapolation_cap=0.0, init_from=tmp_path))
    inputs = TestDot.inputs()
    assert_close(dot(*inputs), plain(*inputs), rtol=1e-5, atol=1e-6)
    pipe = loop_pipeline(unet, make("DDIM"))
    found = [sample(enable_morse(pipe, each.eval()), plan="DoDoo") for each in (plain, dot)]
    assert_close(*found, rtol=1e-4, atol=1e-5)
    dot.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"extrapolation_cap=0.0, .* give --extrapolation_cap 0.0"):
        build_dot(unet, config(tmp_path, history=1, init_from=tmp_path))
    with pytest.raises(ValueError, match=r"history=1, .* give --history 1"):
        build_dot(unet, config(tmp_path, init_from=tmp_path))
    options = {"history": 1, "extrapolation_cap": 0.0, "init_from": tmp_path}
    again = build_dot(unet, config(tmp_path, **options))
    assert torch.equal(again.conv_in.weight, dot.conv_in.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_steps": 1}, "window_steps is 1"),
        ({"on_policy": True}, "on_policy is True"),
        ({"independent": True}, "choose one"),
        ({"extrapolation_cap": -0.5}, "extrapolation_cap must be 0 or more"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, history=1, **options)


@pytest.mark.parametrize("num_points", [3, 4, 6, 9])
def test_triples(num_points):
    generator = torch.Generator().manual_seed(0)
    earlier, start, gap = draw_triples((4000, 2), num_points, 4, generator)
    segment = start - earlier
    alone = segment == 0
    assert 0.18 < alone.float().mean() < 0.22
    assert (gap >= 1).all() and (earlier >= 0).all() and (start + gap < num_points).all()
    assert gap[~alone].unique().tolist() == list(range(1, min(num_points - 2, 4) + 1))
    assert gap[alone].max() == min(num_points - 1, 4)
    # As long as the gap or longer, unless the window ends there.
    room = num_points - 1 - gap
    assert (alone | (segment >= torch.minimum(gap, room))).all() and segment.max() <= 5
    with pytest.raises(ValueError, match="windows have 2 points"):
        draw_triples((4,), 2, 4, generator)


class TestTraining:
    @staticmethod
    def frozen(**options):
        schedule = NoiseSchedule.variance_preserving(ALPHAS)

        def linear(sample, timestep, return_dict):
            here = half_log_snr(schedule.rates(timestep, sample))
            return ((here * torch.linspace(-0.2, 0.2, 4)).expand_as(sample),)

        return FrozenDash(linear, schedule, "epsilon", **options)

    @staticmethod
    def window(dash, num_points=6):
        clean = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(1)) / 2
        generator = torch.Generator().manual_seed(2)
        return fresh_window(dash, clean, generator, num_points, "plans")

    @staticmethod
    def pairs(dash, window):
        return pick_pairs(dash, window, 4, torch.Generator().manual_seed(3), first=False)

    def test_pairs_of_a_line_need_no_residual(self):
        dash = self.frozen(history=1, extrapolation_cap=20.0)
        window = self.window(dash)
        pairs = self.pairs(dash, window)
        alone = pairs.jump.trend.flatten(1).abs().amax(1) == 0
        wrong = (pairs.base - pairs.target).flatten(1).abs().amax(1)
        assert 0.1 < alone.float().mean() < 0.3
        assert wrong[~alone].max() < 2e-2 < wrong[alone].max()  # outputs are in half precision
        assert torch.equal(pairs.base[alone], pairs.reused[alone])
        # The same windows without history give the pairs of before.
        plain = self.pairs(self.frozen(), window)
        assert plain.jump.trend is None and plain.base is plain.reused

    def test_ratios_compare_with_reuse_without_history(self):
        dash = self.frozen(history=1, extrapolation_cap=20.0)
        batches = [self.pairs(dash, self.window(dash))]
        with_line = residual_ratios(zero_dot(), batches, 1000)
        assert with_line["residual_ratio"] == with_line["extrapolation_ratio"] < 0.5
        dash = replace(dash, extrapolation_cap=0.0)
        seen_only = residual_ratios(zero_dot(), [self.pairs(dash, self.window(dash))], 1000)
        assert seen_only["residual_ratio"] == seen_only["extrapolation_ratio"] == 1
        plain = self.frozen()
        assert "extrapolation_ratio" not in residual_ratios(
            zero_dot(), [self.pairs(plain, self.window(plain))], 1000
        )

    def test_validation_pictures_follow_the_line(self):
        dash = self.frozen(history=1, extrapolation_cap=20.0)
        errors = {}
        for history in (0, 1):
            rows = sample_rows(replace(dash, history=history), zero_dot(), (2, 1, 4, 4))
            errors[history] = float((rows[1] - rows[0]).abs().max())
        assert errors[1] < 0.9 * errors[0]  # the first segment is reuse in both

    def test_graphs_take_the_line_along(self, unet):
        dot = make_dot(unet, history=1)
        dash = FrozenDash(unet, NoiseSchedule.variance_preserving(ALPHAS), "epsilon", history=1)
        clean = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) / 2
        window = fresh_window(dash, clean, torch.Generator().manual_seed(2), 4, "plans")
        pairs = self.pairs(dash, window)
        with torch.no_grad():
            expected = dot(pairs.sample, pairs.timestep, pairs.jump)
            assert torch.equal(_OnPairs(dot, ())(*_tensors(pairs)), expected)
            without = dot(pairs.sample, pairs.timestep, replace(pairs.jump, trend=None))
        assert not torch.equal(without, expected)


def test_a_cache_made_without_history_trains_a_dot_with_it(build_unet, tmp_path):
    data, base = tmp_path / "data", tmp_path / "base"
    data.mkdir()
    write_parts(data, 8, 4)
    save_pixels(base, build_unet(channels=(8, 8), sample_size=8))
    plain = TrainDotConfig(
        pretrained_model_name_or_path=str(base),
        train_data_dir=data,
        output_dir=tmp_path / "plain",
        cache_dir=tmp_path / "cache",
        cache_pairs=8,
        window_steps=5,
        timestep_sampling="plans",
        train_batch_size=4,
        max_train_steps=2,
        lr_warmup_steps=0,
        learning_rate=1e-2,
        validation_images=4,
        validation_steps=0,
        num_down_blocks=1,
        block_out_channels=(4,),
        lora_rank=2,
    )
    started = train_dot(plain)
    shard = tmp_path / "cache" / "windows-00000.safetensors"
    made = shard.stat().st_mtime_ns
    folder = train_dot(replace(plain, output_dir=tmp_path / "run", history=1, init_from=started))
    assert shard.stat().st_mtime_ns == made
    dot, before = (MorseDot.from_pretrained(path) for path in (folder, started))
    assert dot.history == 1 and dot.conv_in.in_channels == before.conv_in.in_channels + 1
    assert dot.conv_in.weight[:, 3:].abs().max() > 0  # learnt: it started at zero
    ratios = json.loads(next((folder / "validation").glob("*.json")).read_text())
    assert ratios["extrapolation_ratio"] > 0 and ratios["residual_ratio"] > 0
