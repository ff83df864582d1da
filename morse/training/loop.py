"""Train a Dot for a pretrained denoiser (Morse, ICML 2025, Algorithm 1)."""

import copy
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from morse.dot import MorseDot
from morse.dot.hub import renew_card
from morse.training.cache import WindowCache, prepare_cache
from morse.training.checkpoint import find_checkpoint
from morse.training.config import TrainDotConfig
from morse.training.convolutions import (
    annealing_steps,
    make_annealer,
    parse_conv_options,
    settle,
    warn_unless_annealed,
)
from morse.training.distillation import DistilledDot, add_distillation
from morse.training.dot_checks import check_size, check_window_steps
from morse.training.frozen import FrozenPipeline, load_frozen_pipeline
from morse.training.gate import calibration_pairs, fit_gate
from morse.training.graphs import GraphedDot
from morse.training.latent_cache import cache_latents
from morse.training.output import begin_run, claim_output, record_run
from morse.training.pairs import weighted_loss
from morse.training.progressive import first_stage, grow, second_stage, start_from
from morse.training.pruned import keep_zeros
from morse.training.pruning import DotPruner
from morse.training.run import LossFunction, TrainingRun
from morse.training.sequences import sequence_loss, sequence_pairs
from morse.training.source import (
    Batch,
    ConditionedImages,
    draw_windows,
    open_source,
)
from morse.training.start import DOT_OPTIONS, check_start, inherit, load_start
from morse.training.validation import make_validator, validation_picture
from morse.training.windows import pick_pairs

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainDotConfig", "train_dot"]

_RECORDS = ("speed_ratio", "plan_ratio", "plans")


def build_dot(
    dash: nn.Module, config: TrainDotConfig, sample_size: tuple[int, int] | None = None
) -> MorseDot:
    """Build the Dot that `config` describes, with seeded weights or those of `init_from`.

    `sample_size` is that of the samples to train on; Dash's if None.

    Raises:
        ValueError: If the Dot of `init_from` cannot become that.
    """
    dot = _new_dot(dash, config, sample_size)
    if config.init_from is not None:
        start = load_start(config.init_from)
        check_start(dot, start, config.init_from)
        dot.set_mixture(start.mixture)  # it is of the data, whatever becomes of Dot
        start_from(dot, start)
        dot.register_to_config(sparse=start.config.sparse)
        if config.prune is None:  # else its surgery may bring weights back
            keep_zeros(dot, start)
        if config.max_train_steps == 0:  # the same Dot: what was recorded of it holds
            dot.register_to_config(**{name: start.config[name] for name in _RECORDS})
    return dot


