"""A local search over plans, whose errors are measured on whole trajectories.

Errors of single steps don't add up: Dot's error at one step changes what all later ones see. So a
plan is judged by the samples it ends in. What is searched is small (a string of D and o, and a few
grids), so that going from the best of some regular plans to better neighbours finds good ones.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from morse.plan import MIXTURE_START, MorsePlan
from morse.saved_plans import is_affordable

UNIFORM_RATIOS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5)
# How many of the best on few images are judged on all; the best uniform plan and the best all-Dash
# one are too, so that the result is never worse than either there.
FINALISTS = 4


@dataclass(frozen=True)
class Candidate:
    """A plan such as "DoDo", and scheduler options as sorted (name, value) pairs."""

    plan: str
    options: tuple[tuple[str, object], ...] = ()


# (candidate, quick) -> PSNR in dB, on few images if quick, else on all
Evaluate = Callable[[Candidate, bool], float]


@dataclass
class Found:
    """What a search ended with.

    Attributes:
        best: The best candidate, judged on all images.
        psnr: Its PSNR there.
        uniform: The best of the uniform plans, judged on all images.
        uniform_psnr: Its PSNR there.
        tried: Every candidate's PSNR on few images.
        fitted: PSNR on all images of candidates whose steps were fitted, before or after the
            search, and of the all Dash that a fit began with.
    """

    best: Candidate
    psnr: float
    uniform: Candidate
    uniform_psnr: float
    tried: dict[Candidate, float] = field(default_factory=dict)
    fitted: dict[Candidate, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The plans that a search goes through.

    Attributes:
        lsd: The budget.
        speed_ratio: N.
        grids: Scheduler options to choose from.
        ratios: Evaluations per LSD of the uniform plans to start from; all Dash is always tried.
        with_dot: Whether there is a Dot; else the grids of all Dash are compared and no more.
        with_mixture: Whether runs may begin with evaluations of a Gaussian mixture.
        shorten: Plan -> one of a length that the solver can make, which is tried in its place.
    """

    lsd: float
    speed_ratio: float
    grids: Sequence[tuple[tuple[str, object], ...]] = ((),)
    ratios: Sequence[float] = UNIFORM_RATIOS
    with_dot: bool = True
    with_mixture: bool = False
    shorten: Callable[[str], str] = str

    def possible(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Shorten plans to what the solver can make, and leave out what is there twice."""
        shortened = (replace(each, plan=self.shorten(each.plan)) for each in candidates)
        return list(dict.fromkeys(shortened))

    def uniform(self) -> list[Candidate]:
        """List uniform plans of several ratios, all Dash among them, on every grid."""
        ratios = (1.0, *(self.ratios if self.with_dot else ()))
        plans = [MorsePlan.from_budget(self.lsd, self.speed_ratio, each, 0.5) for each in ratios]
        strings = dict.fromkeys(str(plan) for plan in plans)
        return self.possible([Candidate(plan, grid) for plan in strings for grid in self.grids])

    def early(self) -> list[Candidate]:
        """List plans in which Dash and Dot alternate first and Dash alone ends, on every grid.

        Errors at high noise decide where a sample goes, those at low noise how near it gets: there
        a Dash evaluation is worth most once the grid is fine.
        """
        plans = []
        for pairs in sorted({max(1, round(self.lsd / 3)), max(1, round(self.lsd / 2))}):
            start = MorsePlan.from_string("Do" * pairs)
            if self.lsd - start.cost(self.speed_ratio) >= 1:
                plans.append(str(start.extended(self.lsd, self.speed_ratio)))
        return [Candidate(plan, grid) for plan in plans for grid in self.grids]

    def starts(self, known: Sequence[Candidate]) -> list[Candidate]:
        """List what a search starts from.

        Those of `known` are left out that `lsd=` would not run either, for their cost
        (`morse.saved_plans.is_affordable`).
        """
        found = self.uniform()
        if self.with_dot:
            found += self.early()
        costs = {each: MorsePlan.from_string(each.plan).cost(self.speed_ratio) for each in known}
        found += [each for each, cost in costs.items() if is_affordable(cost, self.lsd)]
        if self.with_mixture:
            plans = dict.fromkeys(each.plan for each in found if each.plan[0] != "g")
            begun = (MIXTURE_START + plan for plan in plans)
            found += [Candidate(plan, grid) for plan in begun for grid in self.grids]
        return self.possible(found)

    def around(self, best: Candidate) -> list[Candidate]:
        """List what differs a little from a candidate: its plan's neighbours, and other grids."""
        plans = neighbours(best.plan, self.lsd, self.speed_ratio)
        found = [Candidate(plan, best.options) for plan in plans]
        return self.possible([*found, *(Candidate(best.plan, grid) for grid in self.grids)])


def neighbours(whole: str, lsd: float, speed_ratio: float) -> Iterator[str]:
    """Give plans that differ a little and cost at most `lsd`; the first network stays Dash.

    Two adjacent evaluations change places, a Dot evaluation goes or comes, or a Dash evaluation
    becomes one of Dot. Where the plan begins with a mixture's evaluations, one goes or comes.
    """
    plan = whole.lstrip("g")
    head = whole.removesuffix(plan)
    seen = {whole}

    def possible() -> Iterator[str]:
        if head:
            yield from (whole[1:], "g" + whole)
        yield from (head + body for body in bodies())

    def bodies() -> Iterator[str]:
        for i in range(1, len(plan)):
            if i + 1 < len(plan):
                yield plan[:i] + plan[i + 1] + plan[i] + plan[i + 2 :]
            if plan[i] == "o":
                yield plan[:i] + plan[i + 1 :]
            else:
                yield plan[:i] + "o" + plan[i + 1 :]
            yield plan[:i] + "o" + plan[i:]
        yield plan + "o"

    for each in possible():
        affordable = MorsePlan.from_string(each).cost(speed_ratio) <= lsd + 1e-9
        if each not in seen and affordable:
            seen.add(each)
            yield each


def search_plan(
    evaluate: Evaluate, space: Space, known: Sequence[Candidate] = (), max_rounds: int = 6
) -> Found:
    """Search the best plan for a budget.

    Args:
        evaluate: Judges a candidate.
        space: The budget, and what to choose from.
        known: To start from as well; see `Space.starts`.
        max_rounds: Steps to the best neighbour at most.
    """
    tried: dict[Candidate, float] = {}

    def judge(candidates: list[Candidate]) -> None:
        for candidate in candidates:
            if candidate not in tried:
                tried[candidate] = evaluate(candidate, True)

    def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
        return sorted(candidates, key=tried.__getitem__, reverse=True)

    starts = space.starts(known)
    judge(starts)
    best = ranked(starts)[0]
    for _ in range(max_rounds if space.with_dot else 0):
        around = space.around(best)
        judge(around)
        better = ranked([best, *around])[0]
        if better == best:
            break
        best = better
    uniform_plans = space.uniform()
    all_dash = [each for each in uniform_plans if "o" not in each.plan]
    uniform = ranked(uniform_plans)[:2] + ranked(all_dash)[:1]
    final = {
        each: evaluate(each, False)
        for each in dict.fromkeys([*ranked(list(tried))[:FINALISTS], *uniform])
    }
    winner = max(final, key=final.__getitem__)
    best_uniform = max(uniform, key=final.__getitem__)
    fitted = {each: value for each, value in final.items() if "fitted_steps" in dict(each.options)}
    return Found(winner, final[winner], best_uniform, final[best_uniform], tried, fitted)
