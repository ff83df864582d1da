"""The benchmark on text- and class-conditional pipelines, at several guidance scales."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, StableDiffusionPipeline
from evaluation_fixtures import REFERENCE_STEPS, short_reference  # noqa: F401
from safetensors.torch import save_file
from tiny_pipelines import stable_diffusion, text_inputs, text_unet, tiny_vae

from morse import MorseDot
from morse.attach import disable_morse
from morse.cli import parse_config
from morse.evaluation.bench import peers
from morse.evaluation.bench.benchmark import (
    BenchmarkConfig,
    measure_benchmark,
    run_benchmark,
)
from morse.evaluation.bench.loading import load_bare, load_pipelines
from morse.evaluation.bench.peers import PEERS, Peer
from morse.evaluation.bench.runs import sample_images
from morse.evaluation.conditions import Conditions, make_conditions
from morse.evaluation.digests import components_sha256
from morse.evaluation.metrics import psnr
from morse.evaluation.report.data import guidance_parts
from morse.pipeline import MorsePipeline
from morse.plan import MorsePlan

NAMES = ("bag", "ankle boot", "shirt")


def test_decoders_run_in_full_precision(text_folder):
    bare, _ = load_bare(str(text_folder), None, "cpu")
    seen, decoder = [], bare.vae.decoder
    decoder.register_forward_hook(
        lambda module, args, output: seen.append((torch.is_autocast_enabled("cpu"), output.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        bare("boot", num_inference_steps=1, output_type="pt")
    assert seen == [(False, torch.float32)]


def test_the_command_line_takes_prompts_and_several_scales():
    options = "--pretrained_model_name_or_path runs/dash --dot runs/dot --prompts bag boot "
    config = parse_config(BenchmarkConfig, (options + "--guidance_scale 1 3 7.5").split())
    assert (config.pipeline, config.dot) == ("runs/dash", "runs/dot")
    assert (config.prompts, config.guidance_scale) == (("bag", "boot"), (1.0, 3.0, 7.5))
    with pytest.raises(ValueError, match="guidance_scale is"):
        BenchmarkConfig(guidance_scale=(-1.0,))


def tiny_text_pipeline():
    """A StableDiffusionPipeline of grey 32x32 images with a tokenizer and a text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer().train_new_from_iterator([NAMES], 300, show_progress=False)
    tokenizer.model_max_length = 6
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
        eos_token_id=tokenizer.eos_token_id,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(in_channels=1, out_channels=1),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=text_unet(),
        scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_with_dot(pipe, folder):
    dot = MorseDot.from_dash(pipe.unet, num_down_blocks=1, block_out_channels=(8,), lora_rank=2)
    MorsePipeline.from_pipe(pipe, dot).save_pretrained(folder)
    disable_morse(pipe)
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return save_with_dot(tiny_text_pipeline(), tmp_path_factory.mktemp("text") / "pipeline")


@pytest.fixture(scope="module")
def config(text_folder, tmp_path_factory):
    return BenchmarkConfig(
        output_dir=tmp_path_factory.mktemp("bench"),
        pipeline=str(text_folder),
        prompts=NAMES,
        guidance_scale=(1.0, 4.0),
        num_images=3,
        batch_size=2,
        lsd=(3,),
        baseline_lsd=(5,),
        solvers=("ddim", "dpmsolver++"),
        kinds=("baseline", "morse", "reuse", "pfdiff", "ays"),
        control_solvers=("ddim",),
        peers=("none",),
        ddim_ratios=(1.5,),
        dpm_ratios=(1.5,),
        speed_ratio=4.0,
        latency_batch_sizes=(0,),
        num_replicates=2,
        device="cpu",
    )


@pytest.fixture(scope="module")
def result(config):
    return run_benchmark(config)


def rows_of(result, scale):
    rows = [row for row in result["rows"] if row["guidance_scale"] == scale]
    return {(row["kind"], row["solver"], row["budget"]): row for row in rows}


