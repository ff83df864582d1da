import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from evaluation_fixtures import save_tiny_pipeline, tiny_folder  # noqa: F401
from PIL import Image
from test_extractors import clip_folder, inception  # noqa: F401
from tiny_pipelines import stable_diffusion, text_unet
from tiny_text import text_pipeline
from torch import nn
from transformers import BatchFeature

from morse import MorseDot, MorsePipeline, enable_morse
from morse.cli import parse_config
from morse.evaluation.bench.config import BenchmarkConfig
from morse.evaluation.features import extract_features, load_features, load_reference
from morse.evaluation.fid.budgets import _image_size, _recipes
from morse.evaluation.fid.command import FidConfig, run_fid
from morse.evaluation.fid.measuring import _prompts, measures_nothing
from morse.evaluation.metrics import FRECHET_LABEL, feature_statistics, frechet_distance
from morse.evaluation.planning.config import PlanConfig
from morse.evaluation.prompts import read_prompts
from morse.tuning.config import TuneDotConfig


class Colours(nn.Module):
    """A user's network: mean and spread of each colour."""

    def forward(self, images):
        return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)


OWN = f"{__name__}:Colours"


def write_images(folder, count=12, size=(8, 8), seed=0, shift=0):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        pixels = generator.integers(0, 200, (*size[::-1], 3)) + shift
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{seed}-{index:03d}.png")
    return str(folder)


def score(result, axis="frechet", row=0):
    return result["rows"][row]["scores"][axis]["value"]


def test_generation_and_metrics_in_one_go(tiny_folder, tmp_path, capsys):  # noqa: F811
    config = FidConfig(
        real="fashion-mnist",
        pipeline=str(tiny_folder),
        scheduler="ddim",
        lsd=(3, 2),
        num_inference_steps=(2,),
        speed_ratio=4,
        reference_steps=6,
        num_images=5,
        batch_size=2,
        seed=3,
        output_dir=tmp_path / "out",
        json=tmp_path / "new" / "fid.json",
        device="cpu",
    )
    result = run_fid(config)
    assert json.loads((tmp_path / "new" / "fid.json").read_text()) == result
    assert [row["kind"] for row in result["rows"]] == ["reference", "baseline", "morse", "morse"]
    assert [row["budget"] for row in result["rows"]] == [6, 2, 2, 3]
    reference, bare, *planned = result["rows"]
    assert "psnr" not in reference["scores"]
    for row in (bare, *planned):
        assert set(row["scores"]) == {"frechet", "psnr", "ssim"}
        assert row["num_images"] == 5 and "singular" in row["notes"][0]
    for row in result["rows"]:
        assert (
            row["timestep_spacing"] == "trailing"
        )  # as in bench, though the pipeline says nothing
        assert row["made_with"]["num_threads"] == [torch.get_num_threads()]
        assert len(row["made_with"]["dot_sha256"]) == 64 and "prompts" not in row["made_with"]
    for row in planned:
        assert row["lsd"] == row["num_dash"] + row["num_dot"] / 4 <= row["budget"]
    # The figures are those of the files on the disk.
    images = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(file)))[None]
            for file in sorted(Path(bare["source"]).glob("*.png"))
        ]
    )
    statistics = feature_statistics(extract_features(load_features(), images))
    expected = frechet_distance(*statistics, *load_reference())
    assert bare["scores"]["frechet"]["value"] == pytest.approx(expected, rel=1e-5)
    assert result["axes"]["frechet"]["title"] == FRECHET_LABEL
    printed = " ".join(capsys.readouterr().out.split())
    assert FRECHET_LABEL in printed and "FID" not in printed
    assert result["extractor"]["sha256"] in printed and "singular" in printed
    # From the images that are there, be it from another working folder.
    config = replace(config, pipeline=os.path.relpath(tiny_folder))
    assert run_fid(config)["rows"] == result["rows"]
    # That a folder holds others is told before anything is sampled.
    with pytest.raises(ValueError, match="holds files of other settings"):
        run_fid(replace(config, num_inference_steps=(), reference_steps=7, seed=4))
    assert not (tmp_path / "out" / "reference_7_steps").exists()


