"""train_dot for pipelines with text and classes, from data on disk to a Dot in the pipeline."""

import json
import pickle
import re
from dataclasses import replace
from functools import partial
from operator import attrgetter

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file
from tiny_pipelines import xl_unet
from tiny_text import dit_pipeline, sd3_pipeline, text_pipeline, xl_pipeline
from torch.testing import assert_close
from train_runs import copy_unfinished, dot_arguments, weights

from morse import MorseDot, MorsePipeline, enable_morse
from morse.cli import parse_config
from morse.training.batches import StepBatches
from morse.training.cache import WindowCache, _describe, _join, prepare_cache
from morse.training.cache_sizes import window_shards
from morse.training.common import make_accelerator
from morse.training.conditions import ConditionEncoder
from morse.training.frozen import load_frozen_pipeline
from morse.training.graphs import _OnPairs, _tensors
from morse.training.latent_cache import cache_latents
from morse.training.loop import TrainDotConfig, train_dot
from morse.training.pairs import dot_outputs
from morse.training.source import open_source
from morse.training.windows import pick_pairs

NAMES = ("cat", "dog", "emu")
OPTIONS = """--train_batch_size 3 --max_train_steps 5 --lr_warmup_steps 2 --learning_rate 1e-2
    --checkpointing_steps 4 --logging_steps 2 --validation_steps 0 --validation_images 4 --seed 3
    --num_down_blocks 1 --block_out_channels 4 --lora_rank 2"""
CACHE = ("--cache_pairs", "40", "--window_steps", "3", "--pairs_per_window", "2",
         "--timestep_sampling", "plans")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    text_pipeline().save_pretrained(folder)
    return folder


arguments = partial(dot_arguments, OPTIONS)


@pytest.fixture(scope="module")
def run(base, data_dir, tmp_path_factory):
    """A function that trains into a new folder."""

    def train(*options, base=base, names=NAMES):
        AcceleratorState._reset_state(reset_partial_state=True)  # else precisions can't differ
        output_dir = tmp_path_factory.mktemp("runs") / "run"
        named = ("--class_names", *names) if names else ()
        given = arguments(base, data_dir, output_dir, *named, *options)
        return train_dot(parse_config(TrainDotConfig, given))

    return train


@pytest.fixture(scope="module")
def whole_run(run):
    return run(*CACHE)


@pytest.fixture(scope="module")
def source(base, data_dir, tmp_path_factory):
    """The training images of a config with a small cache, and that config."""
    output_dir = tmp_path_factory.mktemp("source")
    given = arguments(base, data_dir, output_dir, "--class_names", *NAMES, *CACHE)
    config = parse_config(TrainDotConfig, given)
    return open_source(load_frozen_pipeline(config, torch.device("cpu")), config, "train"), config


def sample(base, folder, plan, **options):
    pipe = MorsePipeline.from_pretrained(base, dot=folder)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(list(NAMES), plan=plan, output_type="latent",
                   generator=torch.Generator().manual_seed(0), **options).images  # fmt: skip
    return latents, pipe.last_run


