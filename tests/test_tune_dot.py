"""Tuning a Dot through whole runs: gradients, targets, the command, and what it saves."""

import json
import re
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from tiny_text import dit_pipeline, text_pipeline
from train_runs import assert_same_run, weights

from morse import MorseDot, MorsePipeline
from morse.cli import parse_config
from morse.dot.mixture import GaussianMixture
from morse.evaluation.bench.benchmark import BenchmarkConfig
from morse.evaluation.bench.loading import load_bare, with_solver
from morse.evaluation.bench.solvers import make_solver
from morse.evaluation.conditions import UNCONDITIONAL, make_conditions
from morse.evaluation.metrics import psnr
from morse.evaluation.planning.command import PlanConfig
from morse.saved_plans import SavedPlan
from morse.training.run import TrainingRun
from morse.tuning.blend import blend, weights_before
from morse.tuning.command import (
    TuneDotConfig,
    _target_runs,
    runs_to_tune,
    tune_dot,
)
from morse.tuning.loading import load_to_tune
from morse.tuning.loss import run_loss
from morse.tuning.sampler import PlannedRun, SampledRun, enable_with_gradients
from morse.tuning.targets import SHARD_SAMPLES, _describe, describe_encoders
from morse.tuning.validation import worse_plans

# Begun where there is little noise, for a random Dash takes samples far away.
ROWS = [[400.0, 0.4, 0.0, 0.0], [300.0, 0.5, 0.2, 0.3], [200.0, 0.5, 0.1, 0.1], [90.0, 1, 0, 0]]
PLANS = (
    SavedPlan(2, "gDoo", {"fitted_steps": ROWS}, psnr=20.0, uniform_psnr=19.0, num_images=8),
    SavedPlan(4, "DDDD", {"fitted_steps": ROWS}, psnr=30.0, uniform_psnr=29.0, num_images=8),
)
OPTIONS = """--lsd 2 3 --target_lsd 4 --num_images 6 --validation_images 3 --train_batch_size 2
    --max_train_steps 5 --lr_warmup_steps 1 --learning_rate 1e-3 --checkpointing_steps 2
    --logging_steps 2 --validation_steps 2 --seed 3"""
