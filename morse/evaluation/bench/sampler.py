"""Sampling any method of the benchmark at any budget, and measuring N as it is sampled."""

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from morse.denoisers import find_denoiser
from morse.evaluation.bench.engagement import timed
from morse.evaluation.bench.methods import Method
from morse.evaluation.bench.peers import PEERS, apply_peer, measure_peer, peer_facts
from morse.evaluation.bench.pipelines import Pipelines
from morse.evaluation.bench.runs import Samples, sample_images
from morse.evaluation.bench.speed import (
    Mode,
    compile_models,
    measure_speed,
    measure_speed_table,
)
from morse.evaluation.bench.spending import choose_steps
from morse.evaluation.conditions import Conditions, call_parameters, make_conditions
from morse.evaluation.environment import autocast
from morse.plan import MorsePlan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from morse.evaluation.bench.config import BenchmarkConfig

# Evaluations of a warm-up that every solver can make, and that reach a cached step of a peer.
WARM_UP, WARM_UP_PLAN = 3, MorsePlan.from_string("Doo")


class Bench:
    """Samples any method at any budget.

    Attributes:
        device: Where the models are.
        mode: Whether they are compiled, or replayed as CUDA graphs.
        pipelines: One a solver and kind of method.
    """

    def __init__(self, config: "BenchmarkConfig"):
        """Load Dash, Dot and the controls' networks."""
        self.config = config
        self.mode: Mode = "eager"
        self.pipelines = Pipelines(config)
        self.device = self.pipelines.main.device
        self._warm: set[tuple[Method, int, float | None]] = set()

    @property
    def pipeline_class(self) -> str:
        """The name of the pipeline's class."""
        return type(self.pipelines.bare).__name__

    def guidance_scales(self) -> tuple[float | None, ...]:
        """Return the guidance scales to measure at: (None,) for a pipeline without guidance."""
        if self.config.guidance_scale:
            return tuple(sorted(set(self.config.guidance_scale)))
        parameter = call_parameters(self.pipelines.bare).get("guidance_scale")
        default = None if parameter is None else parameter.default
        return (None if default is inspect.Parameter.empty else default,)

    def conditions(self, guidance_scale: float | None) -> Conditions:
        """Return what images are asked for at a guidance scale.

        Raises:
            ValueError: If the settings and the pipeline don't suit each other.
        """
        config = self.config
        asked = config.prompts, config.class_names, config.prompt_embeds
        return make_conditions(self.pipelines.bare, *asked, guidance_scale)

    def hasten(self) -> None:
        """Compile Dash and Dot, or replay their kernels as CUDA graphs, from now on."""
        from morse.graphs import enable_cuda_graphs

        if self.config.cuda_graphs:
            enable_cuda_graphs(self.pipelines.main)
            self.mode = "cuda_graph"
            return
        compile_models(self.pipelines.main)
        if self.pipelines.shrunk is not None:
            self.pipelines.shrunk.dot.compile(dynamic=False)
        self.mode = "compiled"

    def speed(self, conditions: Conditions) -> dict[str, object]:
        """Measure N at the batch size and in the precision that is sampled in."""
        with self._autocast():
            return measure_speed(self.pipelines.main, self._batch_size(), self.mode, conditions)

    def speed_table(
        self,
        batch_sizes: list[int],
        conditions: Conditions,
        merged: tuple[bool, ...],
    ) -> list[dict[str, object]]:
        """Measure N at each batch size, LoRA merged and not, in that precision."""
        with self._autocast():
            return measure_speed_table(
                self.pipelines.main, batch_sizes, self.mode, merged, conditions
            )

    def obstacle(self, method: Method) -> str | None:
        """Tell why a method can't be measured; None if it can."""
        return self.pipelines.obstacle(method, self.mode)

    def measure_peer(self, method: Method, conditions: Conditions) -> dict[str, object]:
        """Measure what a peer's steps cost; see `peers.measure_peer`."""
        pipe = self.pipelines.by_solver[method.solver]
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
        pipe, batch_size = self.pipelines.of(method), self._batch_size(len(seeds))
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

            def sample_bare() -> Tensor:
                few = seeds[:batch_size]
                with self._autocast():
                    bare = sample_images(pipe, steps, few, batch_size, conditions=conditions)
                return bare.images

            changes, told = peer_facts(method, peer, samples, seconds, sample_bare)
            notes.append(told)
        return dataclasses.replace(samples, note="; ".join(filter(None, notes)), **changes)

    def _batch_size(self, num_images: int | None = None) -> int:
        return min(self.config.batch_size, num_images or self.config.num_images)

    def _autocast(self) -> AbstractContextManager:
        return autocast(self.device, self.config.mixed_precision)

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
