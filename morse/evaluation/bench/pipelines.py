"""The loaded pipelines of the benchmark: one a solver and kind of method, over one Dash."""

from typing import TYPE_CHECKING

import torch

from morse.denoisers import find_denoiser
from morse.dot.fingerprint import fingerprint
from morse.evaluation.bench.loading import (
    load_bare,
    make_pipeline,
    use_fast_layout,
    with_scheduler,
    with_solver,
)
from morse.evaluation.bench.methods import REFERENCE_SOLVER, Method
from morse.evaluation.bench.peers import PEERS
from morse.evaluation.bench.solvers import SOLVERS
from morse.evaluation.bench.speed import Mode, set_merged
from morse.evaluation.bench.tasks import all_solvers
from morse.evaluation.digests import components_sha256, dot_sha256
from morse.rates import scales_noise

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from morse.evaluation.bench.config import BenchmarkConfig
    from morse.evaluation.bench.controls import ShrunkDash


class Pipelines:
    """Makes the pipeline that samples a method.

    Attributes:
        bare: The pipeline as it was loaded, without Morse.
        by_solver: With each solver, and Morse attached.
        main: That of the reference's solver.
        shrunk: Dash's place taken by the independent Dot; None if none was given.
        models: What tells Dash, Dot, with its saved plans, the independent one and the pipeline's
            other networks and scheduler from others; JSON types.
    """

    def __init__(self, config: "BenchmarkConfig"):
        """Load Dash, Dot and the controls' networks."""
        from morse.evaluation.bench.solver_pipeline import SolverPipeline
        from morse.pipeline import MorsePipeline

        self._merge_lora = config.merge_lora
        dtype = getattr(torch, config.dtype)
        self.bare, dot = load_bare(config.pipeline, config.dot, config.device, dtype=dtype)
        self.models = {
            "dash": fingerprint(find_denoiser(self.bare)),
            "dot_sha256": dot_sha256(dot),
            **components_sha256(self.bare),
        }
        self._is_conditional = not isinstance(self.bare, SolverPipeline)
        self._obstacles = self._find_obstacles()
        self.by_solver: dict[str, MorsePipeline] = {
            solver: MorsePipeline.from_pipe(with_solver(self.bare, solver), dot)
            for solver in dict.fromkeys((*all_solvers(config), REFERENCE_SOLVER))
            if solver not in self._obstacles
        }
        self.main = self.by_solver[REFERENCE_SOLVER]
        set_merged(self.main, config.merge_lora)
        self.shrunk = self._load_shrunk(config.independent_dot, dtype)
        if self.shrunk is not None:
            self.models["independent_dot_sha256"] = dot_sha256(self.shrunk.dot)
        # Made once: to enable Morse anew would make its Dot be compiled anew.
        self._pipes: dict[tuple[str, str], DiffusionPipeline] = {}

    def of(self, method: Method) -> "DiffusionPipeline":
        """Return the pipeline that samples a method, which is made at its first time."""
        if method.kind in ("baseline", "morse", "mixture", *PEERS):
            return self.by_solver[method.solver]
        key = method.solver, method.kind
        if key not in self._pipes:
            self._pipes[key] = self._make(method)
        return self._pipes[key]

    def obstacle(self, method: Method, mode: Mode = "eager") -> str | None:
        """Tell why a method can't be measured with models in such a mode; None if it can."""
        from morse.evaluation.bench.ays import ays_name

        if method.solver in self._obstacles:
            return self._obstacles[method.solver]
        pipe, kind = self.by_solver[method.solver], method.kind
        if type(pipe).__name__ == "DiTPipeline" and scales_noise(pipe.scheduler):
            return f"DiTPipeline does not do the scaling that {SOLVERS[method.solver]} needs"
        if kind in ("independent", "shrunk") and self.shrunk is None:
            return "no --independent_dot was given"
        if kind in ("extrapolation", "shrunk") and self._is_conditional:
            return "it is made for unconditional pipelines of pixels"
        if kind == "ays" and ays_name(self.bare) is None:
            return "not applicable: there are timesteps for Stable Diffusion 1.5 and XL alone"
        if kind == "mixture" and pipe.dot.mixture is None:
            return "its Dot has no Gaussian mixture (`morse plan --mixture_images`)"
        if kind in PEERS and mode != "eager":
            return "it replaces forward methods, which --compile and --cuda_graphs have recorded"
        return PEERS[kind].obstacle(pipe) if kind in PEERS else None

    def _find_obstacles(self) -> dict[str, str]:
        """Tell which solvers can't be made for a model trained by flow matching, and why."""
        from morse.schedulers import flow_obstacle

        return {
            solver: f"{name} {why}"
            for solver, name in SOLVERS.items()
            if solver != REFERENCE_SOLVER  # without that nothing can be measured
            and (why := flow_obstacle(solver, self.bare.scheduler.config))
        }

    def _load_shrunk(self, independent_dot: str | None, dtype: torch.dtype) -> "ShrunkDash | None":
        from morse.evaluation.bench.controls import ShrunkDash
        from morse.pipeline import load_dot

        if independent_dot is None:
            return None
        dot = load_dot(independent_dot, dtype=dtype).to(self.main.device)
        use_fast_layout(dot, self.main.device)
        if self._merge_lora:
            dot.merge_lora()
        return ShrunkDash(dot, find_denoiser(self.main))

    def _make(self, method: Method) -> "DiffusionPipeline":
        from morse.attach import enable_morse
        from morse.evaluation.bench.ays import AysScheduler, ays_name
        from morse.evaluation.bench.controls import ExtrapolationDot, reuse_dot
        from morse.schedulers import make_scheduler

        scheduler = self.by_solver[method.solver].scheduler
        if method.kind == "shrunk":
            return make_pipeline(self.shrunk, method.solver, scheduler.config)
        if method.kind == "pfdiff":
            return with_scheduler(self.bare, make_scheduler("pfdiff", scheduler.config))
        if method.kind == "ays":
            return with_scheduler(self.bare, AysScheduler.of(scheduler, ays_name(self.bare)))
        dot = reuse_dot if method.kind == "reuse" else ExtrapolationDot()
        if method.kind == "independent":
            dot = self.shrunk.dot
        pipe = with_solver(self.bare, method.solver)
        return enable_morse(pipe, dot, merge_lora=self._merge_lora)
