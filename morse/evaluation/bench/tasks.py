"""The list of methods and budgets that the benchmark's settings make."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from morse.evaluation.bench.methods import AS_PLANNED, KINDS, PLANNED, WITH_MIXTURE, Method

if TYPE_CHECKING:
    from morse.evaluation.bench.config import BenchmarkConfig

# Each peer (`bench.peers`) and what it is measured with; the number at the end is its parameter.
# The first is the default of the library that it comes from; of DeepCache and PAB, which leave
# nothing out by default, what the example in their documentation has.
PEER_SETTINGS = {
    "deepcache": ("interval 3", "interval 2", "interval 5"),
    "tomesd": ("ratio 0.5", "ratio 0.25", "ratio 0.75"),
    "fbcache": ("threshold 0.05", "threshold 0.1", "threshold 0.2"),
    "pab": ("every 2", "every 3", "every 4"),
    "fastercache": ("every 2", "every 3", "every 4"),
    "taylorseer": ("interval 5", "interval 3", "interval 2"),
    # The other thresholds are run with less that is always evaluated, for budgets of few steps.
    "cache-dit": ("default threshold 0.08", "threshold 0.05", "threshold 0.1", "threshold 0.2"),
}
CHOOSABLE = tuple(kind for kind in KINDS if kind not in PEER_SETTINGS)
# Kinds that work with one solver alone, the one that their authors use.
OWN_SOLVER = {"pfdiff": "ddim", "ays": "dpmsolver++"}
# What timesteps are interpolated from; by it cells are told from those of ten levels.
AYS_SETTING = "11 levels"
STAGES = {"morse": 1, "baseline": 2, "reuse": 3}  # what is not named comes last


def list_tasks(config: "BenchmarkConfig") -> list[tuple[Method, int]]:
    """List every method with every budget it is measured at, what matters most first."""

    def stage(task: tuple[Method, int]) -> int:
        method, budget = task
        if method.kind == "baseline" and budget in config.lsd:
            return 0
        return STAGES.get(method.kind, 4)

    tasks = dict.fromkeys(_all_tasks(config))  # what was asked for twice is measured once
    return [] if config.latency_only else sorted(tasks, key=stage)


def all_solvers(config: "BenchmarkConfig") -> tuple[str, ...]:
    """List the solvers asked for, and those that a kind asked for brings with it."""
    own = [solver for kind, solver in OWN_SOLVER.items() if kind in config.kinds]
    return tuple(dict.fromkeys((*config.solvers, *own)))


def _all_tasks(config: "BenchmarkConfig") -> Iterator[tuple[Method, int]]:
    for solver in all_solvers(config):
        for method in _methods(config, solver):
            # Also for the controls that "best" curves are made of, or these would have holes.
            extra = config.baseline_lsd if method.kind in WITH_MIXTURE else ()
            for lsd in sorted({*config.lsd, *extra}):
                yield method, lsd


def _methods(config: "BenchmarkConfig", solver: str) -> Iterator[Method]:
    asked_ratios = config.ddim_ratios if solver == "ddim" else config.dpm_ratios
    ratios = tuple(ratio for ratio in asked_ratios if ratio)
    asked, has_controls = solver in config.solvers, solver in config.control_solvers
    for kind in config.kinds:
        wanted = asked and has_controls
        if kind in ("baseline", "morse"):
            wanted = asked
        elif kind in OWN_SOLVER:
            wanted = has_controls and OWN_SOLVER[kind] == solver
        elif kind == "mixture":  # what Morse's strongest rows have to be compared with
            wanted = asked and (has_controls or solver in config.planned_solvers)
        if not wanted:
            continue
        for ratio in ratios if kind in PLANNED else (1.0,):
            yield Method(solver, kind, ratio, AYS_SETTING if kind == "ays" else "")
        if kind == "morse" and solver in config.planned_solvers:
            yield Method(solver, kind, setting=AS_PLANNED)
    for peer in config.peers if asked and has_controls else ():
        for setting in PEER_SETTINGS.get(peer, ()):  # "none" has no settings
            yield Method(solver, peer, setting=setting)