def test_a_budget_is_spent_as_a_call_spends_it(tiny_folder, tmp_path):  # noqa: F811
    dot = MorseDot.from_pretrained(tiny_folder, subfolder="dot")
    entry = {"lsd": 2, "plan": "Dooo", "scheduler": {"timestep_power": 2.0}}
    as_ddim = {"lsd": 2, "plan": "DD", "scheduler": {"timestep_spacing": "trailing"}}
    plans = {"LeapfrogScheduler": [entry], "DDIMScheduler": [as_ddim]}
    dot.register_to_config(plans=plans, speed_ratio=4.0)
    dot.save_pretrained(tmp_path / "dot")
    config = FidConfig(
        real="fashion-mnist",
        pipeline=str(tiny_folder),
        dot=str(tmp_path / "dot"),
        scheduler="leapfrog",
        lsd=(2,),
        num_images=2,
        output_dir=tmp_path / "out",
        device="cpu",
    )
    (row,) = run_fid(config)["rows"]
    assert row["plan"] == "Dooo" and row["timestep_spacing"] is None
    assert "timestep_spacing" not in row["made_with"]["scheduler_config"]
    pipe = MorsePipeline.from_pretrained(tiny_folder, dot=tmp_path / "dot", scheduler="leapfrog")
    expected = pipe(lsd=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    written = np.array(Image.open(tmp_path / "out" / "lsd_2" / "00000000.png")) / 255
    np.testing.assert_allclose(written, expected[0, :, :, 0], atol=0.003)
    # A saved plan lies on its own grid, and what it is compared with on the same.
    both = replace(config, num_inference_steps=(2,), scheduler="ddim")
    for scheduler, spacing in (("ddim", None), (None, "leading"), ("DDIMScheduler", "leading")):
        out = tmp_path / f"{scheduler}-{spacing}"
        options = {"scheduler": scheduler, "timestep_spacing": spacing, "output_dir": out}
        if scheduler is None:
            options["lsd"] = ()
        bare, *planned = run_fid(replace(both, **options))["rows"]
        assert bare["timestep_spacing"] == (spacing or "trailing")
        for row in planned:
            assert (row["plan"], row["timestep_spacing"]) == ("DD", "trailing")
            files = [Path(each["source"]) / "00000001.png" for each in (bare, row)]
            same = files[0].read_bytes() == files[1].read_bytes()
            told = [note for note in row["notes"] if "--timestep_spacing trailing" in note]
            assert (same, len(told)) == ((True, 0) if spacing is None else (False, 1))
    with pytest.raises(ValueError, match="LeapfrogScheduler has none"):
        run_fid(replace(config, timestep_spacing="leading"))
    # A plan of another scheduler changes no image; what Dot's residual is added to does.
    dot.register_to_config(plans={"LeapfrogScheduler": [entry]})
    dot.save_pretrained(tmp_path / "dot")
    assert run_fid(config)["rows"][0]["plan"] == "Dooo"
    dot.register_to_config(base_space="x0")
    dot.save_pretrained(tmp_path / "dot")
    with pytest.raises(ValueError, match=r"dot_config\.base_space was null"):
        run_fid(config)
    dot.register_to_config(base_space=None)
    with pytest.raises(ValueError, match=r"plan_scheduler\.timestep_power was 2"):
        dot.register_to_config(plans=None)
        dot.save_pretrained(tmp_path / "dot")
        run_fid(config)
    dot.register_to_config(speed_ratio=None)
    dot.save_pretrained(tmp_path / "dot")
    with pytest.raises(ValueError, match=r"measure_speed_ratio\(batch_size=16\)"):
        run_fid(config)


def test_a_pipeline_that_starts_from_a_picture_is_refused(tmp_path):
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(text_pipeline())
    pipe.save_pretrained(tmp_path / "pipeline")
    options = {"class_names": ("cat",), "num_inference_steps": (1,), "device": "cpu"}
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"Img2ImgPipeline, which takes \['prompt', 'image', .*--fake"
    ):
        run_fid(FidConfig(pipeline=str(tmp_path / "pipeline"), output_dir=out, **options))


