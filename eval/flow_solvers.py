"""Compare solvers on a model trained by flow matching: `python -m eval.flow_solvers`.

No such model comes with the package, so the embedded pixels' Dash is told of a flow what it knows
of its own path: a picture scaled to variance one and the timestep of the same signal-to-noise
ratio. That change of variables is exact up to the highest noise that Dash knows (sigma = .994), so
that a rectified flow's solvers meet a network that was trained, on their own path and with their
own noise levels.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from morse.cli import run_command
from morse.evaluation.bench.loading import load_bare
from morse.evaluation.bench.methods import REFERENCE_STEPS
from morse.evaluation.bench.runs import sample_images
from morse.evaluation.bench.solver_pipeline import SolverPipeline
from morse.evaluation.environment import command_line, environment
from morse.evaluation.metrics import psnr
from morse.evaluation.planning.config import PlanConfig
from morse.evaluation.planning.fit import (
    Rows,
    curves_to_rows,
    fit_curves,
    power_curves,
    refine_rows,
)
from morse.evaluation.planning.memory import remembering
from morse.files import write_json
from morse.saved_plans import with_options
from morse.schedulers import make_scheduler
from morse.settings import as_json, option

SOLVERS = {
    "euler": "Euler",
    "dpmsolver++": "DPM++ 2M",
    "unipc": "UniPC",
    "pfdiff": "PFDiff-1",
    "leapfrog": "Leapfrog",
}

REFERENCE_SOLVER = "unipc"


@dataclass(frozen=True)
class FlowSolversConfig:
    """Compare solvers on the embedded Dash as a model trained by flow matching."""

    output: Path = option(Path("eval/results/flow_matching.json"), "file to write")
    shift: float = option(3.0, "of the noise levels; SD3's is 3")
    steps: tuple[int, ...] = option((6, 10, 20), "evaluations")
    fitted: tuple[int, ...] = option((6, 10), "those of --steps to fit leapfrog's steps for, too")
    num_images: int = option(32, "images to judge on")
    num_fit_images: int = option(32, "further ones to fit steps on")
    batch_size: int = option(32, "images at a time")
    seed: int = option(600_000, "of the first image")


class FlowDash(nn.Module):
    """A variance-preserving denoiser of epsilon as a rectified flow's, told T * sigma.

    Above the highest noise level that it knows it is asked at that level.

    Args:
        unet: The denoiser.
        alphas_cumprod: Its noise schedule, (T,).
    """

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor) -> None:
        """Keep the network."""
        super().__init__()
        self.unet = unet
        squared = alphas_cumprod.double().numpy()
        self._log_ratios = np.log((1 - squared) / squared) / 2  # of sigma / alpha; increasing
        self.config = FrozenDict(
            {name: unet.config[name] for name in ("sample_size", "in_channels")}
        )
        self.dtype, self.device = unet.dtype, unet.device

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        """Give the velocity, epsilon - x_0, (B, C, H, W)."""
        level = float(timestep) / len(self._log_ratios)
        wanted = math.inf if level == 1 else math.log(level / (1 - level))
        log_ratio = min(max(wanted, self._log_ratios[0]), self._log_ratios[-1])
        known = np.interp(log_ratio, self._log_ratios, np.arange(len(self._log_ratios)))
        alpha = 1 / math.sqrt(1 + math.exp(2 * log_ratio))
        sigma = math.sqrt(1 - alpha**2)
        own = sample if wanted > log_ratio else sample / math.hypot(level, 1 - level)
        noise = self.unet(own, torch.tensor(known, dtype=torch.float32)).sample
        clean = (own - sigma * noise) / alpha
        return UNet2DOutput((sample - (1 - level) * clean) / level - clean)


class Flow:
    """The embedded Dash as a flow, and how it is sampled."""

    def __init__(self, config: FlowSolversConfig) -> None:
        """Load it."""
        bare, _ = load_bare("fashion-mnist", None, "cpu")
        self._dash = FlowDash(bare.unet, bare.scheduler.alphas_cumprod)
        self._batch_size = config.batch_size
        self._scheduler = FlowMatchEulerDiscreteScheduler(shift=config.shift).config

    def sample(self, solver: str, steps: int, seeds: range, **options: object) -> Tensor:
        """Sample images, (B, C, H, W) in [0, 1], one a seed."""
        scheduler = make_scheduler(solver, self._scheduler)
        pipe = SolverPipeline(unet=self._dash, scheduler=with_options(scheduler, options))
        pipe.set_progress_bar_config(disable=True)
        return sample_images(pipe, steps, seeds, self._batch_size).images

    def reference(self, seeds: range) -> Tensor:
        """Sample with many steps."""
        return self.sample(REFERENCE_SOLVER, REFERENCE_STEPS, seeds)

    def fit(self, steps: int, seeds: range) -> Rows:
        """Fit leapfrog's steps as `morse plan` does."""
        reference, plan = self.reference(seeds), "D" * steps

        def sample(rows: Rows) -> Tensor:
            return self.sample("leapfrog", steps, seeds, fitted_steps=rows)

        with remembering(self._dash):
            starts = [power_curves(power) for power in PlanConfig.timestep_power]
            curves = fit_curves(sample, plan, reference, starts, PlanConfig.fit_rounds)
            rows = curves_to_rows(curves, plan)
            return refine_rows(sample, reference, [rows], PlanConfig.refine_rounds)


def flow_solvers(config: FlowSolversConfig) -> None:
    """Measure PSNR to many steps from the same noise, and write what was found."""
    flow, ends = Flow(config), config.seed + config.num_images
    seeds, fit_seeds = range(config.seed, ends), range(ends, ends + config.num_fit_images)
    reference, rows = flow.reference(seeds), []

    def add(name: str, steps: int, images: Tensor, **more: object) -> None:
        found = psnr(images, reference)
        error = float(found.std() / len(found) ** 0.5)
        rows.append({"solver": name, "steps": steps, "psnr": float(found.mean()), "error": error})
        print(f"{name}, {steps}: {found.mean():.2f} +- {error:.2f} dB", flush=True)
        rows[-1] |= more

    for steps in config.steps:
        for solver, name in SOLVERS.items():
            add(name, steps, flow.sample(solver, steps, seeds))
        if steps in config.fitted:
            fitted = flow.fit(steps, fit_seeds)
            images = flow.sample("leapfrog", steps, seeds, fitted_steps=fitted)
            add("Leapfrog, fitted", steps, images, fitted_steps=fitted)
    result = {
        "command": command_line(),
        "reference": f"{SOLVERS[REFERENCE_SOLVER]}, {REFERENCE_STEPS} steps",
        "settings": as_json(config),
        **environment(torch.device("cpu")),
        "rows": rows,
    }
    write_json(config.output, result)


if __name__ == "__main__":
    run_command(FlowSolversConfig, flow_solvers)
