"""The skeleton demonstration's Dash and Dot: their pipeline, and how they are trained."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from morse import JumpPoint, MorseDot
from morse.modules import SemanticGridTransform, SkeletonToGrid
from morse.modules.gridconv_transform import LAYOUTS
from morse.training.frozen import FrozenDash
from morse.training.guidance import UNCONDITIONAL, Conditions
from morse.training.pairs import Pairs, dot_outputs, weighted_loss
from morse.training.windows import Window, fresh_window, pick_pairs
from pipelines.skeleton_data import NUM_JOINTS, draw_poses

if TYPE_CHECKING:
    from pipelines.skeleton_diffusion import SkeletonConfig

GRID = (6, 6)
POINTS = 5  # of a training window


class SkeletonLayout(ModelMixin, ConfigMixin):
    """Lays joints (B, J, C) out on a grid (B, C, H, W) and reads them back: a pipeline's component.

    Args:
        grid: "ske2grid" for interpolated nodes on a learned permutation of cells, "gridconv" for
            copies of joints, the authors' 5 x 5 layout with a row and a column twice.
    """

    @register_to_config
    def __init__(self, grid: str = "ske2grid") -> None:
        """Create the untrained transform."""
        super().__init__()
        if grid == "ske2grid":
            self.transform = SkeletonToGrid(NUM_JOINTS, [GRID], trainable="extra")
        else:
            rows, columns = (torch.arange(size) * 5 // size for size in GRID)
            layout = torch.tensor(LAYOUTS["standard"])[rows][:, columns]
            self.transform = SemanticGridTransform(NUM_JOINTS, GRID, init=layout, cover="repair")

    def forward(self, joints: Tensor) -> Tensor:
        """Lay joints out."""
        return self.transform(joints)

    def inverse(self, grid: Tensor) -> Tensor:
        """Read joints back."""
        return self.transform.inverse(grid)


class SkeletonPipeline(DiffusionPipeline):
    """Samples joints: the scheduler steps with inverse(UNet(layout(sample), t)).

    Noise is added to joints, so that all cells that a joint has a part in share it.
    """

    def __init__(self, unet: UNet2DModel, scheduler: object, layout: SkeletonLayout) -> None:
        """Keep the parts."""
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, layout=layout)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw poses, (batch_size, J, 2)."""
        sample = torch.randn(batch_size, NUM_JOINTS, 2, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            output = self.unet(self.layout(sample), timestep, return_dict=False)[0]
            velocity = self.layout.inverse(output)
            sample = self.scheduler.step(velocity, timestep, sample, return_dict=False)[0]
        return sample


@dataclass(frozen=True, kw_only=True)
class SkeletonDash(FrozenDash):
    """The trained UNet with its layout, so that `morse.training` can make Dot's training pairs.

    Samples and guided estimates are joints, (B, J, 2); outputs are the UNet's own grids.
    """

    layout: SkeletonLayout

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, position: Tensor, conditions: Conditions = UNCONDITIONAL
    ) -> Tensor:
        """Evaluate at joints (B, J, 2), giving (B, 1, 2, H, W)."""
        return super().__call__(self.layout(sample), position, conditions)

    def guided(self, outputs: Tensor, guidance_scale: Tensor | None, like: Tensor) -> Tensor:
        """Read joints back, (B, J, 2)."""
        return self.layout.inverse(outputs[:, 0])


def make_pipeline(config: "SkeletonConfig") -> SkeletonPipeline:
    """Make an untrained pipeline."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layout = SkeletonLayout(config.grid)
        unet = UNet2DModel(
            sample_size=GRID[0], in_channels=2, out_channels=2, layers_per_block=1,
            block_out_channels=(config.channels,), norm_num_groups=8,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
    scheduler = DDPMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )
    return SkeletonPipeline(unet, scheduler, layout)


def optimise(
    parameters: Iterable[nn.Parameter], steps: int, loss: Callable[[torch.Generator], Tensor]
) -> list[float]:
    """Minimise by AdamW, with a rate that falls to 0 along half a cosine; returns the losses."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3, weight_decay=1e-6)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay.step()
        losses.append(value.item())
    return losses


def train_dash(pipe: SkeletonPipeline, poses: Tensor, config: "SkeletonConfig") -> float:
    """Train the UNet and the layout on joints' velocities; returns the last tenth's mean loss."""

    def loss(generator: torch.Generator) -> Tensor:
        clean = poses[torch.randint(len(poses), (config.batch_size,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (len(clean),), generator=generator)
        noisy = pipe.scheduler.add_noise(clean, noise, timesteps)
        output = pipe.unet(pipe.layout(noisy), timesteps, return_dict=False)[0]
        velocity = pipe.scheduler.get_velocity(clean, noise, timesteps)
        return functional.mse_loss(pipe.layout.inverse(output), velocity)

    pipe.unet.train(), pipe.layout.train()
    parameters = [*pipe.unet.parameters(), *pipe.layout.parameters()]
    losses = optimise(parameters, config.dash_steps, loss)
    for part in (pipe.unet, pipe.layout):
        part.eval().requires_grad_(False)
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def make_windows(dash: SkeletonDash, poses: Tensor, count: int, seed: int) -> Window:
    """Evaluate Dash along pieces of sampling runs that start at noised poses."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for start in range(0, count, 256):
        size = min(256, count - start)
        clean = poses[torch.randint(len(poses), (size,), generator=generator)]
        found.append(fresh_window(dash, clean, generator, POINTS, "plans"))
    parts = ("timesteps", "samples", "outputs")
    return Window(*(torch.cat([getattr(window, part) for window in found]) for part in parts))


def dot_estimates(dot: MorseDot, pairs: Pairs, layout: SkeletonLayout) -> Tensor:
    """Let Dot estimate what Dash says of the joints, (N, J, 2)."""

    def on_grid(sample: Tensor, timestep: Tensor, jump: JumpPoint) -> Tensor:
        there = JumpPoint(layout(jump.sample), jump.timestep, jump.model_output)
        return dot(layout(sample), timestep, there)

    return pairs.guided(dot_outputs(on_grid, pairs))


def train_dot(dot: MorseDot, dash: SkeletonDash, poses: Tensor, config: "SkeletonConfig") -> float:
    """Train Dot; returns its error over reuse's on held-out poses (both squared)."""
    windows = make_windows(dash, poses, config.windows, 1)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(windows.timesteps), (config.batch_size // 2,), generator=generator)
        few = Window(windows.timesteps[rows], windows.samples[rows], windows.outputs[rows])
        pairs = pick_pairs(dash, few, 2, generator, False)
        return weighted_loss(dot_estimates(dot, pairs, dash.layout), pairs, "gap")

    optimise(dot.train().parameters(), config.dot_steps, loss)
    held_out = make_windows(dash, draw_poses(512, 2), 512, 2)
    pairs = pick_pairs(dash, held_out, 1, torch.Generator().manual_seed(2), False)
    with torch.no_grad():
        error = (dot_estimates(dot.eval(), pairs, dash.layout) - pairs.target).square().mean()
    reuse = (dash.layout.inverse(pairs.base) - pairs.target).square().mean()
    return float(error / reuse)
