"""How near a tuning's runs come to their targets on noises that are not trained on."""

import torch

from morse.evaluation.metrics import psnr
from morse.training.run import TrainingRun
from morse.tuning.loss import MAX_PSNR
from morse.tuning.progress import Progress
from morse.tuning.sampler import SampledRun
from morse.tuning.targets import Targets


class Validation:
    """Judges the Dot in training from time to time; for the main process alone.

    Args:
        training: Trains a `SampledRun`; its config says how often to judge.
        targets: Of the runs, held-out ones among them.
        progress: Keeps what is found.
    """

    def __init__(self, training: TrainingRun, targets: Targets, progress: Progress) -> None:
        """Take over what is judged and how it is told."""
        self.training, self.targets, self.progress = training, targets, progress
        self.config, self.accelerator = training.config, training.accelerator

    def begin(self) -> None:
        """Judge before the first update, where that was not done yet."""
        step = self.training.step
        self.progress.begin(self.training.choices, step)
        self.after_step(step)  # which a run that was interrupted may not have come to
        if not self.progress.decibels:
            self.validate(step)

    def after_step(self, step: int) -> None:
        """Judge at every `validation_steps`, once each."""
        every = self.config.validation_steps
        if every and step % every == 0:
            self.validate(step)

    def validate(self, step: int) -> dict[str, float]:
        """Give what `judge` says of the averaged weights at a step, kept from an earlier call."""
        found = self.progress.decibels
        if step not in found:
            with self.training.averaged():
                self.progress.add(step, self.judge(f"step {step}"))
            self.accelerator.log(found[step], step=step)
        return found[step]

    def judge(self, title: str) -> dict[str, float]:
        """Give and print the decibels of the present weights, by the runs' names."""
        decibels = judge(self.training.model, self.targets, self.config.train_batch_size)
        shown = "; ".join(f"{name}: {value:.2f} dB" for name, value in decibels.items())
        self.accelerator.print(f"{title}: {shown}")
        return decibels

    def warn_if_worse(self, saved: dict[str, float]) -> None:
        """Tell which plans are worse with the Dot that is saved than before the first update."""
        found = self.progress.decibels
        if worse := worse_plans(found[min(found)], saved):
            self.accelerator.print(
                f"worse than before with {'; '.join(worse)}: try a lower --learning_rate, more "
                "--num_images, or a lower --blend"
            )


@torch.no_grad()
def judge(sampled: SampledRun, targets: Targets, batch_size: int) -> dict[str, float]:
    """Give, for each way, the mean of -10 log10 of the held-out runs' squared errors.

    Of images in [0, 1] that is PSNR, in dB.
    """
    numbers, wanted = targets.held_out
    found = {}
    for index, run in enumerate(sampled.runs):
        parts = [sampled(part, index).cpu() for part in numbers.split(batch_size)]
        found[run.name] = float(psnr(torch.cat(parts), wanted[:, run.target], MAX_PSNR).mean())
    return found


def worse_plans(first: dict[str, float], last: dict[str, float]) -> list[str]:
    """Name the plans whose held-out runs have fewer decibels in the last than in the first."""
    return [name for name in first if last[name] < first[name]]
