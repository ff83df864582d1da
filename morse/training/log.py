"""What a training run reports while it runs."""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.training.common import RunConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingLog:
    """Mean losses, rates and speed: to the tracker, to the terminal's bar, or as lines."""

    def __init__(self, config: RunConfig, accelerator: "Accelerator", step: int) -> None:
        """Start the bar at `step`."""
        from rich.progress import Progress

        self.config, self.accelerator = config, accelerator
        self.total, self.count = torch.zeros((), device=accelerator.device), 0
        self.time = time.monotonic()
        self.bar = Progress()
        self.bar.disable = not (self.bar.console.is_terminal and accelerator.is_main_process)
        self.bar.start()
        self.task = self.bar.add_task("training", total=config.max_train_steps, completed=step)

    def add(self, loss: Tensor) -> None:
        """Add one loss without waiting for the device."""
        self.total += loss
        self.count += 1

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Report every `logging_steps` updates; only then is the device waited for."""
        self.bar.update(self.task, completed=step)
        if step % self.config.logging_steps and step != self.config.max_train_steps:
            return
        loss = self._mean_loss(step)
        now, rate = time.monotonic(), optimizer.param_groups[0]["lr"]
        images = self.count * self.config.train_batch_size * self.accelerator.num_processes
        speed = images / max(now - self.time, 1e-9)
        self.accelerator.log({"loss": loss, "lr": rate, "images_per_second": speed}, step=step)
        text = f"loss {loss:.4f}, lr {rate:.2e}, {speed:.0f} images/s"
        self.bar.update(self.task, description=text)
        if self.bar.disable:
            self.accelerator.print(f"step {step}/{self.config.max_train_steps}: {text}", flush=True)
        self.time, self.count = now, 0
        self.total.zero_()

    def check(self, step: int) -> None:
        """Raise `ValueError` if a loss since the last report was nan, as `after_step` would."""
        if self.count:
            self._mean_loss(step)

    def _mean_loss(self, step: int) -> float:
        loss = self.accelerator.reduce(self.total / self.count, reduction="mean").item()
        if loss != loss:
            raise ValueError(f"the loss is nan at step {step}; try a lower --learning_rate")
        return loss

    def close(self) -> None:
        """End the bar."""
        self.bar.stop()
