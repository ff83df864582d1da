"""Points of windows that teach a Dot with history: two Dash steps and the one where Dot is."""

import torch
from torch import Tensor

# Of a run's Dot steps, those after its first Dash step have no history: of a plan with five Dash
# steps a fifth.
_WITHOUT_HISTORY = 0.2
# In steps of the plan; few plans have more from one Dash step to the next.
_LONGEST_SEGMENT = 5


def draw_triples(
    shape: tuple[int, ...], num_points: int, widest: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw points of windows as plans have them.

    Between Dash steps a plan has about as many Dot steps each time. So the segment before the
    latest Dash step is as long as the gap from there to Dot, or longer, where a window has room for
    it; where not, it fills the window.

    Args:
        shape: Of each result.
        num_points: Points of a window, 3 or more.
        widest: Most steps from the latest Dash step to Dot.
        generator: On the device of the results.

    Returns:
        Indices of the earlier Dash step, the same as the latest's in pairs without history; of the
        latest one; and the steps from there to Dot.

    Raises:
        ValueError: If windows have too few points.
    """
    if num_points < 3:
        raise ValueError(
            f"windows have {num_points} points, but history takes an earlier Dash step, the latest "
            "and Dot's: give --window_steps 2 or more."
        )
    uniform = torch.rand(4, *shape, generator=generator, device=generator.device)
    alone, steps = uniform[0] < _WITHOUT_HISTORY, num_points - 1
    reach = torch.where(alone, min(steps, widest), min(steps - 1, widest))
    gap = (uniform[1] * reach).long() + 1
    longest = (steps - gap).clamp(max=_LONGEST_SEGMENT)
    shortest = torch.minimum(gap, longest)
    segment = shortest + (uniform[2] * (longest - shortest + 1)).long()
    segment = torch.where(alone, 0, segment)
    earlier = (uniform[3] * (steps - gap - segment + 1)).long()
    return earlier, earlier + segment, gap
