"""What the benchmark's settings must be, beyond their types."""

from collections.abc import Collection
from itertools import pairwise
from typing import TYPE_CHECKING

from morse.evaluation.bench import architectures
from morse.evaluation.bench.solvers import check_solvers
from morse.evaluation.bench.tasks import CHOOSABLE, PEER_SETTINGS, all_solvers
from morse.evaluation.environment import check_precision
from morse.evaluation.stats.lossless import read_deltas
from morse.settings import require, require_least, require_places, require_positive

if TYPE_CHECKING:
    from morse.evaluation.bench.config import BenchmarkConfig

LEAST = {
    "num_images": 2, "num_reference_images": 2, "batch_size": 1, "num_replicates": 0,
    "guidance_scale": 0, "lsd": 1, "baseline_lsd": 1,
}  # fmt: skip


def check_settings(config: "BenchmarkConfig") -> None:
    """Check the ranges, and that settings suit each other.

    Raises:
        ValueError: For the first that is wrong.
    """
    check_solvers((*config.solvers, *config.control_solvers, *config.planned_solvers))
    check_precision(config.dtype, config.mixed_precision)
    folders = ("output_dir",) if config.json is None else ()  # with arch and json it is not used
    require_places(config, folders, ("json",))
    if config.compile and config.cuda_graphs:
        raise ValueError("compile is True and so is cuda_graphs; choose one")
    if config.flops_only and not config.arch:
        raise ValueError("flops_only counts architectures; name some with --arch")
    if config.resume and config.arch:
        raise ValueError(
            "resume goes on with samples, but with arch everything is timed anew: leave it out"
        )
    choices = {
        "kinds": CHOOSABLE,
        "peers": (*PEER_SETTINGS, "none"),
        "arch": architectures.ARCHITECTURES,
    }
    for name, known in choices.items():
        unknown = sorted(set(getattr(config, name)) - set(known))
        if unknown:
            raise ValueError(f"{name} has {unknown}, choose from {list(known)}")
    _check_margins(config)
    require_least(config, LEAST)
    require_positive(config, ("speed_ratio", "max_seconds"))
    for name in ("ddim_ratios", "dpm_ratios"):
        ratios = getattr(config, name)
        possible = all(ratio >= 1 or ratio == 0 for ratio in ratios)
        require(possible, name, ratios, "1 or more each, or 0 for none")
    if config.real is not None and config.extractor in ("auto", "none"):
        raise ValueError(
            f"real is {config.real}, but extractor is {config.extractor}: name what to compare "
            "images in, such as --extractor inception"
        )
    gaps = [later - seed for seed, later in pairwise(sorted(config.seeds))]
    if config.num_images is not None and min(gaps, default=config.num_images) < config.num_images:
        raise ValueError(
            f"seeds is {config.seeds}, but image i of a repetition has seed + i: keep them "
            f"num_images = {config.num_images} apart, or repetitions share images"
        )


def check_methods(config: "BenchmarkConfig", named: Collection[str]) -> None:
    """Refuse solvers that nothing would run with, and settings that make no method at all.

    Args:
        config: Settings without gaps.
        named: Those that were given; defaults may have more solvers than there are.

    Raises:
        ValueError: For the first that is wrong.
    """
    if config.arch or config.latency_only:
        return
    known = {"planned_solvers": config.solvers, "control_solvers": all_solvers(config)}
    for name, solvers in known.items():
        left_over = sorted(set(getattr(config, name)) - set(solvers))
        if left_over and name in named:
            raise ValueError(
                f"{name} has {left_over}, but solvers is {config.solvers}: name them there too, or "
                f"leave them out of {name}"
            )
    if not config.tasks():
        raise ValueError(
            f"kinds is {config.kinds} and peers {config.peers}, of which nothing runs with solvers "
            f"{config.solvers}, ddim_ratios {config.ddim_ratios} and dpm_ratios "
            f"{config.dpm_ratios} (0: none) and planned_solvers {config.planned_solvers}; controls "
            f"and peers run with those solvers that are among control_solvers "
            f"{config.control_solvers} too, pfdiff with ddim and ays with dpmsolver++ alone"
        )


def _check_margins(config: "BenchmarkConfig") -> None:
    """Refuse margins that come too late, or of axes that surely are not measured."""
    deltas = read_deltas(config.lossless_delta)
    if deltas and config.from_json is not None:
        raise ValueError(
            "lossless_delta is chosen before a result is measured, and from draws one that is: "
            "leave it out"
        )
    possible = ["psnr", "ssim"]
    if config.extractor != "none":
        possible += ["frechet_to_reference", "kernel_to_reference"]
        if config.real is not None or config.extractor in ("auto", "fashion-mnist"):
            possible += ["frechet", "kernel"]
    if lacking := sorted(set(deltas) - set(possible)):
        raise ValueError(
            f"lossless_delta has {lacking}, but with extractor {config.extractor} and real "
            f"{config.real} there is no such axis; those that there may be are {sorted(possible)}"
        )