def test_every_guidance_scale_has_its_figures(result):
    assert result["schema_version"] == 4
    assert [part["guidance_scale"] for part in result["guidance"]] == [1.0, 4.0]
    for scale in (1.0, 4.0):
        rows = rows_of(result, scale)
        # Two solvers bare and PFDiff at 3 and 5 LSD, Morse with both, reuse with DDIM.
        assert len(rows) == 2 * 2 + 2 + 2 + 1
        assert all(row["seconds"] > 0 and not row["fallbacks"] for row in rows.values())
        # A Dot that starts at zero is reuse, so Morse and its control agree here.
        morse, reuse = rows["morse", "ddim", 3], rows["reuse", "ddim", 3]
        assert morse["plan"] == reuse["plan"] and morse["num_dot"] > 0
        for axis in ("psnr", "frechet"):
            values = [row["scores"][axis]["value"] for row in (morse, reuse)]
            assert values[0] == pytest.approx(values[1], rel=1e-4)
    first, second = (rows_of(result, scale)["baseline", "ddim", 3] for scale in (1.0, 4.0))
    assert first["scores"]["frechet"]["value"] != second["scores"]["frechet"]["value"]


def test_figures_are_those_of_the_plain_pipeline(text_folder, result):
    """PSNR of DDIM at 3 LSD, from diffusers' own calls image by image."""
    pipe = StableDiffusionPipeline.from_pretrained(text_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images = {}
    for steps, scheduler in ((3, "ddim"), (REFERENCE_STEPS, "dpmsolver++")):
        pipe.scheduler = load_pipelines(str(text_folder), None, (scheduler,), "cpu")[
            scheduler
        ].scheduler
        images[steps] = torch.stack(
            [
                torch.from_numpy(
                    pipe(
                        NAMES[i],
                        generator=torch.Generator().manual_seed(i),
                        guidance_scale=4.0,
                        num_inference_steps=steps,
                        output_type="np",
                    ).images[0]
                ).permute(2, 0, 1)
                for i in range(3)
            ]
        )
    expected = float(psnr(images[3], images[REFERENCE_STEPS]).mean())
    found = rows_of(result, 4.0)["baseline", "ddim", 3]["scores"]["psnr"]["value"]
    assert found == pytest.approx(expected, abs=1e-3)


def test_what_cannot_be_measured_is_listed_at_each_scale(result):
    for part in result["guidance"]:
        assert not any("DDIM" in line for line in part["not_measured"])
        # AYS is asked for with DPM++ alone, which is not among control_solvers.
        assert part["not_measured"] == []
        assert part["grid"]["rows"] and part["speed_ratio"]["speed_ratio"] == 4.0


def test_the_report_has_sections_and_curves_of_each_scale(config, result):
    text = (config.output_dir / "benchmark.md").read_text()
    for scale in ("1", "4"):
        assert f"## Quality at each budget at guidance {scale}\n" in text
        assert f"## What it costs at guidance {scale}\n" in text
        for name in (f"benchmark-guidance-{scale}.png", f"benchmark_grid-guidance-{scale}.png"):
            assert (config.output_dir / name).stat().st_size > 1000
            assert f"({name})" in text
    assert text.count("## Conditions") == 1
    assert "both together are 1 LSD" in text and "bag; ankle boot; shirt" in text
    html = (config.output_dir / "benchmark.html").read_text()
    assert 'class="quality guidance-4"' in html and 'id="pictures-at-guidance-1"' in html


def measure(config, **changed):
    """What a resumed run measures, without the report."""
    return measure_benchmark(dataclasses.replace(config, resume=True, **changed).resolved())


def test_a_run_is_resumed_and_another_scale_added(config, result, monkeypatch, tmp_path):
    stored = (config.output_dir / "benchmark.json").read_text()
    with monkeypatch.context() as patched:
        patched.setattr("morse.evaluation.bench.sampler.sample_images", None)
        again = measure(config, json=tmp_path / "a.json")
    assert again["rows"] == result["rows"]
    few = {"solvers": ("ddim",), "kinds": ("baseline",), "guidance_scale": (4.0, 6.0)}
    more = measure(config, json=tmp_path / "b.json", **few)
    scales = {row["guidance_scale"] for row in more["rows"]}
    assert scales == {4.0, 6.0}
    kept = rows_of(more, 4.0)["baseline", "ddim", 3]
    assert kept["seconds"] == rows_of(result, 4.0)["baseline", "ddim", 3]["seconds"]
    with pytest.raises(ValueError, match="prompts was"):
        measure(config, prompts=("coat",))
    assert json.loads(stored)["rows"] == result["rows"]


def test_parts_are_results_of_their_own(result):
    parts = guidance_parts(result)
    assert [part["guidance_scale"] for part in parts] == [1.0, 4.0]
    assert sum(len(part["rows"]) for part in parts) == len(result["rows"])
    assert all(entry["guidance_scale"] == 4.0 for entry in parts[1]["speedups"])
    (alone,) = guidance_parts({"schema_version": 2, "rows": [1]})
    assert alone["guidance_scale"] is None and alone["rows"] == [1]


def test_batch_size_changes_no_picture(text_folder):
    pipe = load_pipelines(str(text_folder), None, ("ddim",), "cpu")["ddim"]
    wanted = Conditions(prompts=NAMES, guidance_scale=4.0)
    for steps in (3, MorsePlan.from_string("Doo")):
        both = sample_images(pipe, steps, range(5, 9), 4, conditions=wanted).images
        apart = sample_images(pipe, steps, range(5, 9), 3, conditions=wanted).images
        torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-4)


