"""What the benchmark fills in where settings were not given."""

from typing import TYPE_CHECKING

from morse.evaluation.environment import resolve_device
from morse.settings import given

if TYPE_CHECKING:
    from morse.evaluation.bench.config import BenchmarkConfig

# What --quick puts in the place of settings that were not given.
QUICK: dict[str, object] = {
    "num_images": 12,
    "lsd": (4, 8, 16),
    "baseline_lsd": (30,),
    "solvers": ("ddim", "dpmsolver++"),
    "planned_solvers": (),
    "kinds": ("baseline", "morse", "reuse"),
    "peers": ("none",),
    "ddim_ratios": (2.0,),
    "dpm_ratios": (1.75,),
    "latency_batch_sizes": (0,),
}
# Likewise without a GPU: all in under an hour on two cores. 39 minutes were measured at the
# embedded Dash's 13 ms an image; at the 25 ms of a busy host it would take more than an hour.
WITHOUT_GPU: dict[str, object] = {
    "num_images": 32,
    "lsd": (4, 6, 8, 12, 20, 30),
    "baseline_lsd": (3, 5, 10, 15, 25, 40),
}


def left_out(config: "BenchmarkConfig") -> dict[str, object]:
    """Return the settings that depend on the device and on --quick, where they were not given."""
    on_gpu = resolve_device(config.device).type == "cuda"
    quick = {k: v for k, v in QUICK.items() if k != "latency_batch_sizes" or not config.arch}
    wanted = quick if config.quick else {"num_images": 5000} if on_gpu else WITHOUT_GPU
    kept = given(config, wanted)
    changes = {name: value for name, value in wanted.items() if name not in kept}
    if config.latency_batch_sizes is None and "latency_batch_sizes" not in changes:
        guided = len(config.guidance_scale) > 0
        of_arch = (1, 4, 16, 64) if on_gpu else (1, 4, 16)
        default = of_arch if config.arch else (0,) if guided else (1, 16, 64)
        if not config.arch and not config.latency_only:  # what is sampled with fits, more may not
            default = tuple(size for size in default if size <= config.batch_size)
        changes["latency_batch_sizes"] = default
    return changes
