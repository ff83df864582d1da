"""The Morse sampler and its training loss, over plain callables (Morse, ICML 2025).

A solver moves a sample along decreasing timesteps using a network's estimate z. Morse changes only
where z comes from (Equation 5): at jump points t_s from the pretrained network, Dash; at all other
steps t_i from Dash's latest estimate plus a learned residual, Dot:

    z_ti = dash(x_ti, t_i)                                              at a jump point
    z_ti = z_ts + dot(x_ti, t_i, jump)  with  jump = (x_ts, t_s, z_ts)  otherwise

`estimate` is that switch, for `morse_sample` below; `morse.estimates` has both sides of it for any
diffusers pipeline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from morse.plan import ModelName, MorsePlan
from morse.spaces import PredictionType, ddim_step, signal_and_noise


@dataclass(frozen=True)
class JumpPoint:
    """The latest Dash evaluation: `sample` x_ts (B, ...), `timestep` t_s, `model_output` z_ts.

    `earlier` is the one before it, and `trend`, like z_ts, what the line through the two adds where
    Dot is evaluated (`morse.history`); `guidance_scale`, () or (B,), is that of a guided z_ts. None
    where not known.
    """

    sample: Tensor
    timestep: Tensor
    model_output: Tensor
    earlier: "JumpPoint | None" = None
    trend: Tensor | None = None
    guidance_scale: Tensor | None = None
    memory: dict[object, object] = field(default_factory=dict, compare=False)  # for Dot's own use


Dash = Callable[[Tensor, Tensor], Tensor]  # (sample, timestep) -> model_output
Dot = Callable[..., Tensor]  # (sample, timestep, jump, **conditions) -> residual
SolverStep = Callable[[Tensor, Tensor, int, int], Tensor]


def dot_estimate(
    dot: Dot, sample: Tensor, timestep: Tensor, jump: JumpPoint, base: Tensor | None = None
) -> Tensor:
    """Add Dot's residual to Dash's latest estimate, or to `base` (Equation 5, second line).

    A Dot with a true attribute `independent` (a control for experiments) estimates alone.
    """
    base = jump.model_output if base is None else base
    residual = dot(sample, timestep, jump)
    return residual if getattr(dot, "independent", False) else base + residual


def estimate(
    model: ModelName, sample: Tensor, timestep: Tensor, jump: JumpPoint | None, dash: Dash, dot: Dot
) -> tuple[Tensor, JumpPoint]:
    """Evaluate Dot, else Dash (Equation 5); give the estimate and the jump point to go on with."""
    if model == "dot":
        return dot_estimate(dot, sample, timestep, jump), jump
    model_output = dash(sample, timestep)
    earlier = None if jump is None else replace(jump, earlier=None, memory={})
    # Cloned: some pipelines step in place, and compiled models reuse their output buffers.
    return model_output, JumpPoint(sample.clone(), timestep, model_output.clone(), earlier)


@torch.no_grad()
def morse_sample(
    dash: Dash,
    dot: Dot,
    solver_step: SolverStep,
    sample: Tensor,
    timesteps: Sequence[int],
    plan: MorsePlan,
) -> Tensor:
    """Sample from noise `sample` (B, ...) along decreasing `timesteps`: the reference loop.

    Evaluation i is made by `plan[i]`, then `solver_step(model_output, sample, timestep,
    prev_timestep)` moves the sample; the last `prev_timestep` is -1, the clean end.

    Raises:
        ValueError: If `timesteps` and `plan` differ in length.
    """
    if len(timesteps) != len(plan):
        raise ValueError(f"plan has {len(plan)} evaluations but timesteps has {len(timesteps)}.")
    jump = None
    for model, step, prev_step in zip(plan, timesteps, [*timesteps[1:], -1], strict=True):
        timestep = torch.as_tensor(step, device=sample.device)
        model_output, jump = estimate(model, sample, timestep, jump, dash, dot)
        sample = solver_step(model_output, sample, int(step), int(prev_step))
    return sample


@torch.no_grad()
def make_pair(
    dash: Dash,
    clean: Tensor,
    noise: Tensor,
    timesteps: tuple[Tensor, Tensor],
    alphas_cumprod: Tensor,
    prediction_type: PredictionType = "epsilon",
) -> tuple[JumpPoint, Tensor, Tensor]:
    """Noise `clean` (B, ...) to t_s, take one DDIM jump to t_o, evaluate Dash at both.

    `timesteps` are (t_s, t_o), integers (B,), with t_s > t_o for every image, else `ValueError` is
    raised. Returns the jump point, x_to, z_to.
    """
    if not bool((timesteps[1] < timesteps[0]).all()):
        raise ValueError(f"timesteps (t_s, t_o) need t_s > t_o for every image, got {timesteps}.")
    start, end = (signal_and_noise(alphas_cumprod, timestep, clean) for timestep in timesteps)
    sample = start[0] * clean + start[1] * noise
    jump = JumpPoint(sample, timesteps[0], dash(sample, timesteps[0]))
    sample = ddim_step(jump.model_output, sample, start, end, prediction_type)
    return jump, sample, dash(sample, timesteps[1])


def dot_loss(
    dash: Dash,
    dot: Dot,
    clean: Tensor,
    noise: Tensor,
    timesteps: tuple[Tensor, Tensor],
    alphas_cumprod: Tensor,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """Mean squared error of Dot after one jump, () (Algorithm 1); Dash gets no gradient.

    `clean` and the standard normal `noise` are (B, ...), `timesteps` (t_s, t_o) integers (B,) each,
    `alphas_cumprod` (T,) the scheduler's; `prediction_type` says what Dash predicts.

    Raises:
        ValueError: Unless t_s > t_o for every image.
    """
    jump, sample, target = make_pair(dash, clean, noise, timesteps, alphas_cumprod, prediction_type)
    return torch.nn.functional.mse_loss(dot_estimate(dot, sample, timesteps[1], jump), target)