def test_peers_that_raise_are_listed_and_others_measured(config, tmp_path, monkeypatch):
    pytest.importorskip("DeepCache")

    def broken(pipe, number):
        raise IndexError("pop from empty list")

    monkeypatch.setitem(PEERS, "tomesd", Peer(broken, lambda pipe: None))
    monkeypatch.setattr(peers, "MEASURED_STEPS", 3)
    monkeypatch.setattr(peers, "measure_deepcache", partial(peers.measure_deepcache, repeats=1))
    few = {"solvers": ("ddim",), "kinds": ("baseline",), "guidance_scale": (3.0,), "num_images": 2}
    few |= {"baseline_lsd": (), "peers": ("tomesd", "deepcache", "pab")}
    result = run_benchmark(dataclasses.replace(config, **few, output_dir=tmp_path))
    rows = [(row["kind"], row["setting"]) for row in result["rows"]]
    assert rows == [("baseline", "")] + [("deepcache", f"interval {n}") for n in (3, 2, 5)]
    (part,) = result["guidance"]
    assert part["not_measured"] == [
        *(
            f"ToMe-DDIM ratio {ratio}: it raised IndexError: pop from empty list"
            for ratio in ("0.5", "0.25", "0.75")
        ),
        "pab: not applicable: it caches the blocks of a transformer, and UNet2DConditionModel is "
        "none",
    ]
    assert "it raised IndexError" in (tmp_path / "benchmark.md").read_text()


