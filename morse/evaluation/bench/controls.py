"""Controls: what takes Dot's place, or a plan's, to show what each part of Morse is worth.

| control | between Dash's evaluations | trained | counted as |
|---|---|---|---|
| reuse | Dash's latest estimate | no | Morse's plan |
| extrapolation | a line through Dash's two latest estimates | no | Morse's plan |
| pfdiff | PFDiff-1's grid, twice as fine (`morse.leapfrog`) | no | an LSD an evaluation of Dash |
| mixture | nothing; three estimates of Dot's Gaussian mixture before | on samples | as pfdiff |
| independent | a network of Dot's size that sees the sample alone | yes | Morse's plan |
| shrunk | that network from the first to the last step, without Dash | yes | N evaluations an LSD |
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from morse.sampling import JumpPoint

if TYPE_CHECKING:
    from morse.dot import MorseDot
    from morse.evaluation.bench.solver_pipeline import SolverPipeline


def reuse_dot(sample: Tensor, timestep: Tensor, jump: JumpPoint, **conditions: object) -> Tensor:
    """Stand in for Dot with no correction at all: the control "reuse"."""
    return torch.zeros_like(jump.model_output)


class ExtrapolationDot:
    """Stands in for Dot with a line through Dash's two latest estimates, as ZEUS does.

    ZEUS (Wang et al. 2026, arXiv 2604.01552) predicts a skipped estimate as 2 z_s - z_p, with z_s
    the latest evaluation and z_p the one before. Its steps are evenly spaced, ours need not be, so
    the line runs over timesteps: z_i = z_s + (t_s - t_i) / (t_p - t_s) * (z_s - z_p), the same
    where the gaps are equal. Nothing limits the factor. Before there are two evaluations at
    different timesteps it is reuse.

    A Dot is not called where Dash runs, so that it must watch the pipeline's evaluations
    (`watching`). Timesteps that rise again, as those of the next batch do, make it start anew.
    """

    def __init__(self) -> None:
        """Begin without any estimate."""
        self._evaluations: list[tuple[Tensor, Tensor]] = []  # of Dash: (t, z), the latest last
        self._is_own = False

    @contextmanager
    def watching(self, pipe: "SolverPipeline") -> Iterator[None]:
        """Follow the evaluations of `pipe`; all is forgotten before and after."""
        self.__init__()
        pipe.observer = self._observe
        try:
            yield
        finally:
            pipe.observer = None
            self.__init__()

    def _observe(self, timestep: Tensor, model_output: Tensor) -> None:
        if self._is_own:
            self._is_own = False
            return
        kept = [pair for pair in self._evaluations[-1:] if pair[0] > timestep]
        self._evaluations = [*kept, (timestep.clone(), model_output.clone())]

    def __call__(self, sample: Tensor, timestep: Tensor, jump: JumpPoint) -> Tensor:
        """Return what to add to Dash's latest estimate, (B, C, H, W), like `sample`."""
        self._is_own = True
        if len(self._evaluations) < 2:
            return torch.zeros_like(jump.model_output)
        (before, older), (since, latest) = self._evaluations
        return (since - timestep) / (before - since) * (latest - older)


class ShrunkDash(nn.Module):
    """An independent Dot in the place of Dash: the control "shrunk".

    It has what a pipeline asks of a denoiser: `config`, `dtype`, `device` and its call.
    """

    def __init__(self, dot: "MorseDot", dash: nn.Module):
        """Wrap a Dot that estimates alone, bound to `dash`.

        Raises:
            ValueError: If the Dot needs Dash's estimates.
        """
        super().__init__()
        if not dot.independent:
            raise ValueError(
                "dot corrects Dash's estimates, so it can't run alone; give one that was trained "
                "with --independent"
            )
        self.dot, self.config = dot.bind(dash), dash.config

    @property
    def dtype(self) -> torch.dtype:
        """The Dot's dtype."""
        return self.dot.dtype

    @property
    def device(self) -> torch.device:
        """The Dot's device."""
        return self.dot.device

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        """Estimate from the sample alone, (B, C, H, W)."""
        return UNet2DOutput(sample=self.dot(sample, timestep.to(sample.device), None))
