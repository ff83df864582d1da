"""The line through Dash's two latest estimates, which a Dot with history corrects and sees.

Along a trajectory a denoiser's output is smooth in half the log signal-to-noise ratio,
lambda = log(alpha / sigma), which multistep solvers rest on (Lu et al. 2022). So a line through the
latest estimate z_s and the one before it, z_p, says more than z_s alone:

    z_i = z_s + c * (z_s - z_p)   with   c = (lambda_i - lambda_s) / (lambda_s - lambda_p)

Both are carried to the sample at hand first (`morse.spaces.rebase`). The further from its two
points, the less a line is worth, so that c is capped. Without an earlier estimate, as at a run's
first Dash step, or where a scheduler's rates are not known, what is left is the paper's base, z_s.
"""

import torch
from torch import Tensor

from morse.spaces import BaseSpace, Rates, rebase

Evaluation = tuple[Tensor, Tensor, Rates]  # Dash's output, the sample it is of, the rates there
# What Dot sees of the line where less of it, or nothing, goes into the base.
_SEEN_CAP = 1.0


def check_history(history: int, extrapolation_cap: float, independent: bool) -> None:
    """Check a Dot's settings.

    Raises:
        ValueError: If one is out of range, or a Dot that estimates alone is to have history.
    """
    if history not in (0, 1):
        raise ValueError(f"history must be 0 or 1 earlier estimates of Dash, got {history!r}.")
    if not extrapolation_cap >= 0:
        raise ValueError(f"extrapolation_cap must be 0 or more, got {extrapolation_cap!r}.")
    if history and independent:
        raise ValueError(
            f"history is {history} and independent is True, but a Dot that estimates alone sees "
            "no estimate of Dash; choose one."
        )


def line_coefficient(earlier: Rates, latest: Rates, here: Rates) -> Tensor:
    """Give c above, 0 or more; 0 too where `earlier` is not noisier than `latest`.

    Args:
        earlier: alpha and sigma of the estimate before the latest.
        latest: Those of the latest, which broadcast to them.
        here: Those where an estimate is wanted.
    """
    before, then, now = ((alpha / sigma).log() for alpha, sigma in (earlier, latest, here))
    coefficient = (now - then) / (then - before)
    return torch.where(then > before, coefficient, 0).clamp(min=0)


def extrapolate(
    base_space: BaseSpace,
    latest: Evaluation,
    earlier: Evaluation | None,
    here: tuple[Tensor, Rates],
    prediction_type: str,
    cap: float,
) -> tuple[Tensor, Tensor | None]:
    """Give Dot's base, and the part of the line that Dot sees.

    Args:
        base_space: What of both estimates stays on the way to another sample.
        latest: Dash's latest evaluation, its output (B, C_out, ...).
        earlier: The one before; None where there is none.
        here: The sample where Dot is evaluated, and its rates.
        prediction_type: What Dash predicts.
        cap: Highest c for the base; 0 for the latest estimate as it is.

    Returns:
        The base, like the output, and c * (z_s - z_p) with c up to the larger of 1 and `cap`;
        None for it without an earlier evaluation.
    """
    reused = rebase(base_space, latest[0], latest[1:], here, prediction_type)
    if earlier is None:
        return reused, None
    before = rebase(base_space, earlier[0], earlier[1:], here, prediction_type)
    # Rates may be float64, which MPS does not have.
    coefficient = line_coefficient(earlier[2], latest[2], here[1]).float().to(reused.device)
    # At alpha = 0 an epsilon has no x_0: there c is 0, and `before` is not finite.
    change = torch.where(coefficient > 0, reused - before, 0)
    base, trend = (
        change * coefficient.clamp(max=highest).to(change.dtype)
        for highest in (cap, max(cap, _SEEN_CAP))
    )
    return reused + base, trend