BFLOAT16 = ("--dtype", "bfloat16", "--mixed_precision", "bf16")
FLOAT16 = ("--dtype", "float16", "--mixed_precision", "fp16")
HALF = [BFLOAT16, pytest.param(FLOAT16, marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def folder(build_unet, tmp_path_factory):
    """A pipeline whose Dot has a mixture and plans for leapfrog."""
    unet = build_unet(channels=(8, 8), sample_size=8)
    pipe = DDPMPipeline(unet, DDPMScheduler(clip_sample=False, timestep_spacing="trailing"))
    torch.manual_seed(1)
    dot = MorseDot.from_dash(unet, num_down_blocks=1, block_out_channels=(8,), lora_rank=2)
    torch.nn.init.normal_(dot.conv_out.weight, std=0.05)
    dot.set_mixture(GaussianMixture.fit(torch.randn(32, 1, 8, 8), num_components=2, rank=2))
    plans = {"LeapfrogScheduler": [plan.to_config() for plan in PLANS]}
    dot.register_to_config(plans=plans, speed_ratio=4.0)
    path = tmp_path_factory.mktemp("tune") / "pipeline"
    MorsePipeline.from_pipe(pipe, dot).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    pipe = text_pipeline()
    torch.manual_seed(1)
    dot = MorseDot.from_dash(pipe.unet, num_down_blocks=1, block_out_channels=(8,), lora_rank=2)
    torch.nn.init.normal_(dot.conv_out.weight, std=0.05)
    dot.register_to_config(speed_ratio=4.0)
    path = tmp_path_factory.mktemp("text") / "pipeline"
    MorsePipeline.from_pipe(pipe, dot).save_pretrained(path)
    return path


@pytest.fixture
def dtypes(monkeypatch):
    """Those of the networks while a Dot is tuned; several precisions may follow each other."""
    found, one_pass = {}, TrainingRun._forward_backward

    def look(run, batch, micro_step):
        loss = one_pass(run, batch, micro_step)
        for name, part in run.model.pipe.components.items():
            if isinstance(part, torch.nn.Module):
                found[name] = {parameter.dtype for parameter in part.parameters()}
        assert all(parameter.grad is None for parameter in run.model.pipe.unet.parameters())
        return loss

    monkeypatch.setattr(TrainingRun, "_forward_backward", look)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield found
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(folder, output_dir, *options):
    return ["--pretrained_model_name_or_path", str(folder), "--output_dir", str(output_dir),
            *OPTIONS.split(), *options]  # fmt: skip


@pytest.fixture(scope="module")
def tune(folder, tmp_path_factory):
    def run(*options):
        output_dir = tmp_path_factory.mktemp("runs") / "run"
        return tune_dot(parse_config(TuneDotConfig, arguments(folder, output_dir, *options)))

    return run


@pytest.fixture(scope="module")
def whole_run(tune):
    return tune()


def generators(numbers):
    """Of the noise of these samples, by the seed of `OPTIONS`."""
    return [torch.Generator().manual_seed(3 + number) for number in numbers]


@pytest.fixture
def sampled(folder):
    bare, dot = load_bare(str(folder), None, "cpu")
    pipe = enable_with_gradients(with_solver(bare, "leapfrog"), dot)
    runs = [PlannedRun(pipe.scheduler, plan, f"{plan.lsd} LSD") for plan in PLANS]
    return SampledRun(pipe, runs, UNCONDITIONAL, seed=3)


class TestSampledRun:
    """A run with gradients is the pipeline's own."""

    @pytest.mark.parametrize("plan", [0, 1])
    def test_samples_are_those_of_the_pipeline(self, sampled, folder, plan):
        pipe = MorsePipeline.from_pretrained(folder, scheduler="leapfrog", merge_lora=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, **PLANS[plan].scheduler
        )
        images = pipe(
            batch_size=2, generator=generators((5, 1)), plan=PLANS[plan].plan, output_type="np"
        ).images
        expected = torch.from_numpy(images).permute(0, 3, 1, 2)
        torch.testing.assert_close(sampled(torch.tensor([5, 1]), plan).detach(), expected)

    def test_gradients_are_those_of_finite_differences(self, sampled):
        sampled.double()
        sampled.pipe.unet.double()
        numbers, aim = torch.tensor([0, 4]), torch.full((2, 1, 1, 8, 8), 0.4)
        loss = run_loss([0])
        value = loss(sampled, (numbers, aim), torch.Generator().manual_seed(0))
        value.backward()
        # conv_out reaches the end through Dash's later layers' inputs too; the LoRA through all.
        lora = next(p for n, p in sampled.dot.named_parameters() if "lora_B" in n)
        for parameter in (sampled.dot.conv_out.weight, lora):
            direction = torch.sign(parameter.grad) + (parameter.grad == 0)
            slope = float((parameter.grad * direction).sum())
            values = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    parameter += step * direction
                moved = loss(sampled, (numbers, aim), torch.Generator().manual_seed(0))
                values.append(float(moved.detach()))
                with torch.no_grad():
                    parameter -= step * direction
            measured = (values[0] - values[1]) / 2e-3
            assert slope != 0 and measured == pytest.approx(slope, rel=2e-2)

    def test_only_dot_gets_gradients(self, sampled):
        sampled(torch.tensor([0]), 0).sum().backward()
        assert all(p.grad is None for p in sampled.pipe.unet.parameters())
        names = {n.split(".")[0] for n, p in sampled.dot.named_parameters() if p.grad is not None}
        assert {"conv_in", "down_blocks", "up_blocks", "jump_time", "conv_out"} <= names

    def test_checkpointed_gradients_are_the_same(self, sampled):
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                sampled.pipe.unet.enable_gradient_checkpointing()
            sampled.zero_grad()
            sampled(torch.tensor([0, 1]), 0).square().sum().backward()
            found.append(sampled.dot.conv_in.weight.grad.clone())
        torch.testing.assert_close(found[0], found[1])


def test_the_result_keeps_plans_and_mixture_and_forgets_their_figures(whole_run, folder):
    dot, before = MorseDot.from_pretrained(whole_run), MorseDot.from_pretrained(folder / "dot")
    tuned, all_dash = dot.config.plans["LeapfrogScheduler"]
    assert (tuned["plan"], tuned["scheduler"]["fitted_steps"]) == ("gDoo", ROWS)
    assert tuned["psnr"] is tuned["uniform_psnr"] is tuned["num_images"] is None
    assert all_dash == PLANS[1].to_config()
    for name, value in before.mixture.state_dict().items():
        assert torch.equal(value, dot.mixture.state_dict()[name])
    assert not torch.equal(dot.conv_out.weight, before.conv_out.weight)
    assert dot.config.dash_fingerprint == before.config.dash_fingerprint
    pipe = MorsePipeline.from_pretrained(folder, dot=dot, scheduler="leapfrog")
    pipe.set_progress_bar_config(disable=True)
    pipe(lsd=2)
    assert str(pipe.last_run.plan) == "gDoo" and pipe.last_run.num_dot == 2


def test_the_report_has_each_plan_with_dot_before_and_after(whole_run):
    facts = json.loads((whole_run / "tuning.json").read_text())
    by_step = facts["decibels_by_step"]
    assert list(by_step) == ["0", "2", "4", "5"]
    assert all(set(values) == {"leapfrog, 2 LSD", "leapfrog, 3 LSD"} for values in by_step.values())
    assert facts["command"] and facts["environment"]["torch"]


@pytest.mark.parametrize("precision", [(), *HALF], ids=lambda each: each[1] if each else "full")
def test_tuning_lowers_the_error_of_whole_runs(tune, precision, dtypes):
    found = tune("--max_train_steps", "20", "--learning_rate", "1e-2", "--num_images", "32",
                 "--train_batch_size", "8", "--ema_max_decay", "0.5", "--lsd", "2",
                 "--validation_steps", "0", "--checkpointing_steps", "20", *precision)  # fmt: skip
    of_dash = getattr(torch, precision[1]) if precision else torch.float32
    assert dtypes == {"unet": {of_dash}, "dot": {torch.float32}}
    assert {value.dtype for value in weights(found).values()} == {torch.float32}
    by_step = json.loads((found / "tuning.json").read_text())["decibels_by_step"]
    assert by_step["20"]["leapfrog, 2 LSD"] > by_step["0"]["leapfrog, 2 LSD"] + 0.5


def test_a_blend_is_between_before_and_after(tune, whole_run, folder):
    found = tune("--blend", "0.25", "--cache_dir", str(whole_run / "targets"))
    before, after = (MorseDot.from_pretrained(p).state_dict() for p in (folder / "dot", whole_run))
    for name, value in MorseDot.from_pretrained(found).state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])
    facts, whole = (json.loads((p / "tuning.json").read_text()) for p in (found, whole_run))
    assert facts["decibels_by_step"] == whole["decibels_by_step"]
    assert whole["decibels_as_saved"] == whole["decibels_by_step"]["5"]
    assert facts["decibels_as_saved"] != whole["decibels_as_saved"]


