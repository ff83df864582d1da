"""The loop that every training command runs; what is learnt comes in as a loss function."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from morse.training.batches import Batched, StepBatches, step_loader
from morse.training.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from morse.training.common import (
    RunConfig,
    learning_rate_at,
    make_ema,
    make_optimizer,
    set_learning_rate,
    step_generator,
)
from morse.training.log import TrainingLog
from morse.training.pruning import DotPruner
from morse.training.resuming import changed_settings, decisive_settings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

# (model, batch, generator) -> loss; a batch is what the dataset gives, on the model's device:
# images (B, C, H, W) uint8, or a tuple of them and what belongs to them.
LossFunction = Callable[[nn.Module, Tensor | tuple[Tensor, ...], torch.Generator], Tensor]


class TrainingRun:
    """A network in training: its optimizer, moving average, checkpoints and loop.

    Args:
        config: The settings.
        accelerator: From `begin_run` or `claim_output`.
        model: The network; only parameters that require gradients are trained, and only its own
            state dict is saved.
        dataset: Gives batches; `model` may be trained on several passes over it.
        compute_loss: Gives the mean loss of one batch, under autocast. All randomness must come
            from the generator it gets.
        pruner: What prunes the network, if it is pruned.
        choices: What else decides what a step does, as JSON has it: told if a resumed run differs.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: "Accelerator",
        model: nn.Module,
        dataset: Batched,
        compute_loss: LossFunction,
        pruner: DotPruner | None = None,
        choices: Mapping[str, object] | None = None,
    ) -> None:
        """Prepare everything and, if asked to, resume from a checkpoint."""
        self.config, self.accelerator, self.dataset = config, accelerator, dataset
        self.compute_loss, self.pruner, self.choices = compute_loss, pruner, dict(choices or {})
        self.started = time.monotonic()
        memory_format = (
            torch.channels_last if accelerator.device.type == "cuda" else torch.contiguous_format
        )
        self.model = model.to(accelerator.device, memory_format=memory_format).train()
        if config.compile:
            self.model.compile()
        self.wrapped, self.optimizer = accelerator.prepare(
            self.model, make_optimizer(self.model.parameters(), config)
        )
        self.ema: EMAModel | None = make_ema(self.model.parameters(), config)
        self.step = self.saved_step = 0
        self._resume()
        if config.lr_warmup_steps >= config.max_train_steps > 0:
            accelerator.print(
                f"warning: lr_warmup_steps is {config.lr_warmup_steps} and max_train_steps "
                f"{config.max_train_steps}, so that the rate ends at "
                f"{learning_rate_at(config, config.max_train_steps - 1):.1e} without reaching "
                f"{config.learning_rate:g}; give fewer --lr_warmup_steps"
            )

    def _resume(self) -> None:
        path = find_checkpoint(self.config.output_dir, self.config.resume_from_checkpoint)
        if path is None:
            return
        self.step, settings = load_checkpoint(
            path, self.pruner or self.model, self.optimizer, self.ema, self.accelerator.scaler
        )
        self.saved_step = self.step
        self.accelerator.print(f"resumed {path} at step {self.step}")
        for warning in changed_settings(
            settings, self._exactness(), self.config, self.optimizer, self.ema
        ):
            self.accelerator.print(f"warning: {warning}")

    def _exactness(self) -> dict[str, object]:
        """Give what decides what a step does."""
        settings = decisive_settings(self.config) | self.choices
        pruning = {} if self.pruner is None else self.pruner.settings
        sizes = {"images": len(self.dataset), "num_processes": self.accelerator.num_processes}
        return settings | pruning | sizes

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one.

        Raises:
            ValueError: If a weight is nan or infinite: the good checkpoints are to stay.
        """
        if self.saved_step == self.step:
            return
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise ValueError(
                f"weights are not finite at step {self.step}, and so are not saved; try a lower "
                "--learning_rate, from an earlier checkpoint or anew"
            )
        self.saved_step = self.step
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.config.output_dir,
                self.step,
                (self.pruner or self.model).state_dict(),
                self.optimizer,
                self.ema,
                self.accelerator.scaler,
                self._exactness(),
                self.config.checkpoints_total_limit,
            )

    def copy_weights_to(self, target: nn.Module) -> None:
        """Copy the averaged weights, or without `use_ema` the present ones, into a like network.

        Weights that are pruned now are zero there, whatever their average is.
        """
        if self.pruner is not None:
            averages = None if self.ema is None else self.ema.shadow_params
            target.load_state_dict(self.pruner.masked_state(averages))
            return
        target.load_state_dict(self.model.state_dict())
        if self.ema is not None:
            self.ema.copy_to(target.parameters())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights, if there are any, in the place of the present ones."""
        if self.ema is None:
            yield
            return
        parameters = list(self.model.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def train(
        self,
        after_step: Callable[[int], None] | None = None,
        before_step: Callable[[int], None] | None = None,
        outcome: Callable[[int], Path] | None = None,
    ) -> int:
        """Train up to `max_train_steps` or `max_train_seconds`, and save a checkpoint.

        Args:
            after_step: Called in the main process with the number of updates done.
            before_step: Called in every process with the number of updates done.
            outcome: Gives the file that `after_step` writes last: where a resumed run has none of
                the step it goes on from, as it was killed before, `after_step` makes it first.

        Returns:
            The number of updates done.
        """
        config, accelerator = self.config, self.accelerator
        batches = self._batches()
        interrupted = outcome is not None and self.step > 0 and not outcome(self.step).exists()
        if interrupted and accelerator.is_main_process:
            after_step(self.step)
        with closing(TrainingLog(config, accelerator, self.step)) as log:
            while self.step < config.max_train_steps and not self._out_of_time():
                set_learning_rate(self.optimizer, learning_rate_at(config, self.step))
                if self.pruner is not None:
                    self.pruner.before_step(self.step)
                if before_step is not None:
                    before_step(self.step)
                for micro_step in range(config.gradient_accumulation_steps):
                    log.add(self._forward_backward(next(batches), micro_step))
                self.step += 1
                log.after_step(self.step, self.optimizer)
                if self.step % config.checkpointing_steps == 0:
                    log.check(self.step)
                    self.save()
                if after_step is not None and accelerator.is_main_process:
                    after_step(self.step)
            log.check(self.step)
        self.save()
        if accelerator.is_main_process:
            limit = config.checkpoints_total_limit
            remove_old_checkpoints(config.output_dir, self.step, limit)
        if self.step < config.max_train_steps:
            accelerator.print(
                f"max_train_seconds are over: stopped at step {self.step} of "
                f"{config.max_train_steps}; to go on give --resume_from_checkpoint latest"
            )
        accelerator.wait_for_everyone()
        return self.step

    def _batches(self) -> Iterator[Tensor | tuple[Tensor, ...]]:
        config, accelerator = self.config, self.accelerator
        micro_steps = config.gradient_accumulation_steps
        batches = StepBatches(
            len(self.dataset),
            config.train_batch_size,
            config.seed,
            self.step * micro_steps,
            max(0, config.max_train_steps - self.step) * micro_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        pin = accelerator.device.type == "cuda"
        return iter(step_loader(self.dataset, batches, config.dataloader_num_workers, pin))

    def _forward_backward(self, batch: Tensor | tuple[Tensor, ...], micro_step: int) -> Tensor:
        """Do one forward and backward pass, with the update after the last of a step."""
        from accelerate.utils import send_to_device

        config, accelerator = self.config, self.accelerator
        generator = step_generator(
            config.seed, self.step, accelerator.process_index, accelerator.device, micro_step
        )
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        with accelerator.accumulate(self.wrapped):
            with accelerator.autocast():
                loss = self.compute_loss(self.wrapped, batch, generator)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if accelerator.sync_gradients and self.ema is not None:
                self.ema.step(self.model.parameters())
        return loss.detach()

    def _out_of_time(self) -> bool:
        limit, accelerator = self.config.max_train_seconds, self.accelerator
        if limit is None:
            return False
        # One update is made at least: a network without any is no result, nor one to go on from.
        late = time.monotonic() - self.started > limit and self.step > 0
        if accelerator.num_processes == 1:
            return late
        if self.step % self.config.logging_steps:
            return False  # processes must agree, and asking costs a synchronisation
        votes = torch.tensor(float(late), device=accelerator.device)
        return accelerator.reduce(votes).item() > 0
