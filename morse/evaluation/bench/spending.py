"""What a method runs within a budget."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from morse.evaluation.bench.methods import Method
from morse.evaluation.bench.peers import PEERS, peer_steps
from morse.evaluation.bench.solvers import SOLVERS
from morse.plan import MorsePlan
from morse.saved_plans import SavedPlan
from morse.steps import find_steps, shorten_plan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def choose_steps(
    method: Method,
    budget: int,
    speed_ratio: float,
    pipe: "DiffusionPipeline",
    peer: dict[str, object] | None,
) -> tuple[int | SavedPlan, str]:
    """Choose what to run within a budget, and say where the solver makes it fewer evaluations.

    Args:
        method: The method.
        budget: LSD.
        speed_ratio: N.
        pipe: The method's pipeline.
        peer: What `measure_peer` returned, for a peer.
    """
    steps = method.plan(budget, speed_ratio, pipe)
    if steps is not None:
        plan = MorsePlan.from_string(steps.plan)
        shorter, _ = shorten_plan(pipe, {}, plan, (budget, speed_ratio))
        wanted, made = len(plan), len(shorter)
        steps = replace(steps, plan=str(shorter))
    else:
        wanted = budget
        if method.kind == "shrunk":
            wanted = math.floor(speed_ratio * budget)
        elif method.kind in PEERS:
            wanted = peer_steps(method, budget, peer)
        wanted = min(wanted, pipe.scheduler.config.num_train_timesteps)
        steps = made = find_steps(pipe, {}, wanted)[1]
    note = f"{made} evaluations, which {SOLVERS[method.solver]} can make well, instead of {wanted}"
    return steps, note if made < wanted else ""