class Blackout(nn.Module):
    """A safety checker to which every image is unsafe."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images, clip_input):
        return torch.zeros_like(images), [True] * len(images)


def test_no_safety_checker_blacks_out_what_is_measured(tmp_path, monkeypatch):
    pipe, pixels = text_pipeline(), BatchFeature({"pixel_values": torch.zeros(1)})
    pipe.register_modules(safety_checker=Blackout(), feature_extractor=lambda *_, **__: pixels)
    assert not pipe("cat", num_inference_steps=1, output_type="np").images.any()
    loaded = enable_morse(pipe, None)
    monkeypatch.setattr(MorsePipeline, "from_pretrained", lambda *_, **__: loaded)
    options = {"class_names": ("cat",), "num_inference_steps": (1,), "num_images": 2}
    config = FidConfig(pipeline="text", output_dir=tmp_path, device="cpu", **options)
    run_fid(config)
    assert all(np.array(Image.open(file)).any() for file in (tmp_path / "steps_1").glob("*.png"))


def test_images_of_another_autoencoder_or_text_encoder_are_not_kept(tmp_path, monkeypatch):
    loaded = enable_morse(text_pipeline(), None)
    monkeypatch.setattr(MorsePipeline, "from_pretrained", lambda *_, **__: loaded)
    options = {"class_names": ("cat",), "num_inference_steps": (1,), "num_images": 2}
    config = FidConfig(pipeline="text", output_dir=tmp_path, device="cpu", **options)
    run_fid(config)
    for name, part in (("vae", loaded.vae), ("text_encoder", loaded.text_encoder)):
        weight = next(part.parameters()).data
        kept = weight.clone()
        weight += 1
        with pytest.raises(ValueError, match=rf"\(components_sha256\.{name} was .* give another"):
            run_fid(config)
        weight.copy_(kept)


def test_two_folders_in_the_features_of_a_users_network(tmp_path, capsys):
    real = write_images(tmp_path / "real", seed=0)
    fake = write_images(tmp_path / "fake", count=10, seed=1, shift=40)
    result = run_fid(FidConfig(real=real, fake=fake, extractor=OWN, device="cpu"))
    assert result["schema_version"] == 1 and result["real"]["num_images"] == 12
    assert result["rows"][0]["num_images"] == 10 and result["rows"][0]["label"] == "fake"
    assert set(result["rows"][0]["scores"]) == {"frechet", "kernel_distance", "precision", "recall"}
    assert result["axes"]["kernel_distance"]["title"] == f"Kernel distance (features of {OWN})"
    assert result["extractor"]["feature_dim"] == 6
    assert result["rows"][0]["kid_subset_size"] == 5
    assert "lower is better, over subsets of 5 images" in " ".join(capsys.readouterr().out.split())
    same = run_fid(FidConfig(real=real, fake=real, extractor=OWN, device="cpu"))
    assert score(same) == pytest.approx(0, abs=1e-6)
    assert score(result) > 0.01
    assert score(same, "precision") == score(same, "recall") == 1


def test_statistics_serve_as_the_real_images(tmp_path):
    real = write_images(tmp_path / "real")
    fake = write_images(tmp_path / "fake", seed=1, shift=40)
    stats = tmp_path / "stats.npz"
    saved = run_fid(FidConfig(real=real, save_stats=stats, extractor=OWN, device="cpu"))
    assert saved["rows"] == [] and stats.is_file()
    direct = run_fid(FidConfig(real=real, fake=fake, extractor=OWN, device="cpu"))
    config = FidConfig(real=str(stats), fake=fake, extractor=OWN, device="cpu")
    loaded = run_fid(config)
    assert score(loaded) == pytest.approx(score(direct), rel=1e-9)
    assert loaded["real"]["num_images"] == 12
    assert set(loaded["rows"][0]["scores"]) == {"frechet"}


def test_images_are_cropped_and_resized_as_training_does_where_asked(tmp_path, capsys):
    real = write_images(tmp_path / "real", size=(12, 8))
    fake = write_images(tmp_path / "fake", seed=1, size=(8, 10))
    options = {"fake": fake, "extractor": OWN, "device": "cpu"}
    config, stats = FidConfig(real=real, **options), str(tmp_path / "stats.npz")
    assert "--resolution brings" in " ".join(run_fid(config)["rows"][0]["notes"])
    result = run_fid(replace(config, resolution=8, save_stats=Path(stats)))
    sides = (result["real"], result["rows"][0])
    assert [side["reading"]["sizes"] for side in sides] == [{"8x8": 12}] * 2
    assert result["settings"]["resolution"] == 8 and not result["warnings"]
    assert "brought to 8x8, as in training" in " ".join(capsys.readouterr().out.split())
    with np.load(stats) as content:
        assert content["resolution"] == 8
    again = run_fid(FidConfig(real=stats, resolution=8, **options))
    assert score(again) == pytest.approx(score(result), rel=1e-9) and not again["warnings"]
    assert "resized to 8x8" in run_fid(FidConfig(real=stats, **options))["warnings"][0]
    with pytest.raises(ValueError, match="give --resolution 8"):
        run_fid(FidConfig(real=stats, resolution=4, **options))


def test_mixed_sizes_are_an_error_where_the_extractor_does_not_resize(tmp_path):
    real = write_images(tmp_path / "real")
    write_images(tmp_path / "mixed", count=3)
    mixed = write_images(tmp_path / "mixed", count=2, seed=1, size=(10, 8))
    with pytest.raises(ValueError, match=r"different sizes, 8x8 \(3\), 10x8 \(\d\)"):
        run_fid(FidConfig(real=real, fake=mixed, extractor=OWN, device="cpu"))
    with pytest.raises(ValueError, match=r"\(B, 1, 32, 32\)"):
        run_fid(FidConfig(real="fashion-mnist", fake=real, device="cpu"))


def test_inception_resizes_images_of_mixed_sizes_one_by_one(inception, tmp_path):  # noqa: F811
    write_images(tmp_path / "real", count=1, size=(32, 32))
    real = write_images(tmp_path / "real", count=1, seed=1, size=(48, 24))
    options = {"inception_weights": inception[1], "device": "cpu"}
    result = run_fid(FidConfig(real=real, fake=real, **options))
    assert result["axes"]["frechet"]["title"] == "FID"
    assert score(result) == pytest.approx(0, abs=1e-3)
    assert "sizes are mixed: 32x32 (1), 48x24 (1)" in " ".join(result["warnings"])
    assert "2048 features" in " ".join(result["warnings"])


def test_unreadable_files_are_told_and_strict_fails(tmp_path):
    real = write_images(tmp_path / "real")
    (tmp_path / "real" / "z.png").write_bytes(b"")
    result = run_fid(FidConfig(real=real, fake=real, extractor=OWN, device="cpu"))
    assert result["real"]["reading"]["num_unreadable"] == 1
    assert "z.png" in result["warnings"][0] and result["real"]["num_images"] == 12
    with pytest.raises(ValueError, match=r"z\.png cannot be read"):
        run_fid(FidConfig(real=real, fake=real, extractor=OWN, strict=True, device="cpu"))


def test_what_is_missing_is_told_before_sampling(tiny_folder, tmp_path):  # noqa: F811
    config = {"pipeline": str(tiny_folder), "num_inference_steps": (2,), "device": "cpu"}
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="inception_weights"):
        run_fid(FidConfig(real=write_images(tmp_path / "real"), output_dir=out, **config))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        nowhere = str(tmp_path / "nowhere")
        run_fid(FidConfig(real=nowhere, extractor=OWN, output_dir=out, **config))
    with pytest.raises(ValueError, match="statistics of extractor fashion-mnist"):
        run_fid(FidConfig(real="fashion-mnist", extractor=OWN, output_dir=out, **config))
    with pytest.raises(ValueError, match="resolution is 28, but fashion-mnist"):
        run_fid(FidConfig(real="fashion-mnist", resolution=28, output_dir=out, **config))
    with pytest.raises(ValueError, match=r"alone extractor .* measures nothing; give --real"):
        run_fid(FidConfig(fake=str(tmp_path / "real"), extractor=OWN, device="cpu"))
    assert not out.exists()


def test_sizes_that_cannot_be_measured_are_told_before_sampling(tmp_path):
    folder = save_tiny_pipeline(
        tmp_path / "tiny", sample_size=(16, 40), in_channels=1, out_channels=1
    )
    (tmp_path / "weights").touch()
    options = {"pipeline": str(folder), "num_inference_steps": (1,), "device": "cpu"}
    config = FidConfig(**options, num_images=2, reference_steps=2, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"lpips is on, .* makes 40x16; leave out --lpips"):
        run_fid(replace(config, lpips=True, lpips_weights=tmp_path / "weights"))
    fashion = replace(config, extractor="fashion-mnist")
    with pytest.raises(ValueError, match=r"cannot take images of 40x16, .* give --resolution"):
        run_fid(fashion)
    assert not (tmp_path / "out").exists()
    assert set(run_fid(replace(fashion, resolution=32))["rows"][1]["scores"]) == {"psnr", "ssim"}


def test_latents_have_the_size_of_their_images():
    pipe = text_pipeline()
    (image,) = pipe("cat", num_inference_steps=1).images
    assert _image_size(pipe) == image.size[::-1]


def test_evaluations_are_counted_as_the_scheduler_makes_them():
    pipe = stable_diffusion(StableDiffusionPipeline, text_unet(), HeunDiscreteScheduler())
    pipe = enable_morse(pipe, lambda *inputs, **conditions: 0)
    pipe.speed_ratio = 4.0
    config = SimpleNamespace(reference_steps=7, num_inference_steps=(5,), lsd=(3, 4))
    reference, bare, *planned = _recipes(config, pipe)
    # All but the last step are evaluated twice, and a plan has what such a call can make.
    assert (reference.steps, reference.num_dash) == (7, 13)
    assert (bare.steps, bare.num_dash) == (5, 9)
    assert all(len(method.steps) % 2 == 1 for method in planned)


def test_a_pipeline_without_dot_cannot_have_a_budget(tiny_folder, tmp_path, capsys):  # noqa: F811
    from diffusers import DDPMPipeline

    from morse.attach import disable_morse
    from morse.pipeline import MorsePipeline

    bare = disable_morse(MorsePipeline.from_pretrained(tiny_folder))
    DDPMPipeline(bare.unet, bare.scheduler).save_pretrained(tmp_path / "bare")
    config = {"pipeline": str(tmp_path / "bare"), "output_dir": tmp_path / "out", "device": "cpu"}
    with pytest.raises(ValueError, match="has no Dot"):
        run_fid(FidConfig(lsd=(2,), **config))
    result = run_fid(FidConfig(num_inference_steps=(2,), num_images=2, **config))
    assert "nothing will be measured: give --real" in capsys.readouterr().out
    assert result["rows"][0]["scores"] == {} and result["extractor"] is None
    run_fid(FidConfig(num_inference_steps=(2,), num_images=2, resolution=8, **config))
    assert "brought to" not in capsys.readouterr().out  # nothing was
    images = tmp_path / "out" / "steps_2"
    assert len(list(images.glob("*.png"))) == 2
    # Classes alone give a score without real images.
    options = {"extractor": "fashion-mnist", "device": "cpu"}
    (row,) = run_fid(FidConfig(fake=str(images), **options))["rows"]
    assert row["scores"] == {} and "100 images or more, so it was not measured" in row["notes"][0]
    config |= {**options, "num_inference_steps": (2,), "num_images": 100}
    generated, alone = run_fid(FidConfig(**config)), run_fid(FidConfig(fake=str(images), **options))
    assert set(generated["rows"][0]["scores"]) == {"inception_score"}
    assert "100 images is over 1 of the usual 10 splits" in generated["rows"][0]["notes"][0]
    assert score(alone, "inception_score") == score(generated, "inception_score")
    assert "nothing will be measured" not in capsys.readouterr().out
    assert not [note for note in generated["rows"][0]["notes"] if "singular" in note]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --real and --fake"),
        ({"real": "a"}, "give --real and --fake"),
        ({"fake": "b"}, "give --real and --fake"),
        ({"fake": "b", "pipeline": "p"}, "give one of the two"),
        ({"pipeline": "p", "output_dir": Path("o")}, "without a budget"),
        ({"real": "a", "fake": "b", "lsd": (5,), "dot": "d"}, "without --pipeline: dot, lsd;"),
        ({"real": "a", "fake": "b", "num_inference_steps": (5,)}, ": num_inference_steps;"),
        ({"real": "a", "fake": "b", "reference_steps": 5, "seed": 1}, ": reference_steps, seed;"),
        ({"real": "a", "save_stats": Path("s.npz"), "scheduler": "ddim"}, ": scheduler;"),
        ({"real": "a", "fake": "b", "output_dir": Path("o"), "dtype": "float16"}, "dtype, output"),
        ({"real": "a.npz", "save_stats": Path("s.npz")}, "save_stats"),
        ({"real": "a", "save_stats": Path("b/s")}, "save_stats is b/s, .* give b/s.npz"),
        ({"real": "a", "fake": "b", "lpips": True}, "--reference_steps"),
        ({"real": "a", "fake": "b", "num_images": 1}, "num_images is 1"),
        ({"real": "a", "fake": "b", "lpips_weights": Path("w")}, "give --lpips as well"),
        ({"pipeline": "p", "output_dir": Path("o"), "lsd": (0.5,)}, "lsd is .* 1 or more each"),
        ({"pipeline": "p", "lsd": (5,), "speed_ratio": 0.0}, "speed_ratio is 0.0; it must be"),
        ({"real": "a", "fake": "b", "dataset_config_name": "c"}, "give hub:NAME as --real"),
        ({"real": "hub:a", "fake": "b", "resolution": 0}, "resolution is 0; it must be 1 or more"),
        ({"real": "a", "fake": "b", "prompts": ("nowhere.txt",)}, "nowhere.txt, which does not"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        FidConfig(**options)


def test_the_command_line():
    argv = ["--pipeline", "p", "--real", "fashion-mnist", "--lsd", "5", "7.5", "--num-images", "9"]
    config = parse_config(FidConfig, [*argv, "--output-dir", "o"])
    assert config.lsd == (5.0, 7.5) and config.num_images == 9
    assert config.extractor_name == "fashion-mnist"
    assert parse_config(FidConfig, ["--real", "a", "--fake", "b"]).extractor_name == "inception"
    shortest = parse_config(FidConfig, ["--pipeline", "fashion-mnist", "--lsd", "5"])
    assert (shortest.real, shortest.output_dir) == ("fashion-mnist", Path("fid_output"))


def test_prompts_are_texts_or_a_file_of_them(tmp_path):
    file = tmp_path / "prompts"
    file.write_text("a cat\n\n  a dog \n")
    assert read_prompts((str(file),)) == ("a cat", "a dog")
    single = [("cat.",), ("and/or a cat",), ("a cat" * 1000,)]
    for texts in ((), *single, ("a.b", "c/d"), (str(file), "a dog")):
        assert read_prompts(texts) == texts
    argv = ["--prompts", str(file), "--output_dir", "o", "--pretrained_model_name_or_path", "p"]
    for settings in (BenchmarkConfig, PlanConfig, TuneDotConfig):
        assert parse_config(settings, argv).prompts == ("a cat", "a dog")
    file.write_text("s/he\n")  # read once, and not taken for a file's name then
    assert BenchmarkConfig(prompts=(str(file),), device="cpu").resolved().prompts == ("s/he",)
    file.write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        read_prompts((str(file),))
    with pytest.raises(ValueError, match=r"nowhere\.txt, which does not exist"):
        read_prompts((str(tmp_path / "nowhere.txt"),))
    for mistyped in ("prompts.json", "data/prompts", "no where.txt"):
        with pytest.raises(ValueError, match="which does not exist"):
            read_prompts((mistyped,))


def test_prompts_give_a_clip_score(clip_folder, tmp_path):  # noqa: F811
    real, fake = write_images(tmp_path / "real"), write_images(tmp_path / "fake", 5, seed=1)
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    options = {"extractor": "clip", "clip_model": str(clip_folder), "device": "cpu"}
    options |= {"real": real, "fake": fake, "batch_size": 2}
    result = run_fid(FidConfig(**options, prompts=(str(tmp_path / "p.txt"),)))
    assert {"cmmd", "clip_score", "frechet"} < set(result["rows"][0]["scores"])
    extractor = FidConfig(**options).load_extractor(torch.device("cpu"))
    pixels = [np.array(Image.open(file)) for file in sorted(Path(fake).glob("*.png"))]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    text = extractor.embed_text(["a cat", "a dog"] * 2 + ["a cat"])
    expected = 100 * (extractor.compute(images)[0] * text).sum(dim=1).clamp(min=0).mean()
    assert score(result, "clip_score") == pytest.approx(float(expected), rel=1e-4)
    for name in ("class_names", "prompts"):
        named = run_fid(FidConfig(**options, **{name: ("a cat", "a dog")}))
        assert score(named, "clip_score") == score(result, "clip_score")
    (Path(fake) / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="which prompt belongs to which image"):
        run_fid(FidConfig(**options, prompts=(str(tmp_path / "p.txt"),)))


def test_numbers_of_classes_are_no_words_to_score():
    clip = SimpleNamespace(has_logits=False, embed_text=print)
    words = ("cat", "dog")
    for names, nothing in ((("207", "3"), True), (words, False), (("7", "cat"), False), ((), True)):
        config = FidConfig(pipeline="dit", class_names=names, num_inference_steps=(2,))
        assert measures_nothing(config, clip) is nothing
        assert _prompts(config, of_classes=True) == (words if names == words else ())


def test_schedulers_that_draw_noise_are_told(tiny_folder, tmp_path):  # noqa: F811
    options = {"pipeline": str(tiny_folder), "num_inference_steps": (2,), "num_images": 2}
    options |= {"reference_steps": 3, "device": "cpu"}
    for scheduler, count in (("ddpm", 1), ("ddim", 0), ("sde-dpmsolver++", 1)):
        config = FidConfig(**options, scheduler=scheduler, output_dir=tmp_path / scheduler)
        result = run_fid(config)
        notes = [note for note in result["rows"][1]["notes"] if "fresh noise" in note]
        assert len(notes) == count
    # DPM-Solver's config has an infinity, which JSON has no word for.
    json.dumps(result, allow_nan=False)
    assert result["rows"][1]["made_with"]["scheduler_config"]["lambda_min_clipped"] == "-inf"