@pytest.mark.supports("training", "StableDiffusionPipeline")
class TestStableDiffusion:
    def test_the_result_works_in_the_pipeline(self, whole_run, base):
        latents, last_run = sample(base, whole_run, "DooDo")
        assert latents.isfinite().all() and last_run.num_dot == 3 and not last_run.fallbacks
        assert any(value.abs().max() > 0 for name, value in weights(whole_run).items()
                   if name.startswith("conv_out"))  # fmt: skip

    def test_overfitted_it_beats_reuse(self, run, base, tmp_path):
        """On the way that Dash's own estimates lead."""
        folder = run(*CACHE, "--max_train_steps", "40", "--train_batch_size", "4",
                     "--checkpointing_steps", "40", "--ema_max_decay", "0.8",
                     "--guidance_scale", "3", "3")  # fmt: skip
        dash = MorsePipeline.from_pretrained(base).unet
        MorseDot.from_dash(dash, 1, (4,), lora_rank=2).save_pretrained(tmp_path)
        expected, _ = sample(base, folder, "D" * 10, guidance_scale=3.0)
        trained, reuse = (
            (sample(base, dot, "Do" * 5, guidance_scale=3.0)[0] - expected).square().mean()
            for dot in (folder, tmp_path)  # one that is not trained says nothing
        )
        assert trained < 0.9 * reuse

    @pytest.mark.parametrize(
        "options",
        [
            ("--cache_latents", "--on_policy", "--window_steps", "2"),
            (*CACHE, "--mixed_precision", "bf16", "--base_space", "x0"),
            ("--mixed_precision", "bf16", "--guidance_scale", "1", "1", "--independent"),
            ("--no-even_guidance", "--guidance_scale", "1", "5", "--loss_weighting", "gap"),
        ],
    )
    def test_options_run(self, run, base, options):
        folder = run(*options)
        wanted = "x0" if "--base_space" in options else None
        assert MorseDot.from_pretrained(folder).config.base_space == wanted
        assert (folder / "validation" / "step-0000005.png").is_file()
        assert sample(base, folder, "Do")[0].isfinite().all()

    @pytest.mark.parametrize("options", [CACHE, ("--cache_latents",)])
    def test_resumed_it_gives_the_same_bits(
        self, run, whole_run, base, data_dir, options, tmp_path
    ):
        whole = whole_run if options == CACHE else run(*options)
        copy_unfinished(whole, tmp_path / "run", 5)
        given = arguments(base, data_dir, tmp_path / "run", "--class_names", *NAMES, *options,
                          "--resume_from_checkpoint", "latest")  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
        resumed = train_dot(parse_config(TrainDotConfig, given))
        assert_close(weights(resumed), weights(whole), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("kept", "options", "rests"), [(1024, (), 1), (2, (), 0), (2, CACHE, 1)]
    )
    def test_text_encoders_rest_once_nothing_is_encoded(
        self, run, monkeypatch, kept, options, rests
    ):
        found = []
        monkeypatch.setattr("morse.training.conditions.MOST_KEPT", kept)
        monkeypatch.setattr(ConditionEncoder, "rest", lambda encoder: found.append(encoder))
        run(*options, "--max_train_steps", "1")
        assert len(found) == rests

    def test_latents_are_encoded_once(self, source, run, monkeypatch):
        monkeypatch.setattr("morse.training.cache_sizes._LARGEST_SHARD", 600)  # four latents
        folder = run("--cache_latents", "--max_train_steps", "1")
        parts = sorted((folder / "latents").glob("*.safetensors"))
        assert len(parts) == 3
        cached = torch.cat([load_file(part)["latents"] for part in parts])
        images, _ = source
        assert_close(cached.float(), images.clean(images.__getitems__(list(range(10)))),
                     rtol=1e-3, atol=1e-3)  # fmt: skip

    def test_latents_of_other_images_are_refused(self, source, tmp_path, monkeypatch):
        images, config = source
        config, accelerator = replace(config, cache_dir=tmp_path), make_accelerator(config)
        cache_latents(images, config, accelerator)
        with monkeypatch.context() as patch:
            patch.setattr(images.images, "contents", lambda: "others")
            with pytest.raises(ValueError, match=r"settings \(image_files was .*others.\)"):
                cache_latents(images, config, accelerator)
        told = json.loads((tmp_path / "cache.json").read_text())
        assert told["scaling"]["scaling_factor"] == images.pipeline.codec.vae.config.scaling_factor


def test_processes_that_load_data_get_images_and_numbers_alone(source):
    images, _ = source
    copied = pickle.loads(pickle.dumps(images))
    assert copied.pipeline is copied.table is None
    assert all(map(torch.equal, copied.__getitems__([3, 0]), images.__getitems__([3, 0])))


