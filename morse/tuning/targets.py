"""Where runs of many Dash evaluations end: what the runs of Dot's plans are to come near to."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.denoisers import find_denoiser
from morse.dot.view import fingerprint
from morse.training.cache import claim_folder, with_progress
from morse.training.checkpoint import atomic_save_file, read_tensors
from morse.tuning.config import TuneDotConfig
from morse.tuning.sampler import SampledRun

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD_SAMPLES = 256


class Targets:
    """Samples by number; the loop takes the first `length` of them to train on."""

    def __init__(self, samples: Tensor, length: int) -> None:
        """Keep all samples, (N, C, H, W)."""
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        """Give the number of samples to train on."""
        return self.length

    def __getitems__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Give the numbers (B,) and their samples (B, C, H, W)."""
        chosen = torch.tensor(numbers)
        return chosen, self.samples[chosen]

    @property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """Numbers and samples that are not trained on."""
        return self.__getitems__(range(self.length, len(self.samples)))


def prepare_targets(
    sampled: SampledRun, index: int, config: TuneDotConfig, accelerator: "Accelerator"
) -> Targets:
    """Make the missing shards of targets, shared out among the processes, and read all of them.

    A shard appears whole or not at all, so that a killed run goes on at the shard where it was.

    Args:
        sampled: What samples.
        index: Of the run to sample by.
        config: How many, and where they are kept.
        accelerator: The run's.

    Raises:
        ValueError: If the folder holds targets made with other settings.
    """
    folder = config.cache_dir or config.output_dir / "targets"
    total = config.num_images + config.validation_images
    if accelerator.is_main_process:
        claim_folder(folder, _describe(sampled, index, config))
    accelerator.wait_for_everyone()
    count = -(-total // SHARD_SAMPLES)
    paths = [folder / f"targets-{number:05d}.safetensors" for number in range(count)]
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    missing = [number for number in mine if not paths[number].exists()]
    label = f"evaluating Dash, {SHARD_SAMPLES} runs a shard"
    for number in with_progress(missing, label, accelerator):
        first = number * SHARD_SAMPLES
        numbers = torch.arange(first, min(first + SHARD_SAMPLES, total))
        with torch.no_grad():
            parts = [sampled(part, index).cpu() for part in numbers.split(config.train_batch_size)]
        atomic_save_file({"samples": torch.cat(parts)}, paths[number])
    accelerator.wait_for_everyone()
    samples = torch.cat([read_tensors(path)["samples"] for path in paths])
    return Targets(samples, config.num_images)


def _describe(sampled: SampledRun, index: int, config: TuneDotConfig) -> dict[str, object]:
    """What the targets depend on."""
    scheduler, plan, _ = sampled.runs[index]
    asked = repr((config.prompts, config.class_names)).encode()
    return {
        "dash": fingerprint(find_denoiser(sampled.pipe)),
        "scheduler": type(scheduler).__name__,
        "plan": plan.plan,
        "scheduler_options": dict(plan.scheduler),
        "samples": config.num_images + config.validation_images,
        "seed": config.seed,
        "guidance_scale": config.guidance_scale,
        "conditions": hashlib.sha256(asked).hexdigest()[:12],
    }
