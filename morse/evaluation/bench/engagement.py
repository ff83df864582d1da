"""Whether a peer does anything at all: a patch that silently does nothing is no result."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from morse.evaluation.environment import wall_clock

LEAST_GAIN = 0.05  # share of time that a peer must save to count as engaged


def why_not_engaged(is_identical: bool, time_ratio: float) -> str:
    """Tell why a peer counts as not engaged; "" if it does engage.

    Args:
        is_identical: Whether its images are the bare pipeline's, bit for bit.
        time_ratio: Its time over the bare pipeline's for as many steps.
    """
    if is_identical:
        return "not engaged: its images are the bare pipeline's, bit for bit"
    if time_ratio > 1 - LEAST_GAIN:
        return (
            f"not engaged: it took {time_ratio:.0%} of the bare pipeline's time, and less than "
            f"{1 - LEAST_GAIN:.0%} was asked for"
        )
    return ""


@contextmanager
def timed(model: nn.Module) -> Iterator[list[float]]:
    """Collect the seconds that each call of `model` takes, on whatever device it is."""
    seconds: list[float] = []
    device = next(model.parameters()).device

    def start(*_: object) -> None:
        seconds.append(-wall_clock(device))

    def stop(*_: object) -> None:
        seconds[-1] += wall_clock(device)

    with model.register_forward_pre_hook(start), model.register_forward_hook(stop):
        yield seconds