class TestCache:
    @pytest.fixture(scope="class")
    def shards(self, source, tmp_path_factory):
        """Paths of two shards, of 32 and 8 windows; so many a shard has until the class ends."""
        patch = pytest.MonkeyPatch()
        patch.setattr("morse.training.cache_sizes.MOST_ROWS", 32)
        cache = prepare_cache(*source, make_accelerator(source[1]))
        assert len(cache.shards) == 2
        yield sorted((source[1].output_dir / "pairs").glob("*.safetensors"))
        patch.undo()

    def test_a_caption_is_kept_once(self, source, shards):
        shard = load_file(shards[0])
        assert window_shards(*source)(32) == sum(
            value.nbytes for name, value in shard.items() if not name.startswith("negative")
        )
        assert shard["conditions/encoder_hidden_states"].shape == (3, 8, 8)
        assert shard["negative/encoder_hidden_states"].shape == (1, 8, 8)
        assert shard["outputs"].shape == (32, 4, 2, 4, 4, 4)
        assert shard["rows"].unique().tolist() == [0, 1, 2]
        assert shard["guidance_scale"].min() >= 2 and shard["guidance_scale"].max() <= 10

    def test_shards_go_on_where_the_one_before_ended(self, source, shards):
        images, config = source
        first, second = map(load_file, shards)
        ((*order,),) = StepBatches(len(images), 40, config.seed, 0, 1)
        assert torch.equal(torch.cat([first["rows"], second["rows"]]), images.numbers[order])
        assert not torch.equal(first["guidance_scale"][:8], second["guidance_scale"])

    def test_windows_come_with_their_conditions(self, source, shards):
        """Dash's outputs there, evaluated again, are those of the cache."""
        indices, dash = torch.tensor([39, 0, 31, 32, 5]), source[0].pipeline.dash
        joined = WindowCache(shards, torch.device("cpu"))
        joined.shards = [_join(joined.shards, torch.device("cpu"))]  # as on CUDA
        for cache in (WindowCache(shards, torch.device("cpu")), joined):
            window = cache.gather(indices)
            for point in range(4):
                found = dash(window.samples[:, point].float(), window.timesteps[:, point].long(),
                             window.conditions)  # fmt: skip
                assert_close(found, window.outputs[:, point].float(), rtol=2e-3, atol=2e-3)

    def test_other_conditions_are_refused(self, source, shards, run):
        folder = shards[0].parent
        for options, name in (
            (("--guidance_scale", "2", "7"), "guidance_scale"),
            (("--class_names", "cat", "dog", "fox"), "conditions"),
            (("--class_names", "dog", "cat", "emu"), "conditions"),
        ):
            with pytest.raises(ValueError, match=rf"settings \({name} was [^;]*\); give another"):
                run(*CACHE, "--cache_dir", str(folder), *options)

    @pytest.mark.parametrize(
        ("options", "noted"),
        [
            ({"dtype": "float16", "mixed_precision": "fp16"}, "dtype"),
            ({"timestep_sampling": "uniform"}, "timestep_sampling"),
            ({"seed": 4}, "seed"),
        ],
    )
    def test_settings_are_noted(self, source, options, noted):
        (images, config), before = source, _describe(*source)
        now = _describe(images, replace(config, **options))
        assert {name for name in now if now[name] != before[name]} == {noted}

    @pytest.mark.parametrize(
        ("part", "attribute", "value", "noted"),
        [
            ("", "resolution", 16, "resolution"),
            ("dash", "prediction_type", "sample", "prediction_type"),
            ("dash.schedule", "sigmas", torch.ones(3), "schedule"),
        ],
    )
    def test_the_pipeline_is_noted(self, source, monkeypatch, part, attribute, value, noted):
        before, found = _describe(*source), source[0].pipeline
        if part:
            found = attrgetter(part)(found)
        monkeypatch.setitem(vars(found), attribute, value)  # of frozen dataclasses
        now = _describe(*source)
        assert {name for name in now if now[name] != before[name]} == {noted}

    def test_networks_and_scaling_are_noted(self, source):
        before, pipeline = _describe(*source), source[0].pipeline
        dash = pipeline.dash.model.conv_in.weight
        weight = pipeline.encoder.models[0].get_input_embeddings().weight
        vae, scaling = pipeline.codec.vae, pipeline.codec.vae.config.scaling_factor
        with torch.no_grad():
            weight.neg_()
            dash.neg_()
        vae.register_to_config(scaling_factor=0.7)
        now = _describe(*source)
        with torch.no_grad():
            weight.neg_()
            dash.neg_()
        vae.register_to_config(scaling_factor=scaling)
        changed = {name for name in now if now[name] != before[name]}
        assert changed == {"dash", "text_encoders", "scaling"}
        assert json.loads(json.dumps(before)) == before

    def test_graphs_get_the_conditions(self, source, shards):
        """As CUDA graphs call it, with tensors alone."""
        dash = source[0].pipeline.dash
        window = WindowCache(shards, torch.device("cpu")).gather(torch.tensor([1, 33]))
        pairs = pick_pairs(dash, window, 2, torch.Generator().manual_seed(0), first=False)
        dot = MorseDot.from_dash(dash.model, 1, (4,), lora_rank=2)
        torch.nn.init.normal_(dot.conv_out.weight)
        names = tuple(pairs.conditions.flat_inputs())
        residual = _OnPairs(dot, names)(*_tensors(pairs))
        assert_close(pairs.outputs(residual), dot_outputs(dot, pairs))


