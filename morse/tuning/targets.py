"""Where runs of many Dash evaluations end: what the runs of Dot's plans are to come near to."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.denoisers import find_denoiser
from morse.dot.fingerprint import fingerprint, identify
from morse.evaluation.digests import file_sha256
from morse.training.latents import LatentCodec
from morse.training.shards import digest, make_shards, read_shard
from morse.tuning.config import TuneDotConfig
from morse.tuning.sampler import SampledRun

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

    from morse.evaluation.conditions import Conditions

SHARD_SAMPLES = 256


class Targets:
    """Samples by number, one of each of T guidance scales; training takes the first `length`."""

    def __init__(self, samples: Tensor, length: int) -> None:
        """Keep all samples, (N, T, C, H, W)."""
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        """Give the number of samples to train on."""
        return self.length

    def __getitems__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Give the numbers (B,) and their samples (B, T, C, H, W)."""
        chosen = torch.tensor(numbers)
        return chosen, self.samples[chosen]

    @property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """Numbers and samples that are not trained on."""
        return self.__getitems__(range(self.length, len(self.samples)))


def describe_encoders(pipe: "DiffusionPipeline", conditions: "Conditions") -> dict[str, object]:
    """Say which text encoders the prompts are for, as JSON has it; call it while they are there."""
    if not conditions.prompts:
        return {}
    parts = (part for name, part in pipe.components.items() if name.startswith("text_encoder"))
    return {"text_encoders": [identify(part) for part in parts if part is not None]}


def prepare_targets(
    sampled: SampledRun,
    config: TuneDotConfig,
    accelerator: "Accelerator",
    encoders: Mapping[str, object],
) -> Targets:
    """Make the missing shards of targets, as `make_shards` does, and read all of them.

    Args:
        sampled: Samples them, by one run for each guidance scale.
        config: How many, and where they are kept.
        accelerator: The run's.
        encoders: From `describe_encoders`.

    Raises:
        ValueError: If the folder holds targets made with other settings.
    """

    ways = range(len(sampled.runs))

    @torch.no_grad()
    def make(rows: range) -> dict[str, Tensor]:
        parts = torch.tensor(rows).split(config.train_batch_size)
        samples = [torch.stack([sampled(part, way).cpu() for way in ways], 1) for part in parts]
        return {"samples": torch.cat(samples)}

    paths = make_shards(
        folder=config.cache_dir or config.output_dir / "targets",
        name="targets",
        total=config.num_images + config.validation_images,
        shard_size=SHARD_SAMPLES,
        label=f"evaluating Dash, {SHARD_SAMPLES} runs a shard",
        describe=lambda: _describe(sampled, config) | encoders,
        make=make,
        accelerator=accelerator,
    )
    return Targets(torch.cat([read_shard(path)["samples"] for path in paths]), config.num_images)


def _describe(sampled: SampledRun, config: TuneDotConfig) -> dict[str, object]:
    """What the targets depend on."""
    scheduler, plan = sampled.runs[0].scheduler, sampled.runs[0].plan
    settings = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
    return {
        **_describe_decoder(sampled),
        "dtype": config.dtype,
        "dash": fingerprint(find_denoiser(sampled.pipe)),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": digest(json.dumps(settings, sort_keys=True, default=str)),
        "plan": plan.plan,
        "scheduler_options": dict(plan.scheduler),
        "samples": config.num_images + config.validation_images,
        "output_type": sampled.output_type,
        "seed": config.seed,
        "guidance_scale": [run.guidance_scale for run in sampled.runs],
        "conditions": digest(repr(_asked_for(config))),
    }


def _describe_decoder(sampled: SampledRun) -> dict[str, object]:
    """Say what decodes the targets, if anything does."""
    vae = getattr(sampled.pipe, "vae", None)
    if vae is None or sampled.output_type == "latent":
        return {}
    return {"vae": identify(vae), "scaling": LatentCodec(vae).constants}


def _asked_for(config: TuneDotConfig) -> tuple[object, ...]:
    """Give what the targets are images of; embeddings by their file's contents."""
    file = config.prompt_embeds
    embeds = () if file is None else (file_sha256(file),)
    return (config.prompts, config.class_names, *embeds)
