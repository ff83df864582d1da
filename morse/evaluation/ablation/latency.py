"""How long a trained Dot takes, beside a plain one and Dash, in turn and in one process."""

from collections.abc import Callable
from statistics import median

import torch

from morse.dot import MorseDot
from morse.evaluation.ablation.config import AblationConfig
from morse.evaluation.ablation.rows import PLAIN
from morse.evaluation.ablation.runs import dot_folder, load_dot, open_pipeline
from morse.evaluation.environment import wall_clock
from morse.sampling import JumpPoint
from morse.summary import quartiles
from morse.training.frozen import FrozenPipeline

_WARM_UP = 3
Call = Callable[[int], object]


@torch.no_grad()
def measure_row(config: AblationConfig, name: str) -> dict[str, object]:
    """Time the first seed's Dot of one row, with merged LoRA; see `compare`."""
    pipeline = open_pipeline(config)
    dash = pipeline.dash.model
    dots = {
        key: load_dot(dot_folder(config, row, 0), dash).merge_lora()
        for key, row in ((PLAIN, PLAIN), ("dot", name))
    }
    calls = make_calls(pipeline, dots, config.latency_batch_size)
    seconds = time_in_turn(calls, config.latency_rounds, pipeline.device)
    return {"batch_size": config.latency_batch_size, **compare(seconds)}


def make_calls(
    pipeline: FrozenPipeline, dots: dict[str, MorseDot], batch_size: int
) -> dict[str, Call]:
    """Make the calls to time: Dash, and Dots from a jump point one tenth of the schedule earlier.

    Every round is at other timesteps, as every step of a run is.
    """
    dash, schedule = pipeline.dash.model, pipeline.dash.schedule
    shape = (batch_size, dash.config.in_channels, *pipeline.sample_size)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipeline.device)

    def timestep(round_: int, share: float) -> torch.Tensor:
        return schedule.timesteps[int(share * len(schedule)) - 1 - round_ % (len(schedule) // 4)]

    def run_dash(round_: int) -> object:
        return dash(sample, timestep(round_, 0.9), return_dict=False)

    def run_dot(dot: MorseDot) -> Call:
        return lambda round_: dot(
            sample, timestep(round_, 0.8), JumpPoint(sample, timestep(round_, 0.9), sample)
        )

    return {"dash": run_dash} | {name: run_dot(dot) for name, dot in dots.items()}


def time_in_turn(
    calls: dict[str, Call], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Time each call once a round, after rounds to warm up; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for index in range(_WARM_UP + rounds):
        for name in order:
            started = wall_clock(device)
            calls[name](index)
            if index >= _WARM_UP:
                seconds[name].append(wall_clock(device) - started)
        order = order[1:] + order[:1]
    return seconds


def compare(seconds: dict[str, list[float]]) -> dict[str, object]:
    """Summarise the rounds of "dash", "plain" and "dot".

    Returns:
        Quartiles of dash_seconds, plain_seconds and dot_seconds, and of to_plain, each round's
        ratio of Dot to plain Dot; and speed_ratio, N, of Dash's median to Dot's.
    """
    dot, plain = seconds["dot"], seconds[PLAIN]
    ratios = [a / b for a, b in zip(dot, plain, strict=True)]
    return {
        **{f"{name}_seconds": quartiles(found) for name, found in seconds.items()},
        "to_plain": quartiles(ratios),
        "speed_ratio": median(seconds["dash"]) / median(dot),
    }