def test_a_blend_counts_from_another_dot(whole_run, folder, build_unet, tmp_path):
    tuned, first = MorseDot.from_pretrained(whole_run), MorseDot.from_pretrained(folder / "dot")
    before = weights_before(tuned, str(folder / "dot"))
    blend(tuned, before, 0.0)
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    mixture = GaussianMixture(2, 1, (1, 8, 8))
    means = torch.rand_like(mixture.means)
    mixture.means.copy_(means)
    tuned.set_mixture(mixture)
    blend(tuned, weights_before(tuned, str(folder / "dot")), 0.5)
    assert torch.equal(tuned.mixture.means, means)
    tuned.register_to_config(sparse=True)
    with torch.no_grad():
        tuned.conv_in.weight[0] = 0
    blend(tuned, before, 0.5)
    assert not tuned.conv_in.weight[0].any() and tuned.conv_in.weight[1].all()
    wider = MorseDot.from_dash(
        build_unet(channels=(8, 8), sample_size=8),
        num_down_blocks=1, block_out_channels=(16,), lora_rank=2,
    )  # fmt: skip
    wider.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"blend_from is .*, whose network differs .* conv_in"):
        weights_before(tuned, str(tmp_path))


def test_a_pruned_dot_stays_so(tune, whole_run, folder, tmp_path):
    dot = MorseDot.from_pretrained(folder / "dot")
    with torch.no_grad():
        for weight in (parameter for parameter in dot.parameters() if parameter.ndim > 1):
            weight.masked_fill_(weight.abs() < weight.abs().median(), 0)
    dot.register_to_config(sparse=True)
    dot.save_pretrained(tmp_path)
    found = tune("--dot", str(tmp_path), "--cache_dir", str(whole_run / "targets"),
                 "--max_train_steps", "2", "--validation_steps", "0")  # fmt: skip
    before, after = (MorseDot.from_pretrained(path) for path in (tmp_path, found))
    assert after.config.sparse and not torch.equal(before.conv_in.weight, after.conv_in.weight)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        if old.ndim > 1 and not name.startswith("conv_out"):
            assert torch.equal(new == 0, old == 0), name


