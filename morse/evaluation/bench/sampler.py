"""The loaded pipelines of the benchmark: one a solver and kind of method, over one Dash."""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from morse.denoisers import find_denoiser
from morse.dot.view import fingerprint
from morse.evaluation.bench.engagement import timed
from morse.evaluation.bench.loading import (
    load_bare,
    make_pipeline,
    use_fast_layout,
    with_scheduler,
    with_solver,
)
from morse.evaluation.bench.methods import REFERENCE_SOLVER, Method
from morse.evaluation.bench.peers import PEERS, apply_peer, measure_peer, peer_facts
from morse.evaluation.bench.runs import Samples, sample_images
from morse.evaluation.bench.solvers import SOLVERS
from morse.evaluation.bench.speed import (
    Mode,
    compile_models,
    measure_speed,
    measure_speed_table,
    set_merged,
)
from morse.evaluation.bench.spending import choose_steps
from morse.evaluation.bench.tasks import all_solvers
from morse.evaluation.conditions import Conditions, call_parameters, make_conditions
from morse.evaluation.environment import autocast
from morse.evaluation.fid.extractors import state_sha256
from morse.plan import MorsePlan
from morse.rates import scales_noise

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from morse.dot import MorseDot
    from morse.evaluation.bench.config import BenchmarkConfig
    from morse.evaluation.bench.controls import ShrunkDash

# Evaluations of a warm-up that every solver can make, and that reach a cached step of a peer.
WARM_UP, WARM_UP_PLAN = 3, MorsePlan.from_string("Doo")


def _sha256(dot: "MorseDot") -> str:
    config = {name: value for name, value in dot.config.items() if name[0] != "_"}  # no paths
    told = json.dumps(config, sort_keys=True, default=str) + state_sha256(dot)
    return hashlib.sha256(told.encode()).hexdigest()


