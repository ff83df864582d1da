"""What `morse plan` searches: its settings."""

from dataclasses import dataclass
from pathlib import Path

from morse.evaluation.bench.solvers import check_solvers
from morse.evaluation.environment import check_precision
from morse.evaluation.planning.search import UNIFORM_RATIOS
from morse.evaluation.prompts import PROMPTS_HELP, read_prompts
from morse.plan import MorsePlan
from morse.settings import (
    REQUIRED,
    Dtype,
    MixedPrecision,
    option,
    require_least,
    require_places,
    require_positive,
)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Fit leapfrog's steps, and search which evaluations Dot makes, by solver and budget.

    Plans are saved with Dot, fitted steps of Dash alone as schedulers: all there is without a Dot.
    """

    pipeline: str = option(
        "fashion-mnist",
        "fashion-mnist, fashion-mnist-text, a folder or hub id",
        alias="pretrained_model_name_or_path",
    )
    dot: str | None = option(None, "a Dot's folder or hub id; the pipeline's own, if any")
    output_dir: Path = option(
        REQUIRED,
        "where plan_search.json, the Dot with its plans and the fitted schedulers for Dash alone "
        "(leapfrog-8 and so on) are saved",
    )
    solver: tuple[str, ...] = option(
        ("leapfrog",), "names of solvers, as for `morse bench`", alias="solvers"
    )
    lsd: tuple[int, ...] = option(
        (5, 6, 8, 10, 12, 16, 20), "budgets in whole LSD to search plans for"
    )
    speed_ratio: float | None = option(
        None, "N, Dash's time over Dot's; its config's, or measured, if left out"
    )
    timestep_power: tuple[float, ...] = option(
        (1.0, 1.25, 1.5), "grids tried with the leapfrog solver"
    )
    ratios: tuple[float, ...] = option(
        UNIFORM_RATIOS, "evaluations per LSD of the uniform plans tried first; all Dash is too"
    )
    start_plans: tuple[str, ...] = option(
        (),
        'plans to start from as well, such as "ggDoDDoD" (g: mixture, D: Dash, o: Dot), on the '
        "grids and with the fitted steps of saved plans of the same letters, stretched to their "
        "length; each for every budget that pays for it, and always fitted",
    )
    num_images: int = option(128, "trajectories to judge the best on")
    num_quick_images: int = option(32, "so many of these judge each plan that is tried")
    batch_size: int = option(64, "images at a time")
    seed: int = option(10**6, "of the first image; bench and eval fid begin at 0")
    max_rounds: int = option(6, "steps to a better neighbour at most")
    fit_rounds: int = option(
        3, "rounds of fitting the leapfrog solver's steps as smooth curves; 0: none"
    )
    refine_rounds: int = option(1, "rounds of fitting each evaluation's then by itself; 0: none")
    num_fit_images: int = option(32, "further trajectories, which the steps are fitted on")
    fit_margin: float = option(
        3.0,
        "dB: the best plans with and without Dot, and begun by a mixture or not, are fitted too "
        "if no further than this behind the best of all; below 0 start_plans alone",
    )
    mixture_images: int = option(
        0,
        "so many samples of Dash to fit a Gaussian mixture to, with which runs may begin for next "
        "to nothing; 0: the one that Dot has, if any",
    )
    prompts: tuple[str, ...] = option((), PROMPTS_HELP)
    prompt_embeds: Path | None = option(
        None, "safetensors file, for a text pipeline without a text encoder"
    )
    class_names: tuple[str, ...] = option((), "for labels, or as prompts")
    guidance_scale: float | None = option(None, "the pipeline's own default if left out")
    dtype: Dtype = option("float32", "of the networks; the two shorter ones take half the memory")
    mixed_precision: MixedPrecision = option("no", "autocast of networks in float32")
    merge_lora: bool = option(
        True, "merge Dot's LoRA into a copy of Dash's weights: faster, more memory"
    )
    device: str = option("auto", "cpu, cuda, ...; auto takes a GPU")

    def __post_init__(self) -> None:
        """Check the ranges, and read prompts that are in a file."""
        object.__setattr__(self, "prompts", read_prompts(self.prompts))
        check_solvers(self.solver)
        ones = ("num_images", "num_quick_images", "num_fit_images", "batch_size", "lsd", "ratios")
        zeros = ("fit_rounds", "refine_rounds", "mixture_images")
        require_least(self, dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0))
        require_positive(self, ["speed_ratio"])
        require_places(self, ["output_dir"])
        for plan in self.start_plans:
            MorsePlan.from_string(plan)
        check_precision(self.dtype, self.mixed_precision)
        if self.num_quick_images > self.num_images:
            raise ValueError(
                f"num_quick_images is {self.num_quick_images}, but must be at most "
                f"num_images = {self.num_images}"
            )

    def grids(self, solver: str) -> list[tuple[tuple[str, object], ...]]:
        """List the scheduler options to choose from, which a saved plan brings with it."""
        from morse.schedulers import SCHEDULERS

        if solver == "leapfrog":
            return [(("timestep_power", power),) for power in self.timestep_power]
        power = SCHEDULERS[solver][1].get("timestep_power")
        return [() if power is None else (("timestep_power", power),)]