def test_features_are_tuned_on_too(tune, whole_run):
    found = tune("--feature_networks", "torch.nn:Flatten", "--validation_steps", "0",
                 "--cache_dir", str(whole_run / "targets"))  # fmt: skip
    assert any(
        not torch.equal(weights(found)[name], value) for name, value in weights(whole_run).items()
    )


def test_n_is_given_or_measured_with_the_lora_merged(tune, folder, tmp_path, monkeypatch):
    merged = []

    def measure(pipe, **kwargs):
        merged.append((pipe.dot.is_merged, kwargs))
        return SimpleNamespace(speed_ratio=4.0)

    monkeypatch.setattr("morse.calls.MorseCalls.measure_speed_ratio", measure)
    dot = MorseDot.from_pretrained(folder / "dot")
    dot.register_to_config(speed_ratio=None)
    dot.save_pretrained(tmp_path)
    short = ("--dot", str(tmp_path), "--solver", "ddim", "--max_train_steps", "1", "--lsd", "3",
             "--num_images", "2", "--validation_images", "1", "--target_lsd", "2")  # fmt: skip
    given = tune("--dot", str(folder / "dot"), *short[2:], "--speed_ratio", "5")
    assert merged == []
    assert MorseDot.from_pretrained(given).config.speed_ratio == 5.0  # where that Dot's had 4
    found = tune(*short)
    assert merged == [(True, {"batch_size": 2})]
    assert MorseDot.from_pretrained(found).config.speed_ratio == 4.0  # of the plans tuned for


def test_the_target_is_as_long_as_its_budget(sampled):
    fitted, longer, mixed = (_target_runs(sampled.pipe, lsd, (None,))[0].plan for lsd in (4, 6, 2))
    assert (fitted.plan, set(fitted.scheduler)) == ("DDDD", {"fitted_steps"})
    assert (longer.plan, longer.scheduler) == ("DDDDDD", {})  # not the four that were fitted
    assert mixed.plan == "DD"


def stopped_at(step):
    one_pass = TrainingRun._forward_backward

    def interrupt(run, batch, micro_step):
        if run.step == step:
            raise KeyboardInterrupt
        return one_pass(run, batch, micro_step)

    return interrupt