def test_other_images_than_fashion_mnist_need_an_extractor_for_a_distance(tmp_path, capsys):
    """Colour, no text encoder: embeddings are given; N is measured."""
    pipe = stable_diffusion(StableDiffusionPipeline, text_unet())
    folder, embeds = save_with_dot(pipe, tmp_path / "pipeline"), tmp_path / "embeds.safetensors"
    save_file(text_inputs(2), embeds)
    config = BenchmarkConfig(
        output_dir=tmp_path / "out",
        pipeline=str(folder),
        prompt_embeds=embeds,
        guidance_scale=(3.0,),
        num_images=2,
        lsd=(2,),
        baseline_lsd=(),
        solvers=("ddim",),
        kinds=("baseline", "extrapolation", "shrunk"),
        peers=("none",),
        latency_batch_sizes=(0,),
        device="cpu",
    )
    result = run_benchmark(config)
    assert list(result["axes"]) == ["psnr", "ssim"] and "metric" not in result
    (row,) = result["rows"]
    assert set(row["scores"]) == {"psnr", "ssim"}
    (part,) = result["guidance"]
    assert part["speed_ratio"]["speed_ratio"] > 0
    assert "Extrapolation-DDIM r2: it is made for unconditional" in part["not_measured"][0]
    assert "Fréchet" not in (tmp_path / "out" / "benchmark.md").read_text()
    assert "give --extractor" in capsys.readouterr().out


def tiny_dit():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=16,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    with torch.no_grad():  # the modulation starts at zero, where no block does anything
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    labels = {3: "bag, purse", 7: "boot"}
    return DiTPipeline(transformer.eval(), tiny_vae(), scheduler, id2label=labels)


def test_a_class_conditional_pipeline_takes_names_and_numbers():
    pipe = tiny_dit()
    wanted = make_conditions(pipe, class_names=("boot", "purse", "5"), guidance_scale=2.0)
    assert wanted.class_labels == (7, 3, 5)
    assert wanted.arguments(range(2, 5)) == {"guidance_scale": 2.0, "class_labels": [5, 7, 3]}
    with pytest.raises(ValueError, match=r"class_names has \['cat'\]"):
        make_conditions(pipe, class_names=("cat",))
    assert make_conditions(pipe, class_names=("999",)).class_labels == (999,)
    with pytest.raises(ValueError, match=r"class_names has 1000, .* knows 1000 classes; .* to 999"):
        make_conditions(pipe, class_names=("boot", "1000"))
    with pytest.raises(ValueError, match="give --class_names"):
        make_conditions(pipe)
    with pytest.raises(ValueError, match="takes none"):
        make_conditions(pipe, prompts=("a cat",))
    images = sample_images(pipe, 2, range(3), 2, conditions=wanted).images
    assert images.shape == (3, 3, 32, 32) and images.isfinite().all()


def test_conditions_and_pipeline_must_suit_each_other(text_folder, tmp_path):
    pipe, _ = load_bare(str(text_folder), None, "cpu")
    with pytest.raises(ValueError, match="makes images from text; give --prompts"):
        make_conditions(pipe)
    with pytest.raises(ValueError, match="only one of them"):
        make_conditions(pipe, prompts=NAMES, class_names=NAMES)
    with pytest.raises(FileNotFoundError, match="prompt_embeds"):
        make_conditions(pipe, prompt_embeds=tmp_path / "none.safetensors")
    wrong = tmp_path / "wrong.safetensors"
    save_file({"embeds": torch.zeros(1)}, wrong)
    with pytest.raises(ValueError, match=r"holds \['embeds'\]; it must hold prompt_embeds"):
        make_conditions(pipe, prompt_embeds=wrong)
    with pytest.raises(ValueError, match="no text encoder; give --prompt_embeds"):
        make_conditions(stable_diffusion(StableDiffusionPipeline, text_unet()), prompts=NAMES)
    unconditional, _ = load_bare("fashion-mnist", None, "cpu")
    assert make_conditions(unconditional).arguments(range(3)) == {"batch_size": 3}
    for given in ({"prompts": NAMES}, {"class_names": NAMES}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="takes none"):
            make_conditions(unconditional, **given)


def test_every_network_of_a_pipeline_is_told_from_others():
    pipe = tiny_text_pipeline()
    before = components_sha256(pipe)
    pipe.vae.decoder.conv_out.weight.data *= 2
    after = components_sha256(pipe)
    assert set(after) == {f"{name}_sha256" for name in ("unet", "vae", "text_encoder", "scheduler")}
    assert [name for name in after if after[name] != before[name]] == ["vae_sha256"]
