import numpy as np
import pytest
import torch
from idx_files import write_idx
from safetensors.torch import load_file
from train_runs import assert_same_run, copy_unfinished

from morse.cli import parse_config
from morse.training.text_dash import TrainTextDashConfig, train_text_dash
from morse.training.text_model import tokenize
from morse.training.vae import TrainVaeConfig, measure_psnr, measure_scale, train_vae

VAE = """--resolution 8 --block_out_channels 8 8 --train_batch_size 4 --max_train_steps 60
    --lr_warmup_steps 2 --learning_rate 1e-2 --ema_max_decay 0.5 --logging_steps 10"""
DASH = """--class_names bag boot --block_out_channels 8 16 --text_channels 16 --text_layers 1
    --train_batch_size 4 --max_train_steps 4 --lr_warmup_steps 1 --checkpointing_steps 2
    --save_images_steps 4 --logging_steps 2"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Bright bags and dark boots."""
    folder = tmp_path_factory.mktemp("data")
    labels = np.arange(12, dtype=np.uint8) % 2
    images = np.where(labels[:, None, None] == 0, 220, 40).astype(np.uint8)
    images = np.broadcast_to(images, (12, 8, 8)).copy()
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        for part in ("train", "t10k"):
            write_idx(folder / f"{part}-{name}-ubyte", array)
    return folder


@pytest.fixture(scope="module")
def vae_dir(data_dir, tmp_path_factory):
    options = ["--train_data_dir", str(data_dir), "--output_dir"]
    folder = tmp_path_factory.mktemp("runs") / "vae"
    return train_vae(parse_config(TrainVaeConfig, [*options, str(folder), *VAE.split()]))


def make_config(data_dir, vae_dir, output_dir, *options):
    paths = {"--train_data_dir": data_dir, "--vae": vae_dir, "--output_dir": output_dir}
    arguments = [str(part) for pair in paths.items() for part in pair]
    return parse_config(TrainTextDashConfig, [*arguments, *DASH.split(), *options])


@pytest.fixture(scope="module")
def whole_run(data_dir, vae_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train_text_dash(make_config(data_dir, vae_dir, folder))


def test_the_autoencoder_learns_and_its_latents_have_unit_variance(data_dir, vae_dir):
    from diffusers import AutoencoderKL

    from morse.training.data import open_images

    vae, device = AutoencoderKL.from_pretrained(vae_dir), torch.device("cpu")
    images = open_images(data_dir, 8, 1)
    assert measure_psnr(vae, images, device) > 15  # a constant grey has 8.5 dB
    scale = vae.config.scaling_factor
    assert scale == pytest.approx(measure_scale(vae, images, device), rel=1e-5)
    pixels = torch.stack([images[row] for row in range(12)]).float() / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mean * scale
    assert float(latents.detach().std()) == pytest.approx(1, rel=1e-4)


def test_a_failed_first_try_can_be_corrected(data_dir, vae_dir, tmp_path):
    def train(data):
        options = f"--train_data_dir {data} --output_dir {tmp_path / 'vae'} {VAE}"
        return train_vae(parse_config(TrainVaeConfig, [*options.split(), "--max_train_steps", "1"]))

    with pytest.raises(FileNotFoundError, match="does not exist"):
        train(data_dir / "absent")
    assert (train(data_dir) / "train_config.json").is_file()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train_text_dash(make_config(data_dir / "absent", vae_dir, tmp_path / "dash"))
    assert not any((tmp_path / "dash").iterdir())


@pytest.mark.parametrize(
    ("name", "value"), [("shift_factor", 0.1), ("latents_mean", [0.5] * 4), ("latents_std", [2.0])]
)
def test_latents_that_the_pipeline_would_not_decode(data_dir, vae_dir, tmp_path, name, value):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_dir)
    vae.register_to_config(**{name: value})
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=rf"vae is .*has {name}=.*only a scaling_factor"):
        train_text_dash(make_config(data_dir, tmp_path / "vae", tmp_path / "dash"))


def test_the_result_is_a_stable_diffusion_pipeline(whole_run):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(whole_run)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}

    def sample(prompt):
        return pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments).images

    assert sample("bag").shape == (1, 8, 8, 1)
    assert np.isfinite(sample("bag")).all() and not np.array_equal(sample("bag"), sample("boot"))
    assert (whole_run / "samples" / "step-0000004.png").is_file()


def test_prompts_become_whole_words(whole_run):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(whole_run / "tokenizer")
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    bag, boot, empty = tokenize(tokenizer, ["bag", "boot", ""]).tolist()
    assert len(bag) == 8 and empty == [start] + 7 * [end]
    assert bag[1] != boot[1] and bag[2:] == boot[2:] == 6 * [end]


def test_text_encoder_and_denoiser_both_learn(data_dir, vae_dir, whole_run, tmp_path):
    other = train_text_dash(make_config(data_dir, vae_dir, tmp_path, "--max_train_steps", "2"))
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        one, two = (load_file(run / part / f"{file}.safetensors") for run in (whole_run, other))
        assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_resumed_run_ends_at_the_same_bits(data_dir, vae_dir, whole_run, tmp_path):
    unfinished = copy_unfinished(whole_run, tmp_path / "run", 4)
    options = ("--resume_from_checkpoint", "latest")
    resumed = train_text_dash(make_config(data_dir, vae_dir, unfinished, *options))
    assert_same_run(resumed, whole_run, 4, "unet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--caption_column", "text"), "and caption_column is text; give exactly one of the two"),
        (("--text_channels", "20"), "text_channels is 20; it must be a multiple of 16"),
        (("--block_out_channels", "8"), "it must be two or more multiples of 8"),
        (("--proportion_empty_prompts", "2"), "proportion_empty_prompts is 2.0; it must be in"),
    ],
)
def test_bad_options(data_dir, vae_dir, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        make_config(data_dir, vae_dir, tmp_path, *options)
    assert message in capsys.readouterr().err


def test_too_few_names(data_dir, vae_dir, tmp_path):
    with pytest.raises(ValueError, match="class_names has 1 names, but labels go up to 1"):
        train_text_dash(make_config(data_dir, vae_dir, tmp_path, "--class_names", "bag"))