def test_resumed_it_keeps_n_and_what_was_found(folder, whole_run, tmp_path, monkeypatch, capsys):
    ratios = iter((4.0, 1.5))

    def measure(pipe, **kwargs):
        return SimpleNamespace(speed_ratio=next(ratios))

    monkeypatch.setattr("morse.calls.MorseCalls.measure_speed_ratio", measure)
    dot = MorseDot.from_pretrained(folder / "dot")
    dot.register_to_config(speed_ratio=None)
    dot.save_pretrained(tmp_path / "dot")
    given = arguments(folder, tmp_path / "run", "--dot", str(tmp_path / "dot"))
    config = parse_config(TuneDotConfig, given)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingRun, "_forward_backward", stopped_at(3))
        tune_dot(config)
    resumed = tune_dot(replace(config, resume_from_checkpoint="latest"))
    facts, whole = (json.loads((p / "tuning.json").read_text()) for p in (resumed, whole_run))
    assert facts["decibels_by_step"] == whole["decibels_by_step"]
    assert next(ratios) == 1.5 and "warning" not in capsys.readouterr().out
    torch.testing.assert_close(weights(resumed), weights(whole_run), rtol=0, atol=0)


def test_resumed_in_half_precision_it_is_the_same(folder, dtypes, tmp_path, monkeypatch):
    options = ("--max_train_steps", "3", "--checkpointing_steps", "1", "--validation_steps", "0",
               "--lsd", "2", "--cache_dir", str(tmp_path / "targets"), *BFLOAT16)  # fmt: skip
    config = parse_config(TuneDotConfig, arguments(folder, tmp_path / "whole", *options))
    whole, again = tune_dot(config), replace(config, output_dir=tmp_path / "again")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingRun, "_forward_backward", stopped_at(1))
        tune_dot(again)
    resumed = tune_dot(replace(again, resume_from_checkpoint="latest"))
    assert_same_run(resumed, whole, 3)
    facts, expected = (json.loads((p / "tuning.json").read_text()) for p in (resumed, whole))
    assert facts["decibels_by_step"] == expected["decibels_by_step"]
    before = weights(folder / "dot")["mixture.means"]
    torch.testing.assert_close(weights(whole)["mixture.means"], before, rtol=0, atol=0)
    assert json.loads((whole / "config.json").read_text())["_class_name"] == "MorseDot"
    with pytest.raises(ValueError, match='dtype was "bfloat16" and is "float32"'):
        tune_dot(replace(config, output_dir=tmp_path / "full", dtype="float32"))


