"""Reads, and never patches, where a pipeline's scheduler stands."""

import torch
from torch import Tensor


def scheduler_index(scheduler: object, timestep: Tensor | float) -> int | None:
    """Tell which entry of `scheduler.timesteps` the denoiser is being evaluated at.

    Schedulers that count their steps (`step_index`; PNDM's `counter`) are asked. For the others,
    and before the first step, `timestep` is usually a view into `scheduler.timesteps`, whose place
    in memory tells without waiting for the device; else its value is looked up, which is ambiguous
    where a value occurs twice.

    Args:
        scheduler: Any diffusers scheduler.
        timestep: What the denoiser was given, () or (B,).

    Returns:
        The index, or None where nothing can be told.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if getattr(scheduler, "num_inference_steps", None) is None or timesteps is None:
        return None
    for name in ("step_index", "counter", "begin_index"):
        count = getattr(scheduler, name, None)
        if count is not None:
            return int(count)
    timesteps = torch.as_tensor(timesteps)
    if isinstance(timestep, Tensor) and _is_view(timestep, timesteps):
        return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
    value = float(torch.as_tensor(timestep).reshape(-1)[0])
    matches = (timesteps.cpu().double() - value).abs() < 1e-4
    return int(matches.nonzero()[0]) if bool(matches.any()) else None


def _is_view(timestep: Tensor, timesteps: Tensor) -> bool:
    return (
        timestep.numel() == 1
        and timestep.device == timesteps.device
        and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
    )