@pytest.mark.supports("training", "StableDiffusionXLPipeline")
def test_xl(run, tmp_path):
    xl_pipeline(xl_unet()).save_pretrained(tmp_path)
    folder = run(*CACHE, base=tmp_path)
    shard = load_file(folder / "pairs" / "windows-00000.safetensors")
    assert shard["conditions/added_cond_kwargs.time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]] * 3
    assert sample(tmp_path, folder, "DooDo")[0].isfinite().all()


@pytest.mark.supports("training", "UNet2DModel with classes")
def test_classes_without_guidance(run, build_unet, data_dir, tmp_path):
    unet = build_unet(channels=(8, 8), sample_size=8, num_class_embeds=3)
    DDPMPipeline(unet, DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    folder = run(*CACHE, base=tmp_path, names=None)
    shard = load_file(folder / "pairs" / "windows-00000.safetensors")
    assert shard["conditions/class_labels"].tolist() == [0, 1, 2]
    assert shard["outputs"].shape[2] == 1 and "guidance_scale" not in shard
    labels = data_dir / "train-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:8] + content[8:][::-1])
    try:
        with pytest.raises(ValueError, match=r"settings \(conditions was [^;]*\);"):
            run(*CACHE, "--cache_dir", str(folder / "pairs"), base=tmp_path, names=None)
    finally:
        labels.write_bytes(content)


@pytest.mark.supports("training", "DiTPipeline", "StableDiffusion3Pipeline")
def test_transformers(run, tmp_path):
    """Class-conditional with a learned variance, and flow matching, saved without its T5."""
    for pipe, names, call in (
        (dit_pipeline(), None, {"class_labels": [1, 2]}),
        (sd3_pipeline(), NAMES, {"prompt": ["cat", "dog"]}),
    ):
        base = tmp_path / type(pipe).__name__
        pipe.save_pretrained(base)
        folder = run(*CACHE, base=base, names=names)
        enable_morse(pipe, MorseDot.from_pretrained(folder))
        images = pipe(**call, plan="DooDo", output_type="pt").images
        assert torch.as_tensor(images).isfinite().all() and pipe.last_run.num_dot == 3


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--guidance_scale", "7"), "guidance_scale is .7.0,.; it must be two numbers"),
            (("--guidance_scale", "5", "2"), "guidance_scale is .5.0, 2.0.; it must be two"),
            (("--class_names", "a", "--caption_column", "text"), "caption_column is 'text' and"),
            (("--cache_latents", "--cache_pairs", "3"), "cache_latents is True and cache_pairs"),
            (("--cache_dir", "runs/pairs"), "cache_dir is runs/pairs, but nothing is kept there"),
        ],
    )
    def test_they_are_checked(self, base, data_dir, tmp_path, options, message, capsys):
        with pytest.raises(SystemExit):
            parse_config(TrainDotConfig, arguments(base, data_dir, tmp_path, *options))
        found = capsys.readouterr().err
        assert re.search(message, found), found

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "give --caption_column, or --class_names"),
            (("--caption_column", "text"), "caption_column is 'text', but IDX files"),
            (("--class_names", "cat"), "class_names has 1 names, but labels go up to 2"),
        ],
    )
    def test_text_is_needed(self, run, options, message):
        with pytest.raises(ValueError, match=message):
            run(*options, names=None)

    def test_text_for_a_pipeline_without(self, run, make_pipe, tmp_path):
        make_pipe().save_pretrained(tmp_path)
        for options, message in (
            (("--class_names", *NAMES), "this pipeline takes no text"),
            (("--cache_latents",), "this pipeline works on pixels"),
        ):
            with pytest.raises(ValueError, match=message):
                run(*options, base=tmp_path, names=None)
