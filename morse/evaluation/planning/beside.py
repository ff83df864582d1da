"""Plans saved beside the best of a budget: for slower Dots, and for budgets that have none.

`morse.saved_plans.find_saved_plan` runs a plan for budgets of up to twice its own, fitted ones as
they are. By then the bare solver, which spends all of the budget, may have become better.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from morse.evaluation.planning.search import Candidate, Evaluate, Found
from morse.plan import MorsePlan
from morse.saved_plans import is_affordable


def without_dot(found: Found) -> Candidate | None:
    """Give the best of the fitted plans without Dot, where the best of all has it.

    `lsd=` runs it where Dot is too slow for the other.
    """
    if "o" not in found.best.plan:
        return None
    others = [each for each in found.fitted if "o" not in each.plan]
    return max(others, key=found.fitted.__getitem__, default=None)


def bare_from(
    found: Found, evaluate: Evaluate, lsd: int, stop: int, spend: Callable[[str, int], str]
) -> tuple[int, Candidate] | None:
    """Find the least budget at which the bare solver is better than what would be run there.

    Between a budget where it is not and one where it is the budgets are halved, on few images.

    Args:
        found: What the search for `lsd` ended with.
        evaluate: Judges a candidate.
        lsd: The budget.
        stop: The least budget above it that has a plan or will be searched, or 2 * lsd + 1.
        spend: (plan, budget) -> the plan with what is left of the budget spent on Dash, of a length
            that the solver can make.

    Returns:
        That budget, with all of it spent on Dash, on the plain grid that was best for `lsd`; None
        if there is none below `stop`.
    """
    best, is_fitted = found.best, _is_fitted(found.best.options)
    bare = [each for each in found.tried if _is_plain(each.plan, each.options)]
    if stop <= lsd + 1 or not bare or _is_plain(best.plan, best.options):
        return None
    grid = max(bare, key=found.tried.__getitem__).options
    as_it_is = evaluate(best, True) if is_fitted else None

    def all_dash(budget: int) -> Candidate:
        return Candidate(spend("D", budget), grid)

    def is_better(budget: int) -> bool:
        run = as_it_is
        if run is None:
            run = evaluate(Candidate(spend(best.plan, budget), best.options), True)
        return evaluate(all_dash(budget), True) > run

    low, high = lsd, stop - 1
    if not is_better(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_better(middle) else (middle, high)
    return high, all_dash(high)


def next_budget(lsd: int, known: Sequence[Mapping[str, object]], budgets: Sequence[int]) -> int:
    """Give the least budget above `lsd` with a plan or to be searched; 2 * lsd + 1 at most."""
    others = [entry["lsd"] for entry in known if not is_bare(entry)]
    return min(each for each in (*others, *budgets, 2 * lsd + 1) if each > lsd)


def is_bare(entry: Mapping[str, object]) -> bool:
    """Tell whether a saved plan is one of `bare_from`; plans that were searched have a PSNR."""
    return entry.get("psnr") is None and _is_plain(entry["plan"], entry["scheduler"].items())


def too_dear(
    known: Sequence[Mapping[str, object]], lsd: int, speed_ratio: float
) -> list[Mapping[str, object]]:
    """List the plans saved for a budget that cost more than it where Dot is only so much faster."""
    costs = [(each, MorsePlan.from_string(each["plan"]).cost(speed_ratio)) for each in known]
    return [each for each, cost in costs if each["lsd"] == lsd and not is_affordable(cost, lsd)]


def replaced_entries(
    known: Sequence[Mapping[str, object]],
    lsd: int,
    stop: int,
    dear: Sequence[Mapping[str, object]],
) -> list[Mapping[str, object]]:
    """List the saved plans in whose place come those that are found for a budget.

    A faster Dot still runs those that are too `dear` (from `too_dear`), ahead of what is found, and
    the bare solver, up to `stop` (from `next_budget`), from where it was better than they are.
    """
    replaced = [entry for entry in known if entry["lsd"] == lsd and entry not in dear]
    if not dear:
        replaced += [entry for entry in known if is_bare(entry) and lsd < entry["lsd"] < stop]
    return replaced


def _is_plain(plan: str, options: Iterable[tuple[str, object]]) -> bool:
    return set(plan) == {"D"} and not _is_fitted(options)


def _is_fitted(options: Iterable[tuple[str, object]]) -> bool:
    return any(name == "fitted_steps" for name, _ in options)
