"""Batches of images that depend on the step alone, so that a resumed run needs only its number."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from morse.training.common import derive_seed


class Batched(Protocol):
    """What is trained on: images, or something else of which a list of indices gives a batch."""

    def __len__(self) -> int: ...
    def __getitems__(self, indices: list[int]) -> Tensor | tuple[Tensor, ...]: ...


class StepBatches:
    """Lists of indices for successive steps; a batch is a function of (seed, step, rank) only.

    Every epoch is a new permutation of all images; a batch may continue over its border. The
    global batch of `world_size * batch_size` images is cut into one piece per rank. So a resumed
    run needs only the number of its next step.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Describe the batches; see the class for their order."""
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start_step, self.num_steps = start_step, num_steps
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Give the number of batches."""
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of steps `start_step` to `start_step + num_steps - 1`."""
        epoch, order = -1, torch.empty(0)
        for step in range(self.start_step, self.start_step + self.num_steps):
            position = (step * self.world_size + self.rank) * self.batch_size
            batch: list[int] = []
            while len(batch) < self.batch_size:
                needed_epoch, offset = divmod(position + len(batch), self.length)
                if needed_epoch != epoch:
                    epoch, order = needed_epoch, self._permutation(needed_epoch)
                batch += order[offset : offset + self.batch_size - len(batch)].tolist()
            yield batch

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        return torch.randperm(self.length, generator=generator)


def step_loader(
    dataset: Batched, batches: StepBatches, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Load the batches in order, each as `__getitems__` gives it."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_is,
    )


def _as_is(batch: Tensor) -> Tensor:
    return batch
