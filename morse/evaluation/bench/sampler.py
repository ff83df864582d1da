"""The loaded pipelines of the benchmark: one a solver and kind of method, over one Dash."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from morse.evaluation.bench.loading import load_pipelines, make_pipeline
from morse.evaluation.bench.peers import (
    PEERS,
    deepcache,
    deepcache_cost,
    deepcache_steps,
    measure_deepcache,
    obstacle,
)
from morse.evaluation.bench.runs import PLANNED, REFERENCE_SOLVER, Method, Samples, sample_images
from morse.evaluation.bench.solvers import SOLVERS
from morse.evaluation.bench.speed import (
    Mode,
    compile_models,
    measure_speed,
    measure_speed_table,
    set_merged,
)
from morse.plan import MorsePlan
from morse.steps import find_steps

if TYPE_CHECKING:
    from morse.evaluation.bench.config import BenchmarkConfig
    from morse.evaluation.bench.controls import ShrunkDash
    from morse.evaluation.bench.solver_pipeline import SolverPipeline

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Evaluations of a warm-up that every solver can make, and that reach a cached step of a peer.
WARM_UP, WARM_UP_PLAN = 3, MorsePlan.from_string("Doo")


class Bench:
    """Samples any method at any budget.

    Attributes:
        device: Where the models are.
        mode: Whether they are compiled.
    """

    def __init__(self, config: "BenchmarkConfig"):
        """Load Dash, Dot and the controls' networks."""
        solvers = tuple(dict.fromkeys((*config.solvers, REFERENCE_SOLVER)))
        self.config = config
        self.mode: Mode = "eager"
        self._by_solver = load_pipelines(config.pipeline, config.dot, solvers, config.device)
        self._main = self._by_solver[REFERENCE_SOLVER]
        self.device = self._main.device
        set_merged(self._main, config.merge_lora)
        self._shrunk = self._load_shrunk()
        # Made once: to enable Morse anew would make its Dot be compiled anew.
        self._pipes: dict[tuple[str, str], SolverPipeline] = {}
        self._warm: set[tuple[Method, int]] = set()

    def _load_shrunk(self) -> "ShrunkDash | None":
        from morse.evaluation.bench.controls import ShrunkDash
        from morse.pipeline import load_dot

        if self.config.independent_dot is None:
            return None
        dot = load_dot(self.config.independent_dot).to(self.device)
        if self.device.type == "cuda":
            dot.to(memory_format=torch.channels_last)
        if self.config.merge_lora:
            dot.merge_lora()
        return ShrunkDash(dot, self._main.unet)

    def compile(self) -> None:
        """Compile Dash and Dot from now on."""
        compile_models(self._main)
        if self._shrunk is not None:
            self._shrunk.dot.compile(dynamic=False)
        self.mode = "compiled"

    def speed(self) -> dict[str, object]:
        """Measure N at the batch size and in the precision that is sampled in."""
        with self._autocast():
            return measure_speed(self._main, self._batch_size(), self.mode)

    def speed_table(
        self, batch_sizes: list[int], merged: tuple[bool, ...] = (True, False)
    ) -> list[dict[str, object]]:
        """Measure N at each batch size, LoRA merged and not, in that precision."""
        with self._autocast():
            return measure_speed_table(self._main, batch_sizes, self.mode, merged)

    def obstacle(self, method: Method) -> str | None:
        """Tell why a method can't be measured; None if it can."""
        if method.kind in ("independent", "shrunk") and self._shrunk is None:
            return "no --independent_dot was given"
        return self.peer_obstacle(method.kind, method.solver) if method.kind in PEERS else None

    def peer_obstacle(self, peer: str, solver: str = REFERENCE_SOLVER) -> str | None:
        """Tell why one of `PEERS` can't be measured with a solver; None if it can."""
        if self.mode == "compiled":
            return "it replaces forward methods, which --compile has compiled"
        return obstacle(peer, self._main.unet, self._by_solver[solver].scheduler)

    def measure_peer(self, method: Method) -> dict[str, object]:
        """Measure what a cached step of DeepCache costs, which is the same with every solver."""
        with self._autocast():
            return measure_deepcache(self._main, interval_of(method), self._batch_size())

    def sample(
        self,
        method: Method,
        budget: int,
        seeds: range,
        speed_ratio: float,
        peer: dict[str, object] | None = None,
    ) -> Samples:
        """Sample with what `budget` LSD pay for; a method's first time, warm up before.

        Args:
            method: The method.
            budget: LSD.
            seeds: One an image.
            speed_ratio: N, which plans are made with.
            peer: What `measure_peer` returned, for a peer.
        """
        pipe, batch_size = self._pipe(method), self._batch_size(len(seeds))
        steps, note = self._steps(method, budget, speed_ratio, pipe, peer)
        with self._autocast(), self._set_up(method, pipe):
            if (method, batch_size) not in self._warm:
                warm_up = WARM_UP_PLAN if isinstance(steps, MorsePlan) else WARM_UP
                sample_images(pipe, warm_up, seeds[:batch_size], batch_size)
                self._warm.add((method, batch_size))
            samples = sample_images(pipe, steps, seeds, batch_size)
        notes = [note, samples.note]
        changes: dict[str, object] = {}
        if method.kind == "shrunk":
            changes = {"num_dash": 0, "num_dot": samples.num_dash}
        elif method.kind == "deepcache":
            full, cost = deepcache_cost(steps, interval_of(method), peer["cached_lsd"])
            changes = {"num_dash": full, "lsd": cost, "engaged": peer["engaged"]}
            notes.append(peer["note"])
        return dataclasses.replace(samples, note="; ".join(filter(None, notes)), **changes)

    def _batch_size(self, num_images: int | None = None) -> int:
        return min(self.config.batch_size, num_images or self.config.num_images)

    def _steps(
        self,
        method: Method,
        budget: int,
        speed_ratio: float,
        pipe: "SolverPipeline",
        peer: dict[str, object] | None,
    ) -> tuple[int | MorsePlan, str]:
        """Choose what to run within a budget, and say where the solver can't use all of it."""
        planned = method.plan(budget, speed_ratio)
        if planned is not None:
            wanted, made = len(planned), find_steps(pipe, {}, len(planned))[1]
            steps = planned.shortened(made)
        else:
            wanted = budget
            if method.kind == "shrunk":
                wanted = math.floor(speed_ratio * budget)
            elif method.kind == "deepcache":
                wanted = deepcache_steps(budget, interval_of(method), peer["cached_lsd"])
            wanted = min(wanted, pipe.scheduler.config.num_train_timesteps)
            steps = made = find_steps(pipe, {}, wanted)[1]
        notes = []
        if made < wanted:
            notes.append(f"{made} of {wanted} evaluations: {SOLVERS[method.solver]} can't make all")
        if method.kind == "deepcache":
            full, cached = deepcache_cost(steps, interval_of(method), 0)[0], peer["cached_lsd"]
            notes.append(f"{steps} steps, {full} of them full; a cached one costs {cached:.2f} LSD")
        return steps, "; ".join(notes)

    def _autocast(self) -> AbstractContextManager:
        if self.config.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.config.mixed_precision])

    def _pipe(self, method: Method) -> "SolverPipeline":
        if method.kind in ("baseline", "morse", "deepcache"):
            return self._by_solver[method.solver]
        key = method.solver, method.kind
        if key not in self._pipes:
            self._pipes[key] = self._make_pipe(method)
        return self._pipes[key]

    def _make_pipe(self, method: Method) -> "SolverPipeline":
        from morse.attach import enable_morse
        from morse.evaluation.bench.controls import ExtrapolationDot, PFDiffScheduler, reuse_dot

        unet = self._shrunk if method.kind == "shrunk" else self._main.unet
        config = self._by_solver[method.solver].scheduler.config
        pipe = make_pipeline(unet, method.solver, config)
        if method.kind == "pfdiff":
            pipe.scheduler = PFDiffScheduler.from_config(pipe.scheduler.config)
        if method.kind in PLANNED:
            dot = reuse_dot if method.kind == "reuse" else ExtrapolationDot()
            if method.kind == "independent":
                dot = self._shrunk.dot
            enable_morse(pipe, dot, merge_lora=self.config.merge_lora)
        return pipe

    @contextmanager
    def _set_up(self, method: Method, pipe: "SolverPipeline") -> Iterator[None]:
        """Put in place what a method needs while it samples."""
        with (
            deepcache(pipe, interval_of(method)) if method.kind == "deepcache" else nullcontext(),
            pipe.dot.watching(pipe) if method.kind == "extrapolation" else nullcontext(),
        ):
            yield


def interval_of(method: Method) -> int:
    """Read DeepCache's interval out of a method's setting, such as "interval 3"."""
    return int(method.setting.rpartition(" ")[2])
