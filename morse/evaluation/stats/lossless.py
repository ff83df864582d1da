"""The lossless test: is a method surely no worse than the baseline with more budget?"""

from collections.abc import Collection, Iterable

import numpy as np

from morse.evaluation.scoring import AXES
from morse.evaluation.stats.curves import Curve

FACTORS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
CONFIDENCE = 0.95


def read_deltas(texts: Iterable[str]) -> dict[str, float]:
    """Read margins such as "psnr=0.3", an axis' name in the JSON (of any case) and its delta.

    Raises:
        ValueError: If one has another form, an axis is unknown or named twice, or a delta is not
            more than 0.
    """
    deltas: dict[str, float] = {}
    for text in texts:
        name, _, number = text.lower().partition("=")
        try:
            delta = float(number)
        except ValueError:
            delta = float("nan")
        if name not in AXES or name in deltas or not 0 < delta < float("inf"):
            raise ValueError(
                f"lossless_delta has {text!r}; it must be an axis, each once, and a number above "
                f"0, such as psnr=0.3; the axes are {list(AXES)}"
            )
        deltas[name] = delta
    return deltas


def margins_left_over(texts: Iterable[str], measured: Collection[str]) -> str:
    """Say which of the margins that were given are of axes that are not `measured`; "" for none."""
    lacking = [name for name in read_deltas(texts) if name not in measured]
    if not lacking:
        return ""
    return (
        f"Of no use is the margin given for {', '.join(lacking)}, which is not measured here; the "
        f"axes are {', '.join(measured)}."
    )


def lossless_test(
    curve: Curve,
    by_seed: Curve | None,
    cost: float,
    errors: np.ndarray,
    factor: float,
    given: float | None = None,
    is_mean: bool = True,
) -> dict[str, object]:
    """Test for non-inferiority at `factor` times a method's cost.

    The loss is the method's error at `cost` less the baseline's at `factor * cost`. The method is
    lossless at this factor if the one-sided 95 % upper bound of the loss, from the bootstrap, is
    under delta. Where that was not given, it is what the baseline's own figure at that cost varies
    by from seed to seed, and so not known before the images are. With one seed that is the
    bootstrap's standard error, on axes that are means: a distance's is up to twice what it varies
    by, and would let methods pass that are worse.

    Args:
        curve: The baseline's, R rows: all images, then bootstrap replicates.
        by_seed: The baseline's, a row a repetition; None for fewer than two repetitions.
        cost: What the method pays, in LSD.
        errors: The method's error, (R,), lower is better.
        factor: How much more the baseline may pay.
        given: Delta, in the axis' unit, where it was chosen before anything was measured.
        is_mean: Whether the figure is a mean over images, not a distance between sets of them.

    Returns:
        "factor", "difference", "upper_bound", "delta", "delta_from" ("given", "seeds" or
        "bootstrap") and "lossless"; the last four are None where what they need is lacking.

    Raises:
        ValueError: If the baseline was not measured at `factor * cost`.
    """
    baseline = curve.error_at(factor * cost)
    losses = errors - baseline
    delta, source = None, None
    if given is not None:
        delta, source = given, "given"
    elif by_seed is not None:
        delta, source = float(by_seed.error_at(factor * cost).std(ddof=1)), "seeds"
    elif is_mean and len(baseline) > 2:
        delta, source = float(baseline[1:].std(ddof=1)), "bootstrap"
    bound = float(np.quantile(losses[1:], CONFIDENCE)) if len(losses) > 2 else None
    return {
        "factor": factor,
        "difference": float(losses[0]),
        "upper_bound": bound,
        "delta": delta,
        "delta_from": source,
        "lossless": None if bound is None or delta is None else bound < delta,
    }
