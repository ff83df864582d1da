"""Train a Dot for a pretrained denoiser (Morse, ICML 2025, Algorithm 1)."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from morse.dot import MorseDot
from morse.training.cache import WindowCache, prepare_cache
from morse.training.checkpoint import read_tensors
from morse.training.config import TrainDotConfig
from morse.training.data import open_images, to_model_range
from morse.training.frozen import FrozenDash, load_frozen_dash
from morse.training.graphs import GraphedDot
from morse.training.run import LossFunction, TrainingRun, begin_run
from morse.training.validation import make_validator
from morse.training.windows import Window, fresh_window, pick_pairs, weighted_loss

__all__ = ["TrainDotConfig", "train_dot"]


def build_dot(dash: FrozenDash, config: TrainDotConfig) -> MorseDot:
    """Build the Dot that `config` describes, with seeded weights or those of `init_from`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        dot = MorseDot.from_dash(
            dash.model,
            num_down_blocks=config.num_down_blocks,
            block_out_channels=config.block_out_channels,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            layers_per_block=config.layers_per_block,
            independent=config.independent,
        )
    if config.init_from is not None:
        path = Path(config.init_from) / "diffusion_pytorch_model.safetensors"
        dot.load_state_dict(read_tensors(path))
    return dot


def window_loss(
    dash: FrozenDash, config: TrainDotConfig, cache: WindowCache | None
) -> LossFunction:
    """Give Algorithm 1's loss over pairs from fresh windows, or from cached ones."""

    graphed: list[GraphedDot] = []

    def compute_loss(dot: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        if cache is not None:
            window: Window = cache.gather(batch)
        else:
            window = fresh_window(
                dash,
                to_model_range(batch),
                generator,
                config.window_steps + 1,
                config.timestep_sampling,
                dash.alphas_cumprod,
                dash.prediction_type,
                dot if config.on_policy else None,
            )
        pairs = pick_pairs(window, config.pairs_per_window, generator, first=config.on_policy)
        if config.cuda_graphs and not graphed:
            graphed.append(GraphedDot(dot))
        # The wrapped module is called, so that several processes share their gradients.
        residual = (
            graphed[0].residual(pairs)
            if config.cuda_graphs
            else dot(pairs.sample, pairs.timestep, pairs.jump)
        )
        estimate = residual if config.independent else pairs.jump.model_output + residual
        return weighted_loss(estimate, pairs, config.loss_weighting)

    return compute_loss


def train_dot(config: TrainDotConfig) -> Path:
    """Train a Dot and save it into `config.output_dir` for `MorseDot.from_pretrained`."""
    accelerator = begin_run(config)
    dash = load_frozen_dash(config.pretrained_model_name_or_path, accelerator.device)
    dot = build_dot(dash, config)
    trained = copy.deepcopy(dot).bind(dash.model).eval()  # takes the averaged weights
    resolution = config.resolution or dash.model.config.sample_size
    train, test = (
        open_images(
            config.train_data_dir,
            config.dataset_name,
            resolution,
            dash.model.config.in_channels,
            split=split,
            image_column=config.image_column,
        )
        for split in ("train", "test")
    )
    cache = prepare_cache(dash, train, config, accelerator) if config.cache_pairs else None
    run = TrainingRun(config, accelerator, dot, cache or train, window_loss(dash, config, cache))
    validate = make_validator(
        dash, test, config.validation_images, config.timestep_sampling, config.output_dir
    )

    def after_step(step: int) -> None:
        if config.validation_steps and step % config.validation_steps == 0:
            run.copy_weights_to(trained)
            ratios = validate(trained, step)
            accelerator.log(ratios, step=step)
            accelerator.print(f"step {step}: residual ratio {ratios['residual_ratio']:.4f}")

    step = run.train(after_step)
    if accelerator.is_main_process:
        run.copy_weights_to(trained)
        ratios = validate(trained, step)
        accelerator.print(f"residual error / reuse error on held-out images: {ratios}")
        trained.save_pretrained(config.output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return config.output_dir
