"""`morse plan`: how it loads, encodes prompts and keeps what an earlier search has found."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from evaluation_fixtures import QUICK_PLAN
from safetensors.torch import save_file
from tiny_pipelines import xl_unet
from tiny_text import (
    dit_pipeline,
    flux_pipeline,
    sd3_pipeline,
    text_pipeline,
    xl_pipeline,
)

from morse import FlowMatchLeapfrogScheduler, MorseDot, MorsePipeline
from morse.evaluation.bench.loading import decode_in_full
from morse.evaluation.conditions import Conditions, encode_once
from morse.evaluation.planning import best_fit, budget, command
from morse.evaluation.planning.command import PlanConfig, run_plan
from morse.evaluation.planning.search import Candidate, Found

PROMPTS = ("cat", "dog", "a boat")


@pytest.mark.parametrize(
    "build",
    [text_pipeline, lambda: xl_pipeline(xl_unet()), sd3_pipeline, flux_pipeline],
    ids=["sd", "xl", "sd3", "flux"],
)
def test_prompts_encoded_once_give_the_same_images(build):
    pipe = MorsePipeline.from_pipe(build())
    wanted = Conditions(prompts=PROMPTS, guidance_scale=4.0)

    def sample(conditions):
        seeded = torch.Generator().manual_seed(0)
        given = conditions.arguments(range(4))
        return pipe(num_inference_steps=2, output_type="np", generator=seeded, **given).images

    expected = sample(wanted)
    encoded = encode_once([pipe], wanted)
    assert encoded.prompts == () and encoded.guidance_scale == 4.0
    assert {len(rows) for rows in encoded.embeds.values()} == {3}
    assert not any("text_encoder" in name and part for name, part in pipe.components.items())
    torch.testing.assert_close(
        torch.from_numpy(sample(encoded)), torch.from_numpy(expected), rtol=0, atol=1e-5
    )


def test_what_has_no_prompts_stays_as_it_is():
    labels = Conditions(class_labels=(1, 2))
    assert encode_once([dit_pipeline()], labels) is labels
    pipe, embedded = text_pipeline(), Conditions(embeds={"prompt_embeds": torch.zeros(1, 2, 8)})
    assert encode_once([pipe], embedded) is embedded and pipe.text_encoder is not None


def test_large_images_are_decoded_one_by_one():
    vae = text_pipeline().vae
    decode_in_full(vae)
    vae.decode(torch.zeros(2, 4, 32, 32))
    assert not vae.use_slicing
    assert vae.decode(torch.zeros(2, 4, 64, 64)).sample.shape == (2, 1, 128, 128)
    assert vae.use_slicing


class TestSearch:
    """Searches whose runs are left out."""

    @pytest.fixture(autouse=True)
    def nothing_sampled(self, monkeypatch):
        plan = Candidate("DoD")
        monkeypatch.setattr(budget, "search_plan", lambda *args, **kwargs: Found(plan, 2, plan, 1))
        monkeypatch.setattr(command, "follow", lambda *args: None)

    @pytest.fixture
    def folder(self, tmp_path):
        pipe = text_pipeline()
        torch.manual_seed(1)
        dot = MorseDot.from_dash(pipe.unet, num_down_blocks=1, block_out_channels=(8,), lora_rank=2)
        MorsePipeline.from_pipe(pipe, dot).save_pretrained(tmp_path / "pipeline")
        return str(tmp_path / "pipeline")

    @pytest.fixture
    def run(self, folder, tmp_path):
        def run_with(**options):
            settings = {**QUICK_PLAN, "prompts": PROMPTS, "solver": ("ddim",), "device": "cpu"}
            settings |= {"pipeline": folder, "output_dir": tmp_path / "found"}
            run_plan(PlanConfig(**{**settings, **options}))
            return tmp_path / "found"

        return run_with

    def test_the_dot_is_saved_with_the_n_that_it_was_searched_with(self, run):
        assert MorseDot.from_pretrained(run(speed_ratio=3.5)).config.speed_ratio == 3.5

    def test_an_n_that_the_dot_had_stays(self, run, folder, capsys):
        pipe = MorsePipeline.from_pretrained(folder)
        pipe.dot.register_to_config(speed_ratio=2.0)
        pipe.dot.save_pretrained(f"{folder}/dot")
        found = MorseDot.from_pretrained(run(speed_ratio=3.5))
        assert found.config.speed_ratio == 2.0
        assert "Dot's own N, 2, stays in its config" in capsys.readouterr().out

    @pytest.mark.parametrize("karras", [True, False])
    def test_a_plan_is_saved_with_the_grid_that_it_was_searched_on(self, run, folder, karras):
        kind = DPMSolverMultistepScheduler
        kind(use_karras_sigmas=karras).save_pretrained(f"{folder}/scheduler")
        found = run(speed_ratio=3.5, solver=("dpmsolver++",))
        (entry,) = MorseDot.from_pretrained(found).config.plans[kind.__name__]
        own = {"use_karras_sigmas": True} if karras else {}
        assert entry["scheduler"] == {"timestep_spacing": "trailing", **own}

    def test_n_is_measured_where_nothing_says_it(self, run, monkeypatch):
        measured = []

        def measure(pipe, **kwargs):
            measured.append((pipe.dot.is_merged, len(kwargs["prompt_embeds"])))
            return SimpleNamespace(speed_ratio=4.5)

        monkeypatch.setattr("morse.calls.MorseCalls.measure_speed_ratio", measure)
        found = run()
        assert MorseDot.from_pretrained(found).config.speed_ratio == 4.5
        assert measured == [(True, 2)]  # once, with the images that plans are judged on

    def test_a_dot_that_is_there_is_not_overwritten(self, run):
        found = run(speed_ratio=4.0)
        before = (found / "config.json").read_bytes()
        with pytest.raises(FileExistsError, match=r"output_dir is .*found.* go on .* --dot"):
            run(speed_ratio=4.0, lsd=(2,))
        assert (found / "config.json").read_bytes() == before
        run(lsd=(4,), dot=str(found))
        run(lsd=(4,), dot=str(found))  # takes the place of the one before
        report = json.loads((found / "plan_search.json").read_text())
        assert [(each["solver"], each["lsd"]) for each in report["searches"]] == [
            ("ddim", 3), ("ddim", 4)
        ]  # fmt: skip
        plans = MorseDot.from_pretrained(found).config.plans["DDIMScheduler"]
        assert [entry["lsd"] for entry in plans] == [3, 4]

    def test_networks_are_loaded_in_the_precision_asked_for(self, run, monkeypatch):
        seen = []
        monkeypatch.setattr(command, "follow", lambda pipe, *args: seen.append(pipe))
        run(speed_ratio=4.0, dtype="bfloat16", merge_lora=False)
        assert seen[0].unet.dtype == seen[0].vae.dtype == seen[0].dot.dtype == torch.bfloat16
        assert not seen[0].dot.is_merged

    def test_embeddings_come_from_a_file(self, run, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(command, "follow", lambda *args: seen.append(args[-1]))
        names = ("prompt_embeds", "negative_prompt_embeds")
        save_file({name: torch.ones(2, 8, 8) for name in names}, tmp_path / "embeds.safetensors")
        run(speed_ratio=4.0, prompts=(), prompt_embeds=tmp_path / "embeds.safetensors")
        assert seen[0].embeds["prompt_embeds"].shape == (2, 8, 8)

    def test_classes_are_asked_for_by_number(self, run, tmp_path, monkeypatch):
        seen, pipe = [], dit_pipeline()
        monkeypatch.setattr(command, "follow", lambda *args: seen.append(args[-1]))
        dot = MorseDot.from_dash(pipe.transformer, 1, (8,), lora_rank=2)
        MorsePipeline.from_pipe(pipe, dot).save_pretrained(tmp_path / "dit")
        options = {"prompts": (), "class_names": ("1",), "speed_ratio": 4.0}
        found = run(pipeline=str(tmp_path / "dit"), **options)
        assert seen[0].class_labels == (1,)
        (saved,) = MorseDot.from_pretrained(found).config.plans["DDIMScheduler"]
        assert saved["plan"] == "DoD"

    def test_plans_from_outside_are_started_from(self, run, monkeypatch):
        starts = []

        def search(evaluate, space, known, max_rounds):
            starts.extend(known)
            return Found(known[0], 2, known[0], 1)

        monkeypatch.setattr(budget, "search_plan", search)
        found = run(speed_ratio=4.0, start_plans=("DoDo", "DooD"))
        assert starts == [Candidate("DoDo"), Candidate("DooD")]
        (saved,) = MorseDot.from_pretrained(found).config.plans["DDIMScheduler"]
        assert saved["plan"] == "DoDo"

    @pytest.mark.parametrize(
        ("plan", "message"),
        [
            ("gDD", r"plan 'gDD' begins with a Gaussian mixture.*--mixture_images"),
            ("DoDDo", r"start_plans has 'DoDDo', which costs 3.50 LSD at N = 4, .* lsd \(3,\)"),
        ],
    )
    def test_a_start_that_cannot_be_tried_is_named(self, run, plan, message):
        with pytest.raises(ValueError, match=message):
            run(speed_ratio=4.0, start_plans=(plan,))

    def test_overflow_is_seen_before_the_reference(self, run, folder):
        pipe = MorsePipeline.from_pretrained(folder)
        torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
        pipe.unet.save_pretrained(f"{folder}/unet")
        with pytest.raises(ValueError, match=r"1 of the 1 reference images .* finite.*--dtype"):
            run(speed_ratio=4.0, dot=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16", "mixed_precision": "fp16"}, "dtype is float16 and mixed_precision"),
        ({"speed_ratio": 0.0}, "speed_ratio is 0.0; it must be more than 0"),
        ({"start_plans": ("DxD",)}, r"a plan is written with .*\['x'\]"),
        ({"num_images": 4, "num_quick_images": 8}, "num_quick_images is 8, .* num_images = 4"),
        ({"lsd": (0,)}, "lsd is"),
        ({"ratios": (0.5,)}, "ratios is"),
        ({"solver": ("rk4",)}, "'rk4' is unknown"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_fit_images": 0}, "num_fit_images is 0"),
        ({"fit_rounds": -1}, "fit_rounds is -1"),
        ({"refine_rounds": -1}, "refine_rounds is -1"),
        ({"mixture_images": -1}, "mixture_images is -1"),
    ],
)
def test_bad_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(output_dir=tmp_path, **options)


@pytest.mark.slow
def test_steps_are_fitted_to_stable_diffusion_3_in_half_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(best_fit, "REFERENCE_STEPS", 10)
    sd3_pipeline().save_pretrained(tmp_path / "sd3")
    settings = {**QUICK_PLAN, "device": "cpu", "dtype": "bfloat16", "fit_margin": 99.0}
    settings |= {"prompts": PROMPTS, "guidance_scale": 4.0, "output_dir": tmp_path / "steps"}
    run_plan(PlanConfig(pipeline=str(tmp_path / "sd3"), **settings))
    found = json.loads((tmp_path / "steps/plan_search.json").read_text())
    (search,) = found["searches"]
    assert search["psnr"] > 0 and found["environment"]["dtype"] == "bfloat16"
    pipe = sd3_pipeline()
    pipe.scheduler = FlowMatchLeapfrogScheduler.from_pretrained(tmp_path / "steps/leapfrog-3")
    assert pipe.scheduler.config.shift == 3.0
    images = pipe("cat", num_inference_steps=3, output_type="np").images
    assert images.shape[0] == 1 and np.isfinite(images).all()


def test_n_cannot_be_measured_without_a_prompt():
    pipe = text_pipeline()
    dot = MorseDot.from_dash(pipe.unet, num_down_blocks=1, block_out_channels=(8,), lora_rank=2)
    pipe = MorsePipeline.from_pipe(pipe, dot)
    with pytest.raises(ValueError, match=r"call measure_speed_ratio\(prompt\) first"):
        pipe.plan_for(8)
    measured = pipe.measure_speed_ratio("cat", repeats=2)
    assert measured.speed_ratio == pipe.speed_ratio > 0 and pipe.plan_for(8).plan
