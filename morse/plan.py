"""Which evaluations of a run Dash makes and which Dot makes, and what that costs.

**Dash** is the pretrained denoiser, **Dot** the fast network that corrects Dash's latest estimate
between two Dash evaluations. **LSD** (Latency per Step of Dash) is the unit of cost: a Dash
evaluation costs 1 LSD, a Dot evaluation 1/N, where the speed ratio N says how many times faster Dot
is on the device, dtype and batch in use (Morse, ICML 2025, section 3.2). Estimates of a Gaussian
mixture (`morse.dot.mixture`), with which a run may begin, run no network and count for nothing.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

ModelName = Literal["dash", "dot", "gaussian"]
_MAX_PLAN_RATIO = 3.0  # evaluations per LSD, where not more are asked for
MIXTURE_START = "ggg"  # what begins a plan where a mixture is to
_LETTERS: dict[str, ModelName] = {"D": "dash", "o": "dot", "g": "gaussian"}


def _check_count(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")


def _check_speed_ratio(speed_ratio: float) -> None:
    if not (speed_ratio > 0 and math.isfinite(speed_ratio)):
        raise ValueError(
            f"speed_ratio (N, how many times faster Dot is than Dash) must be a positive number, "
            f"got {speed_ratio!r}."
        )


def check_budget(lsd: float) -> None:
    """Raise `ValueError` unless `lsd` is a budget: a finite number that pays for a Dash."""
    is_number = isinstance(lsd, Real) and not isinstance(lsd, bool)
    if not (is_number and math.isfinite(lsd) and lsd >= 1):
        raise ValueError(
            "lsd must be a finite number of at least 1 (the first evaluation is Dash's), got "
            f"{lsd!r}."
        )


@dataclass(frozen=True)
class MorsePlan:
    """An ordered list of model evaluations, "dash" or "dot"; the first is "dash".

    Before it there may be some that are "gaussian".

    Attributes:
        models: The model of each evaluation, in sampling order.

    Raises:
        ValueError: If the plan is empty, names another model, starts with "dot", or is "gaussian"
            later on.
    """

    models: tuple[ModelName, ...]

    def __post_init__(self) -> None:
        """Check the models."""
        unknown = sorted(set(self.models) - set(_LETTERS.values()))
        if unknown:
            raise ValueError(f'models may hold "dash", "dot" and "gaussian" only, got {unknown}.')
        networks = self.models[self.num_gaussian :]
        if "gaussian" in networks:
            raise ValueError(f'models may be "gaussian" before "dash" only, got {self.models!r}.')
        if not networks or networks[0] != "dash":
            raise ValueError(
                'models must start with "dash", if not with "gaussian" before (Dot corrects an '
                f"earlier Dash estimate), got {self.models!r}."
            )

    @classmethod
    def uniform(cls, num_dash: int, num_dot: int) -> "MorsePlan":
        """Start with Dash and spread the Dash evaluations uniformly (Morse, section 3.2).

        2 Dash and 4 Dot evaluations give Dash Dot Dot Dash Dot Dot.

        Raises:
            ValueError: If `num_dash` < 1 or `num_dot` < 0.
        """
        _check_count("num_dash", num_dash, 1)
        _check_count("num_dot", num_dot, 0)
        total = num_dash + num_dot
        dash_steps = {index * total // num_dash for index in range(num_dash)}
        return cls(tuple("dash" if step in dash_steps else "dot" for step in range(total)))

    @classmethod
    def from_counts(
        cls, num_dash: int | None, num_dot: int | None, num_inference_steps: int | None
    ) -> "MorsePlan":
        """Make so many evaluations with each, uniformly, given any two of the three numbers.

        Raises:
            ValueError: If fewer are given, or they are outside their ranges.
        """
        if num_dash is not None and num_dot is not None:
            return cls.uniform(num_dash, num_dot)
        steps = num_inference_steps
        if steps is None or (num_dash is None and num_dot is None):
            raise ValueError(
                f"num_dash_steps={num_dash} and num_dot_steps={num_dot}: give both, or one of them "
                "and num_inference_steps."
            )
        if num_dash is not None:
            _check_count("num_dash_steps", num_dash, 1)
            problem = f"num_dash_steps={num_dash} is more than"
        else:
            _check_count("num_dot_steps", num_dot, 0)
            num_dash = steps - num_dot
            problem = f"num_dot_steps={num_dot} leaves no Dash evaluation of"
        if not 1 <= num_dash <= steps:
            raise ValueError(
                f"{problem} num_inference_steps={steps}; lower the one or raise the other."
            )
        return cls.uniform(num_dash, steps - num_dash)

    @classmethod
    def from_budget(
        cls, lsd: float, speed_ratio: float, ratio: float = 2.0, max_dot_share: float = 0.3
    ) -> "MorsePlan":
        """Spend a budget: fewer Dash evaluations, and as many Dot ones as that pays for.

        With n LSD, k of them are traded for N*k Dot evaluations such that the number of
        evaluations is about `ratio` times n: (n - k + N*k) / n = ratio (Morse, section 3.2, which
        advises 2 to 3). Two bounds on that: a slow Dot would need most of the budget, which costs
        quality (below Dash alone from about 70 % on; Morse, Figure 13), so its share is limited; a
        fast one would need less than one Dash evaluation, so at least one is traded, for no more
        evaluations than three times n. Where that does not pay (N near 1, or a budget of which one
        Dash evaluation is too large a share) the plan is all Dash.

        Args:
            lsd: Budget in LSD, at least 1; the plan's cost never exceeds it.
            speed_ratio: N, the latency of a Dash evaluation over that of a Dot evaluation.
            ratio: Evaluations per LSD to aim at, at least 1.
            max_dot_share: About this share of the budget, in [0, 1], goes to Dot at most, before
                rounding to whole Dash evaluations; at least one is traded, as said.

        Raises:
            ValueError: If an argument is outside its range.
        """
        check_budget(lsd)
        _check_speed_ratio(speed_ratio)
        if not (ratio >= 1 and math.isfinite(ratio)):
            raise ValueError(f"ratio (evaluations per LSD) must be at least 1, got {ratio!r}.")
        if not 0 <= max_dot_share <= 1:
            raise ValueError(f"max_dot_share must be in [0, 1], got {max_dot_share!r}.")
        all_dash = cls.uniform(math.floor(lsd), 0)
        if speed_ratio <= 1:
            return all_dash
        traded = lsd * min((ratio - 1) / (speed_ratio - 1), max_dot_share)
        if traded and lsd * max_dot_share >= 1:
            traded = max(traded, 1)
        num_dash = min(max(1, round(lsd - traded)), math.floor(lsd))
        num_dot = min(
            math.floor((lsd - num_dash) * speed_ratio + 1e-9),
            math.floor(lsd * max(ratio, _MAX_PLAN_RATIO)) - num_dash,
        )
        return cls.uniform(num_dash, num_dot) if num_dash + num_dot > len(all_dash) else all_dash

    @classmethod
    def from_string(cls, letters: str) -> "MorsePlan":
        """Read a plan such as "DooDoo": D for Dash, o for Dot, g for Gaussian; the inverse of str.

        Raises:
            ValueError: If another letter occurs.
        """
        wrong = sorted(set(letters) - set(_LETTERS))
        if wrong:
            raise ValueError(
                "a plan is written with D (Dash), o (Dot) and g (Gaussian mixture) only, got "
                f"{wrong}."
            )
        return cls(tuple(_LETTERS[letter] for letter in letters))

    @classmethod
    def from_mask(cls, is_dash: Sequence[bool]) -> "MorsePlan":
        """Read a plan from one boolean an evaluation: True for Dash, False for Dot."""
        return cls(tuple("dash" if dash else "dot" for dash in is_dash))

    @classmethod
    def parse(cls, plan: "MorsePlan | str | Sequence[bool]") -> "MorsePlan":
        """Read a plan in any of its forms: itself, a string, or a mask.

        Raises:
            ValueError: If it is none of them.
        """
        if isinstance(plan, cls):
            return plan
        if isinstance(plan, str):
            return cls.from_string(plan)
        mask = tuple(plan) if isinstance(plan, Iterable) else None
        if mask is None or any(isinstance(each, str) for each in mask):
            raise ValueError(
                'plan must be a MorsePlan, a string such as "DooDoo", or a list of booleans (True '
                f"for Dash), got {plan!r}."
            )
        return cls.from_mask(mask)

    def shortened(self, length: int) -> "MorsePlan":
        """Spread the same Dash evaluations, or as many as fit, over at most `length` evaluations.

        What a mixture begins, it still begins.

        Raises:
            ValueError: If `length` < 1.
        """
        if length >= len(self):
            return self
        num_gaussian = min(self.num_gaussian, max(length - 1, 0))
        num_dash = min(self.num_dash, length - num_gaussian)
        networks = self.uniform(num_dash, length - num_gaussian - num_dash)
        return MorsePlan(("gaussian",) * num_gaussian + networks.models)

    def filled(self, lsd: float, speed_ratio: float) -> "MorsePlan":
        """Make as many of the evaluations with Dash as a budget pays for, spread uniformly."""
        length = len(self) - self.num_gaussian
        if not self.num_dot or speed_ratio <= 1:
            return self
        affordable = math.floor((lsd - length / speed_ratio) / (1 - 1 / speed_ratio) + 1e-9)
        num_dash = max(self.num_dash, min(affordable, length))
        networks = self.uniform(num_dash, length - num_dash)
        return MorsePlan(("gaussian",) * self.num_gaussian + networks.models)

    def extended(self, lsd: float, speed_ratio: float) -> "MorsePlan":
        """Spend what the plan leaves of a budget, if anything, on Dash evaluations at its end."""
        further = math.floor(lsd - self.cost(speed_ratio) + 1e-9)
        return MorsePlan(self.models + ("dash",) * further)

    @property
    def num_dash(self) -> int:
        """Number of Dash evaluations."""
        return self.models.count("dash")

    @property
    def num_dot(self) -> int:
        """Number of Dot evaluations."""
        return self.models.count("dot")

    @property
    def num_gaussian(self) -> int:
        """Number of evaluations of the Gaussian mixture, with which the run begins."""
        return self.models.count("gaussian")

    def cost(self, speed_ratio: float) -> float:
        """The plan's cost in LSD when Dot is `speed_ratio` times as fast as Dash."""
        _check_speed_ratio(speed_ratio)
        return self.num_dash + self.num_dot / speed_ratio

    def __len__(self) -> int:
        return len(self.models)

    def __iter__(self) -> Iterator[ModelName]:
        return iter(self.models)

    def __getitem__(self, index: int) -> ModelName:
        return self.models[index]

    def __str__(self) -> str:
        letters = {model: letter for letter, model in _LETTERS.items()}
        return "".join(letters[model] for model in self.models)