class Bench:
    """Samples any method at any budget.

    Attributes:
        device: Where the models are.
        mode: Whether they are compiled, or replayed as CUDA graphs.
        models: What tells Dash, Dot, with its saved plans, and the independent one from others;
            JSON types.
    """

    def __init__(self, config: "BenchmarkConfig"):
        """Load Dash, Dot and the controls' networks."""
        from morse.evaluation.bench.solver_pipeline import SolverPipeline
        from morse.pipeline import MorsePipeline

        self.config = config
        self.mode: Mode = "eager"
        self._bare, dot = load_bare(config.pipeline, config.dot, config.device)
        self.models = {"dash": fingerprint(find_denoiser(self._bare)), "dot_sha256": _sha256(dot)}
        self._is_conditional = not isinstance(self._bare, SolverPipeline)
        self._obstacles = self._find_obstacles()
        self._by_solver: dict[str, MorsePipeline] = {
            solver: MorsePipeline.from_pipe(with_solver(self._bare, solver), dot)
            for solver in dict.fromkeys((*all_solvers(config), REFERENCE_SOLVER))
            if solver not in self._obstacles
        }
        self._main = self._by_solver[REFERENCE_SOLVER]
        self.device = self._main.device
        set_merged(self._main, config.merge_lora)
        self._shrunk = self._load_shrunk()
        if self._shrunk is not None:
            self.models["independent_dot_sha256"] = _sha256(self._shrunk.dot)
        # Made once: to enable Morse anew would make its Dot be compiled anew.
        self._pipes: dict[tuple[str, str], DiffusionPipeline] = {}
        self._warm: set[tuple[Method, int, float | None]] = set()

    def _find_obstacles(self) -> dict[str, str]:
        """Tell which solvers can't be made for a model trained by flow matching, and why."""
        from morse.schedulers import flow_obstacle

        return {
            solver: f"{name} {why}"
            for solver, name in SOLVERS.items()
            if solver != REFERENCE_SOLVER  # without that nothing can be measured
            and (why := flow_obstacle(solver, self._bare.scheduler.config))
        }

    @property
    def pipeline_class(self) -> str:
        """The name of the pipeline's class."""
        return type(self._bare).__name__

    def guidance_scales(self) -> tuple[float | None, ...]:
        """Return the guidance scales to measure at: (None,) for a pipeline without guidance."""
        if self.config.guidance_scale:
            return tuple(sorted(set(self.config.guidance_scale)))
        parameter = call_parameters(self._bare).get("guidance_scale")
        default = None if parameter is None else parameter.default
        return (None if default is inspect.Parameter.empty else default,)

    def conditions(self, guidance_scale: float | None) -> Conditions:
        """Return what images are asked for at a guidance scale.

        Raises:
            ValueError: If the settings and the pipeline don't suit each other.
        """
        config = self.config
        asked = config.prompts, config.class_names, config.prompt_embeds
        return make_conditions(self._bare, *asked, guidance_scale)

    def _load_shrunk(self) -> "ShrunkDash | None":
        from morse.evaluation.bench.controls import ShrunkDash
        from morse.pipeline import load_dot

        if self.config.independent_dot is None:
            return None
        dot = load_dot(self.config.independent_dot).to(self.device)
        use_fast_layout(dot, self.device)
        if self.config.merge_lora:
            dot.merge_lora()
        return ShrunkDash(dot, find_denoiser(self._main))

    def hasten(self) -> None:
        """Compile Dash and Dot, or replay their kernels as CUDA graphs, from now on."""
        from morse.graphs import enable_cuda_graphs

        if self.config.cuda_graphs:
            enable_cuda_graphs(self._main)
            self.mode = "cuda_graph"
            return
        compile_models(self._main)
        if self._shrunk is not None:
            self._shrunk.dot.compile(dynamic=False)
        self.mode = "compiled"

    def speed(self, conditions: Conditions) -> dict[str, object]:
        """Measure N at the batch size and in the precision that is sampled in."""
        with self._autocast():
            return measure_speed(self._main, self._batch_size(), self.mode, conditions)

    def speed_table(
        self,
        batch_sizes: list[int],
        conditions: Conditions,
        merged: tuple[bool, ...] = (True, False),
    ) -> list[dict[str, object]]:
        """Measure N at each batch size, LoRA merged and not, in that precision."""
        with self._autocast():
            return measure_speed_table(self._main, batch_sizes, self.mode, merged, conditions)

    def obstacle(self, method: Method) -> str | None:
        """Tell why a method can't be measured; None if it can."""
        from morse.evaluation.bench.ays import ays_name

        if method.solver in self._obstacles:
            return self._obstacles[method.solver]
        pipe, kind = self._by_solver[method.solver], method.kind
        if type(pipe).__name__ == "DiTPipeline" and scales_noise(pipe.scheduler):
            return f"DiTPipeline does not do the scaling that {SOLVERS[method.solver]} needs"
        if kind in ("independent", "shrunk") and self._shrunk is None:
            return "no --independent_dot was given"
        if kind in ("extrapolation", "shrunk") and self._is_conditional:
            return "it is made for unconditional pipelines of pixels"
        if kind == "ays" and ays_name(self._bare) is None:
            return "not applicable: there are timesteps for Stable Diffusion 1.5 and XL alone"
        if kind == "mixture" and pipe.dot.mixture is None:
            return "its Dot has no Gaussian mixture (`morse plan --mixture_images`)"
        if kind in PEERS and self.mode != "eager":
            return "it replaces forward methods, which --compile and --cuda_graphs have recorded"
        return PEERS[kind].obstacle(pipe) if kind in PEERS else None

    def measure_peer(self, method: Method, conditions: Conditions) -> dict[str, object]:
        """Measure what a peer's steps cost; see `peers.measure_peer`."""
        pipe = self._by_solver[method.solver]
        with self._autocast():
            return measure_peer(pipe, method, self._batch_size(), conditions)

    def sample(
        self,
        method: Method,
        budget: int,
        seeds: range,
        speed_ratio: float,
        conditions: Conditions,
        peer: dict[str, object] | None = None,
    ) -> Samples:
        """Sample with what `budget` LSD pay for; a method's first time, warm up before.

        Args:
            method: The method.
            budget: LSD.
            seeds: One an image.
            speed_ratio: N, which plans are made with.
            conditions: What the images are of.
            peer: What `measure_peer` returned, for a peer.
        """
        pipe, batch_size = self._pipe(method), self._batch_size(len(seeds))
        steps, note = choose_steps(method, budget, speed_ratio, pipe, peer)
        warm = method, batch_size, conditions.guidance_scale
        with self._autocast(), self._set_up(method, pipe) as seconds:
            if warm not in self._warm:
                warm_up = WARM_UP if isinstance(steps, int) else WARM_UP_PLAN
                few = seeds[:batch_size]
                sample_images(pipe, warm_up, few, batch_size, conditions=conditions)
                self._warm.add(warm)
                seconds.clear()
            samples = sample_images(pipe, steps, seeds, batch_size, conditions=conditions)
        notes = [note, samples.note]
        changes: dict[str, object] = {}
        if method.kind == "shrunk":
            changes = {"num_dash": 0, "num_dot": samples.num_dash}
        elif method.kind in PEERS:
            changes, told = peer_facts(method, peer, samples, seconds)
            notes.append(told)
        return dataclasses.replace(samples, note="; ".join(filter(None, notes)), **changes)

    def _batch_size(self, num_images: int | None = None) -> int:
        return min(self.config.batch_size, num_images or self.config.num_images)

    def _autocast(self) -> AbstractContextManager:
        return autocast(self.device, self.config.mixed_precision)

    def _pipe(self, method: Method) -> "DiffusionPipeline":
        if method.kind in ("baseline", "morse", "mixture", *PEERS):
            return self._by_solver[method.solver]
        key = method.solver, method.kind
        if key not in self._pipes:
            self._pipes[key] = self._make_pipe(method)
        return self._pipes[key]

    def _make_pipe(self, method: Method) -> "DiffusionPipeline":
        from morse.attach import enable_morse
        from morse.evaluation.bench.ays import AysScheduler, ays_name
        from morse.evaluation.bench.controls import ExtrapolationDot, reuse_dot
        from morse.schedulers import make_scheduler

        scheduler = self._by_solver[method.solver].scheduler
        if method.kind == "shrunk":
            return make_pipeline(self._shrunk, method.solver, scheduler.config)
        if method.kind == "pfdiff":
            return with_scheduler(self._bare, make_scheduler("pfdiff", scheduler.config))
        if method.kind == "ays":
            return with_scheduler(self._bare, AysScheduler.of(scheduler, ays_name(self._bare)))
        dot = reuse_dot if method.kind == "reuse" else ExtrapolationDot()
        if method.kind == "independent":
            dot = self._shrunk.dot
        pipe = with_solver(self._bare, method.solver)
        return enable_morse(pipe, dot, merge_lora=self.config.merge_lora)

    @contextmanager
    def _set_up(self, method: Method, pipe: "DiffusionPipeline") -> Iterator[list[float]]:
        """Put in place what a method needs while it samples; yields a peer's seconds a call."""
        if method.kind == "extrapolation":
            with pipe.dot.watching(pipe):
                yield []
        elif method.kind in PEERS:
            # On a GPU each timed call is waited for, which a peer that needs none is spared.
            watched = timed(find_denoiser(pipe)) if PEERS[method.kind].adaptive else nullcontext([])
            with apply_peer(pipe, method), watched as seconds:
                yield seconds
        else:
            yield []
