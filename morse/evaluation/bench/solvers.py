"""The solvers that are compared."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# Keys as in `morse.schedulers.SCHEDULERS`; all of them deterministic.
SOLVERS = {
    "ddim": "DDIM",
    "dpmsolver++1": "DPM++ 1",
    "dpmsolver++": "DPM++ 2M",
    "unipc": "UniPC",
    "deis": "DEIS",
    "pndm": "PNDM",
    "heun": "Heun",
    "leapfrog": "Leapfrog",
    "leapfrog-dense": "Leapfrog, power 1.5",  # Morse's plans may lie on such a grid
}
SPACING = {"timestep_spacing": "trailing"}
# PNDM as Stable Diffusion runs it: its Runge-Kutta start takes at least 13 evaluations, and its
# steps all have one length, which only a "leading" grid has (on a trailing one they miss).
OPTIONS = {"pndm": {"skip_prk_steps": True, "timestep_spacing": "leading", "steps_offset": 1}}


def check_solvers(solvers: tuple[str, ...]) -> None:
    """Raise ValueError for a solver that is not in `SOLVERS`."""
    for solver in solvers:
        if solver not in SOLVERS:
            raise ValueError(f"solver {solver!r} is unknown, choose from {list(SOLVERS)}")


def make_solver(solver: str, config: dict[str, object]) -> "SchedulerMixin":
    """Make the scheduler of a solver in `SOLVERS` from the config of a pipeline's own scheduler.

    All but PNDM begin at the last timestep, on a "trailing" grid, whatever the pipeline's own: only
    so do they start from the same noise as the reference.
    """
    from morse.schedulers import make_scheduler

    # Chosen, not left at a default, which would be the new class's own.
    chosen = {**SPACING, **OPTIONS.get(solver, {}), "_use_default_values": ()}
    return make_scheduler(solver, {**config, **chosen})