def _new_dot(
    dash: nn.Module, config: TrainDotConfig, sample_size: tuple[int, int] | None
) -> MorseDot:
    """Build the Dot of `config` with seeded weights."""
    options = parse_conv_options(config.conv_options)
    if config.conv == "gridconv" and sample_size is not None:  # a square's side, as Dash names it
        options = {"sample_size": sample_size[0], **(options or {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        dot = MorseDot.from_dash(
            dash,
            **{name: getattr(config, name) for name in DOT_OPTIONS},
            conv_options=options,
            sample_size=None if config.resample == "nearest" else sample_size,
        )
    return nn.Module.float(dot)  # whatever Dash is in: updates are too small for half precision


def window_loss(
    source: ConditionedImages, config: TrainDotConfig, cache: WindowCache | None
) -> LossFunction:
    """Give Algorithm 1's loss over pairs from fresh windows, or from cached ones."""
    dash = source.pipeline.dash
    graphed: list[GraphedDot] = []

    def compute_loss(dot: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        if cache is not None:
            window = cache.gather(batch)
        else:
            maker = dot if config.on_policy else None
            window = draw_windows(source, config, batch, generator, maker)
            if maker is not None:
                # Casts of Dot's weights made there know no gradient; torch < 2.10 would reuse them.
                torch.clear_autocast_cache()
        if config.norm == "dnr":
            return sequence_loss(dot, sequence_pairs(dash, window), config)
        pairs = pick_pairs(dash, window, config.pairs_per_window, generator, config.on_policy)
        if config.cuda_graphs and not graphed:
            graphed.append(GraphedDot(dot))
        further: dict[str, object] = {"rng": generator} if config.distill else {}
        # The wrapped module is called, so that several processes share their gradients.
        residual = (
            graphed[0].residual(pairs)
            if config.cuda_graphs
            else dot(
                pairs.sample, pairs.timestep, pairs.jump, **further, **pairs.conditions.inputs()
            )
        )
        if config.distill:
            residual, features_loss = residual
        estimate = pairs.guided(pairs.outputs(residual, config.independent))
        loss = weighted_loss(estimate, pairs, config.loss_weighting, config.even_guidance)
        return loss + loss.detach() * features_loss if config.distill else loss

    return compute_loss


class _Data(NamedTuple):
    """Images to train on, those to validate on, and the windows that are cached of the former."""

    train: ConditionedImages
    test: ConditionedImages
    cache: WindowCache | None


def _open_data(
    pipeline: FrozenPipeline, config: TrainDotConfig, accelerator: "Accelerator"
) -> _Data:
    """Open the images, record the run, and make caches, which take long."""
    train, test = (open_source(pipeline, config, split) for split in ("train", "test"))
    record_run(config, accelerator)
    if config.cache_latents:
        train = cache_latents(train, config, accelerator)
    cache = prepare_cache(train, config, accelerator) if config.cache_pairs else None
    return _Data(train, test, cache)


def train_dot(config: TrainDotConfig) -> Path:
    """Train a Dot and save it for `MorseDot.from_pretrained`.

    Returns:
        Its folder: `config.output_dir`, or that of the first stage if time was up in it.
    """
    config = inherit(config)
    accelerator = claim_output(config)
    # If there are two stages, in the second: the first is over.
    goes_on = find_checkpoint(config.output_dir, config.resume_from_checkpoint) is not None
    left = config.max_train_seconds
    pipeline = load_frozen_pipeline(config, accelerator.device)
    stage = first_stage(config) if config.progressive_steps else config
    dot = build_dot(pipeline.dash.model, stage, pipeline.sample_size)
    if config.progressive_steps:  # whether it can be grown is told before its training
        grow(_new_dot(pipeline.dash.model, config, pipeline.sample_size), dot)
    check_size(config, pipeline)
    check_window_steps(config, pipeline)
    data = _open_data(pipeline, config, accelerator)
    if config.progressive_steps and not goes_on:
        first, started = begin_run(stage), time.monotonic()
        done = _train_stage(stage, first, dot, data)
        for tracker in first.trackers:
            tracker.finish()
        if left is not None:  # clocks differ, and processes must agree
            left = broadcast_object_list([left - (time.monotonic() - started)])[0]
        # More, where a resumed run was given fewer.
        goes_on = done >= config.progressive_steps and (left is None or left > 0)
    if config.progressive_steps and goes_on:
        stage = second_stage(config, left)
        dot = build_dot(pipeline.dash.model, stage, pipeline.sample_size)
    if stage.output_dir == config.output_dir:
        _train_stage(stage, accelerator, dot, data)
    else:
        accelerator.print(f"time was up in the first stage, at step {done}; resume to go on")
    accelerator.end_training()
    return stage.output_dir


def _train_stage(
    config: TrainDotConfig, accelerator: "Accelerator", dot: MorseDot, data: _Data
) -> int:
    """Train and save one Dot; the number of updates done is returned."""
    train, test, cache = data
    model = add_distillation(dot, train, config)
    dash = train.pipeline.dash.model
    trained = copy.deepcopy(model).bind(dash).eval()  # takes the averaged weights
    loss = window_loss(train, config, cache)
    pruner = None if config.prune is None else DotPruner(dot, config)
    told = {"conv_annealing_steps": annealing_steps(config)} if dot.conv_settings else {}
    data = train if cache is None else cache
    run = TrainingRun(config, accelerator, model, data, loss, pruner, told)
    # Its pairs, which may be many gigabytes, are kept.
    validate = make_validator(test, config) if accelerator.is_main_process else None
    if cache is not None or train.table.is_encoded:
        train.pipeline.encoder.rest()
    if dot.conv_settings is not None:
        accelerator.print(dot.convolution_summary())

    def result() -> MorseDot:
        run.copy_weights_to(trained)
        return settle(trained.finished() if isinstance(trained, DistilledDot) else trained)

    def after_step(step: int) -> None:
        if config.validation_steps and step % config.validation_steps == 0:
            ratios = validate(result(), step)
            accelerator.log(ratios, step=step)
            accelerator.print(f"step {step}: residual ratio {ratios['residual_ratio']:.4f}")

    if config.distill:
        accelerator.print("distill: Dash is evaluated once more for each training pair")
    step = run.train(after_step, make_annealer(dot, config), partial(validation_picture, config))
    warn_unless_annealed(dot, config, step)
    if accelerator.is_main_process:
        finished = result()
        if pruner is not None:
            finished.register_to_config(sparse=True)
        finished.save_pretrained(config.output_dir)  # first: what follows may run out of memory
        if config.fit_gate:
            pairs, ungated = calibration_pairs(test, config), finished.model_card()
            accelerator.print(fit_gate(finished, pairs, len(train.pipeline.dash.schedule)))
            renew_card(finished, config.output_dir, ungated)
            finished.save_pretrained(config.output_dir)
        ratios = validate(finished, step)
        accelerator.print(f"residual error / reuse error on held-out images: {ratios}")
        if pruner is not None:
            accelerator.print(pruner.summary())
    accelerator.wait_for_everyone()
    return step
