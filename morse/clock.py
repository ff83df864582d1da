"""Reads, and never patches, where a pipeline's scheduler stands."""

import torch
from torch import Tensor


def scheduler_index(scheduler: object, timestep: Tensor | float) -> int | None:
    """Tell which entry of `scheduler.timesteps` the denoiser is being evaluated at.

    Schedulers that count their steps (`step_index`; PNDM's `counter`) are asked, and where they
    were told to begin (`begin_index`). For the others `timestep` is usually a view into
    `scheduler.timesteps`, whose place in memory tells without waiting for the device; else its
    value is looked up, which is ambiguous where a value occurs twice. Before its first step a
    scheduler that counts stands at its beginning where that tells nothing: some pipelines scale the
    value to [0, 1], where it may even be another timestep's.

    Args:
        scheduler: Any diffusers scheduler.
        timestep: What the denoiser was given, () or (B,).

    Returns:
        The index, or None where nothing can be told.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    # Stable Cascade's scheduler has no such number; None says that no run has begun.
    counted = getattr(scheduler, "num_inference_steps", 1) is not None
    # DDPM's does not count timesteps that a call chooses.
    if timesteps is None or not (counted or getattr(scheduler, "custom_timesteps", False)):
        return None
    for name in ("step_index", "counter", "begin_index"):
        count = getattr(scheduler, name, None)
        if count is not None:
            return int(count)
    timesteps = torch.as_tensor(timesteps)
    if isinstance(timestep, Tensor) and _is_view(timestep, timesteps):
        return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
    timestep, counts = torch.as_tensor(timestep), hasattr(scheduler, "step_index")
    if counts and float(timestep.reshape(-1)[0]) <= 1:
        return 0
    index = _look_up(timestep, timesteps.cpu().double())
    return 0 if index is None and counts else index


def _look_up(timestep: Tensor, timesteps: Tensor) -> int | None:
    """Find a value, or the nearest where rounding to the timestep's dtype allows for one only."""
    errors = (timesteps - float(timestep.reshape(-1)[0])).abs()
    exact = (errors < 1e-4).nonzero()
    if len(exact) or not timestep.is_floating_point():
        return int(exact[0]) if len(exact) else None
    rounding = torch.finfo(timestep.dtype).eps * float(timesteps.abs().max())
    near = (errors < rounding).nonzero()
    return int(near[0]) if len(near) == 1 else None


def _is_view(timestep: Tensor, timesteps: Tensor) -> bool:
    return (
        timestep.numel() == 1
        and timestep.device == timesteps.device
        and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
    )