def test_resumed_with_other_plans_it_says_so(folder, whole_run, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    config = parse_config(TuneDotConfig, arguments(folder, tmp_path / "run", "--lsd", "3"))
    tune_dot(replace(config, resume_from_checkpoint="latest"))
    shown = capsys.readouterr().out
    assert "warning: lsd was [2.0, 3.0] and is now [3.0]" in shown
    assert "warning: plans was {'leapfrog, 2 LSD': 'gDoo'," in shown
    by_step = json.loads((tmp_path / "run/tuning.json").read_text())["decibels_by_step"]
    assert [*by_step] == ["5"] and [*by_step["5"]] == ["leapfrog, 3 LSD"]


def test_targets_are_made_once_and_are_the_runs_of_dash(whole_run, tune, folder):
    pipe = MorsePipeline.from_pretrained(folder, scheduler="leapfrog")
    pipe.set_progress_bar_config(disable=True)
    cache = whole_run / "targets"
    samples = load_file(cache / "targets-00000.safetensors")["samples"]
    assert samples.shape == (9, 1, 1, 8, 8) and SHARD_SAMPLES >= 9
    images = pipe(lsd=4, generator=[torch.Generator().manual_seed(3 + 7)], output_type="np").images
    torch.testing.assert_close(samples[7, 0], torch.from_numpy(images[0]).permute(2, 0, 1))
    stamp = (cache / "targets-00000.safetensors").stat().st_mtime_ns
    again = tune("--cache_dir", str(cache))
    assert (cache / "targets-00000.safetensors").stat().st_mtime_ns == stamp
    torch.testing.assert_close(weights(again), weights(whole_run), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"settings \(seed was 3 and is 4\)"):
        tune("--cache_dir", str(cache), "--seed", "4")


@pytest.mark.parametrize("precision", HALF, ids=lambda each: each[1])
def test_a_text_pipeline_is_tuned_in_half_precision(text_folder, precision, dtypes, tmp_path):
    # In float16 updates are left out until their scale is found.
    steps = "2" if precision is BFLOAT16 else "20"
    options = ("--solver", "dpmsolver++", "--prompts", "a", "b", "--guidance_scale", "3",
               "--max_train_steps", steps, "--validation_steps", "0", "--lsd", "2",
               "--feature_networks", "torch.nn:Flatten", "--gradient_checkpointing")  # fmt: skip
    given = arguments(text_folder, tmp_path / "run", *options, *precision)
    config, half = parse_config(TuneDotConfig, given), getattr(torch, precision[1])
    tune_dot(config)
    assert dtypes == {"unet": {half}, "vae": {torch.float32}, "dot": {torch.float32}}
    before, after = weights(text_folder / "dot"), weights(tmp_path / "run")
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert {"conv_out.weight", "conv_in.weight"} < set(changed)
    bare, dot = load_to_tune(config, torch.device("cuda" if half is torch.float16 else "cpu"))
    assert bare.text_encoder.dtype == half
    torch.testing.assert_close(dot.state_dict(), before, rtol=0, atol=0)  # never was rounded


def test_float16_needs_a_gpu(folder, tmp_path):
    config = parse_config(TuneDotConfig, arguments(folder, tmp_path / "run", *FLOAT16))
    with pytest.raises(ValueError, match="a CPU does not train; give --dtype bfloat16"):
        load_to_tune(config, torch.device("cpu"))


def test_a_text_pipeline_is_tuned_on_its_guided_latents_or_images(text_folder, tmp_path):
    options = ("--solver", "dpmsolver++", "ddim", "--prompts", "a", "b", "--guidance_scale", "3",
               "--max_train_steps", "2", "--validation_steps", "0")  # fmt: skip
    config = parse_config(TuneDotConfig, arguments(text_folder, tmp_path / "run", *options))
    tune_dot(config)
    samples = load_file(tmp_path / "run/targets/targets-00000.safetensors")["samples"]
    assert samples.shape == (9, 1, 4, 4, 4)
    assert "text_encoders" in json.loads((tmp_path / "run/targets/cache.json").read_text())
    plain = StableDiffusionPipeline.from_pretrained(text_folder, use_safetensors=True, dot=None)
    plain.set_progress_bar_config(disable=True)
    plain = with_solver(plain, "dpmsolver++")
    latents = plain("b", guidance_scale=3.0, num_inference_steps=4, output_type="latent",
                    generator=torch.Generator().manual_seed(3 + 1)).images  # fmt: skip
    torch.testing.assert_close(samples[1], latents, rtol=1e-4, atol=1e-4)
    decoded = {"feature_networks": ("torch.nn:Flatten",), "gradient_checkpointing": True,
               "solver": ("dpmsolver++",), "lsd": (2.0,)}  # fmt: skip
    tune_dot(replace(config, output_dir=tmp_path / "decoded", **decoded))
    images = load_file(tmp_path / "decoded/targets/targets-00000.safetensors")["samples"]
    shown = plain("b", guidance_scale=3.0, num_inference_steps=4, output_type="np",
                  generator=torch.Generator().manual_seed(3 + 1)).images  # fmt: skip
    torch.testing.assert_close(images[1, 0], torch.from_numpy(shown[0]).permute(2, 0, 1))
    before = weights(text_folder / "dot")
    for run in ("run", "decoded"):
        after = weights(tmp_path / run)
        assert any(not torch.equal(after[name], value) for name, value in before.items())
    facts = json.loads((tmp_path / "run/tuning.json").read_text())
    assert set(facts["decibels_by_step"]["0"]) == {
        f"{solver}, {lsd} LSD" for solver in ("dpmsolver++", "ddim") for lsd in (2, 3)
    }


def test_each_guidance_scale_has_its_targets(text_folder, tmp_path):
    options = ("--solver", "dpmsolver++", "--prompts", "a", "b", "--guidance_scale", "3", "1",
               "--max_train_steps", "1")  # fmt: skip
    config = parse_config(TuneDotConfig, arguments(text_folder, tmp_path / "run", *options))
    tune_dot(config)
    samples = load_file(tmp_path / "run/targets/targets-00000.safetensors")["samples"]
    assert samples.shape == (9, 2, 4, 4, 4)
    pipe = MorsePipeline.from_pretrained(text_folder, scheduler="dpmsolver++", merge_lora=False)
    pipe.set_progress_bar_config(disable=True)
    expected, numbers, wanted = {}, range(6, 9), {}
    for index, scale in enumerate((3.0, 1.0)):
        call = {"prompt": ["ab"[number % 2] for number in numbers], "output_type": "latent",
                "guidance_scale": scale}  # fmt: skip
        wanted[scale] = pipe(plan="DDDD", generator=generators(numbers), **call).images
        torch.testing.assert_close(samples[6:, index], wanted[scale], rtol=1e-4, atol=1e-4)
        for lsd in (2, 3):
            found = pipe(lsd=lsd, generator=generators(numbers), **call).images
            name = f"dpmsolver++, {lsd} LSD, guidance {scale:g}"
            expected[name] = float(psnr(found, wanted[scale]).mean())
    assert not torch.allclose(wanted[3.0], wanted[1.0], atol=1e-2)
    facts = json.loads((tmp_path / "run/tuning.json").read_text())
    assert facts["decibels_by_step"]["0"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("option", "more"),
    [("dot", ()), ("blend_from", ("--blend", "0.5")), ("pretrained_model_name_or_path", ())],
)
def test_a_place_without_a_model_is_told_with_its_option(tune, tmp_path, option, more):
    for place, message in ((tmp_path, "cannot be loaded: "), (tmp_path / "no", "does not exist")):
        start = re.escape(f"{option} is {str(place)!r}, which ")
        with pytest.raises(OSError, match=f"^{start}{message}"):
            tune(f"--{option}", str(place), *more)


def test_what_became_worse_is_named():
    found = {0: {"5 LSD": 30.0, "8 LSD": 33.0}, 9: {"5 LSD": 29.0, "8 LSD": 34.0}}
    assert worse_plans(found[0], found[9]) == ["5 LSD"]
    assert worse_plans(found[0], found[0]) == []


def test_plans_without_dot_are_told_and_alone_refused(sampled):
    schedulers, told = {"leapfrog": sampled.pipe.scheduler}, []
    with pytest.raises(ValueError, match=r"lsd is \(4,\), but at N = 4 the plans of leapfrog"):
        runs_to_tune(sampled.pipe, schedulers, (4,))
    runs = runs_to_tune(sampled.pipe, schedulers, (2, 4), tell=told.append)
    assert [run.name for run in runs] == ["leapfrog, 2 LSD"]
    assert told == ["not tuned for, as without Dot at N = 4: leapfrog, 4 LSD"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--solver", "dmp"), "solver 'dmp' is unknown"),
        (("--lsd", "0.5"), "lsd is (0.5,)"),
        (("--num_images", "0"), "num_images is 0"),
        (("--target_lsd", "0"), "target_lsd is 0"),
        (("--compile",), "compile is True"),
        (("--speed_ratio", "-1"), "speed_ratio is -1"),
        (("--blend", "0"), "blend is 0.0"),
        (("--guidance_scale", "3", "3"), "guidance_scale is (3.0, 3.0)"),
        (("--lsd", "4", "5", "4"), "lsd is (4.0, 5.0, 4.0)"),
        (("--blend_from", "x"), "blend_from is 'x'; it must be left out where --blend is 1"),
        (("--train_batch_size", "0"), "train_batch_size is 0"),
        (("--dtype", "float16"), "mixed_precision no, but Dot's own float32 layers share Dash's"),
    ],
)
def test_settings_are_checked(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        parse_config(TuneDotConfig, arguments("fashion-mnist", tmp_path, *options))
    assert message in capsys.readouterr().err


def test_noises_to_train_on_are_not_those_that_are_evaluated():
    tuning = TuneDotConfig(pretrained_model_name_or_path="p", output_dir=Path("o"))
    planning = PlanConfig(output_dir=Path("o"))
    seeds = {
        "tune": range(tuning.seed, tuning.seed + tuning.num_images + tuning.validation_images),
        "plan": range(planning.seed, planning.seed + 100_000),
        "bench": range(BenchmarkConfig().seeds[0], 100_000),
    }
    for one, other in combinations(seeds.values(), 2):
        assert one.stop <= other.start or other.stop <= one.start


def test_heun_gets_runs_that_it_can_make(folder):
    bare, dot = load_bare(str(folder), None, "cpu")
    pipe = enable_with_gradients(with_solver(bare, "heun"), dot)
    pipe.speed_ratio = 4.0
    plans = [_target_runs(pipe, 4, (None,))[0].plan, pipe.plan_for(2), pipe.plan_for(3)]
    assert [len(plan.plan) % 2 for plan in plans] == [1, 1, 1]
    for plan in plans:
        with torch.no_grad():
            pipe(plan=plan.plan, generator=torch.Generator().manual_seed(0))


def test_targets_of_another_solver_are_others(folder):
    bare, dot = load_bare(str(folder), None, "cpu")
    pipe = enable_with_gradients(with_solver(bare, "dpmsolver++"), dot)
    config = TuneDotConfig(pretrained_model_name_or_path="p", output_dir=Path("o"))
    told = []
    for solver in ("dpmsolver++", "dpmsolver++1"):
        run = PlannedRun(make_solver(solver, bare.scheduler.config), SavedPlan(4, "DDDD"), "")
        told.append(_describe(SampledRun(pipe, [run], UNCONDITIONAL, 0), config))
    assert told[0] != told[1]


@pytest.mark.parametrize("what", ["vae", "text_encoder"])
@pytest.mark.parametrize("decode", [False, True])
def test_targets_of_other_networks_are_others(what, decode):
    pipe = text_pipeline()
    config = TuneDotConfig(pretrained_model_name_or_path="p", output_dir=Path("o"))
    run = PlannedRun(pipe.scheduler, SavedPlan(4, "DDDD"), "")
    pipe.dot = None
    told = []
    for _ in range(2):
        encoders = describe_encoders(pipe, make_conditions(pipe, ("a",)))
        sampled = SampledRun(pipe, [run], UNCONDITIONAL, 0, decode)
        told.append(_describe(sampled, config) | encoders)
        for parameter in getattr(pipe, what).requires_grad_(False).parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    # Latents are as they are, whatever decodes them.
    assert (told[0] == told[1]) == (what == "vae" and not decode)
    before = _describe(sampled, config)
    pipe.vae.register_to_config(scaling_factor=0.7)
    assert (_describe(sampled, config) == before) == (not decode)
    assert describe_encoders(pipe, UNCONDITIONAL) == {}


def test_a_dit_is_tuned_through_its_images():
    pipe = dit_pipeline()
    dot = MorseDot.from_dash(pipe.transformer, 1, (8,), lora_rank=2)
    pipe = enable_with_gradients(pipe, dot)
    run = PlannedRun(pipe.scheduler, SavedPlan(2, "Do"), "", guidance_scale=1.0)
    conditions = make_conditions(pipe, (), ("0",))
    images = SampledRun(pipe, [run], conditions, 0)(torch.arange(2), 0)
    images.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in dot.parameters())
