"""The methods that are compared: solvers, Morse, its controls and its peers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from morse.evaluation.bench.solvers import SOLVERS
from morse.plan import MIXTURE_START, MorsePlan
from morse.saved_plans import SavedPlan

if TYPE_CHECKING:
    from morse.pipeline import MorsePipeline

REFERENCE_SOLVER, REFERENCE_STEPS = "dpmsolver++", 100
Kind = Literal[
    "baseline", "morse", "reuse", "extrapolation", "pfdiff", "ays", "mixture", "independent",
    "shrunk", "deepcache", "tomesd", "fbcache", "pab", "fastercache", "taylorseer", "cache-dit",
]  # fmt: skip
KINDS: dict[Kind, str] = {
    "baseline": "",
    "morse": "Morse-",
    "reuse": "Reuse-",
    "extrapolation": "Extrapolation-",
    "pfdiff": "PFDiff-",
    "ays": "AYS-",
    "mixture": "Mixture-",
    "independent": "Independent-",
    "shrunk": "Shrunk-",
    "deepcache": "DeepCache-",
    "tomesd": "ToMe-",
    "fbcache": "FirstBlockCache-",
    "pab": "PAB-",
    "fastercache": "FasterCache-",
    "taylorseer": "TaylorSeer-",
    "cache-dit": "cache-dit-",
}
# Kinds that Morse has to beat: Dash with another solver, or at other timesteps.
TRAINING_FREE = ("baseline", "pfdiff", "ays")
WITH_MIXTURE = (*TRAINING_FREE, "mixture")  # the strongest without training and fits
PLANNED = ("morse", "reuse", "extrapolation", "independent")  # kinds that run Morse's plan
# What methods are compared with, by name; at each budget another solver may be the best.
BEST_TRAINING_FREE = "best training-free solver"
BEST_WITH_MIXTURE = "best solver, bare or begun by the mixture"
AS_PLANNED = "as planned"  # of kind "morse": what a user's call with this budget does


@dataclass(frozen=True)
class Method:
    """A way of spending a budget.

    Attributes:
        solver: A key of `SOLVERS`.
        kind: "baseline": Dash alone. "morse": Dash and Dot. The controls "reuse", "extrapolation"
            and "independent" run Morse's plan, counted as if they had its cost, with something
            else in Dot's place; "pfdiff", "mixture" and "shrunk" are controls with plans of their
            own (all in `bench.controls`). "ays": Dash at tuned timesteps (`bench.ays`). Everything
            else: a peer (`bench.peers`).
        ratio: Evaluations per LSD that the plan aims at (see `MorsePlan.from_budget`).
        setting: A peer's setting, such as "interval 3". With kind "morse" `AS_PLANNED` for what
            `lsd=` does, saved plans and their grids included, instead of `ratio`. With "ays" what
            timesteps are interpolated from. Else "".
    """

    solver: str
    kind: Kind = "baseline"
    ratio: float = 1.0
    setting: str = ""

    @property
    def is_training_free(self) -> bool:
        """Whether this is a solver over Dash alone, and so among those that Morse has to beat."""
        return self.kind in TRAINING_FREE

    def is_reference(self, budget: int) -> bool:
        """Tell whether this method at `budget` is what fidelity is measured against."""
        return (self.kind, self.solver, budget) == ("baseline", REFERENCE_SOLVER, REFERENCE_STEPS)

    @property
    def label(self) -> str:
        """A short name, such as "DDIM", "Morse-DDIM r2" or "DeepCache-DDIM interval 3"."""
        by_ratio = self.kind in PLANNED and self.setting != AS_PLANNED
        detail = f"r{self.ratio:g}" if by_ratio else self.setting
        return f"{KINDS[self.kind]}{SOLVERS[self.solver]} {detail}".rstrip()

    def plan(self, lsd: int, speed_ratio: float, pipe: "MorsePipeline") -> SavedPlan | None:
        """Return the plan for `lsd`; None for the kinds that Morse has no part in.

        Args:
            lsd: The budget.
            speed_ratio: N; `pipe` plans with it from now on.
            pipe: The pipeline that the plan is for.
        """
        if self.kind == "mixture":
            return SavedPlan(lsd, MIXTURE_START + "D" * lsd)
        if self.kind not in PLANNED:
            return None
        if self.setting != AS_PLANNED:
            return SavedPlan(lsd, str(MorsePlan.from_budget(lsd, speed_ratio, self.ratio)))
        pipe.speed_ratio = speed_ratio
        return pipe.plan_for(lsd)
