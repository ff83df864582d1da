"""How many times faster Dot is than Dash for published architectures, in FLOPs and in seconds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from statistics import median

import torch
from torch import nn

from morse.capture import CudaCapture
from morse.dot import MorseDot
from morse.evaluation.bench import architectures
from morse.evaluation.bench.architectures import build_architecture, make_inputs
from morse.evaluation.bench.speed import Mode
from morse.evaluation.environment import wall_clock
from morse.sampling import JumpPoint
from morse.summary import quartiles

DOT_CHANNELS = (96, 160)  # of the extra blocks, as the paper has them for SD 1.4
DOT_LAYERS, DOT_RANK = 2, 64
DOT_WORDS = f"extra blocks {DOT_CHANNELS}, {DOT_LAYERS} layers each, LoRA rank {DOT_RANK}"
Call = Callable[[], object]
Pair = dict[str, Call]  # "dash" and "dot": what evaluates each, for one m and batch


@dataclass(frozen=True)
class LatencySettings:
    """What to measure.

    Attributes:
        batch_sizes: Samples at a time.
        modes: What Dash and Dot are.
        repeats: Timed calls of each network, Dash and Dot in turn.
        reduced: Fewer layers of the same width.
        dtype: Of weights and inputs.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16)
    modes: tuple[Mode, ...] = ("eager",)
    repeats: int = 5
    reduced: bool = False
    dtype: torch.dtype = torch.float32


def make_pair(
    name: str, model: nn.Module, num_down_blocks: int, batch_size: int, merged: bool
) -> Pair:
    """Make the calls for one architecture; `model` may lie on "meta"."""
    architecture = architectures.ARCHITECTURES[name]
    like = next(model.parameters())
    sample, timestep, conditions = make_inputs(architecture, batch_size, like)
    dot = MorseDot.from_dash(
        model,
        num_down_blocks=num_down_blocks,
        block_out_channels=DOT_CHANNELS[:num_down_blocks],
        lora_rank=DOT_RANK,
        layers_per_block=DOT_LAYERS,
    ).eval()
    if merged:
        dot.merge_lora()
    shape = list(sample.shape)
    shape[2 if architecture.packed else 1] = dot.config.output_channels
    jump = JumpPoint(sample, timestep, sample.new_zeros(shape))
    first = "sample" if architecture.class_name.startswith("UNet") else "hidden_states"
    return {
        "dash": lambda: model(
            **{first: sample}, timestep=timestep, return_dict=False, **conditions
        ),
        "dot": lambda: dot(sample, timestep, jump, **conditions),
    }


class FlopCounts:
    """Counts the operations of an architecture and its Dots at batch 1, without running them."""

    def __init__(self, name: str):
        """Build Dash at full depth on torch's meta device."""
        full = architectures.ARCHITECTURES[name], torch.device("meta"), torch.float32, False
        self._name, self._dash = name, build_architecture(*full)
        self._dash_flops: int | None = None

    @torch.no_grad()
    def of(self, num_down_blocks: int, merged: bool) -> dict[str, float]:
        """Return dash_flops, dot_flops (a multiply-add counts 2) and flop_ratio with one Dot."""
        pair = make_pair(self._name, self._dash, num_down_blocks, 1, merged)
        pair["dot"]()  # the first call also merges the LoRA
        if self._dash_flops is None:
            self._dash_flops = _count(pair["dash"])
        dash_flops, dot_flops = self._dash_flops, _count(pair["dot"])
        return {
            "dash_flops": dash_flops,
            "dot_flops": dot_flops,
            "flop_ratio": dash_flops / dot_flops,
        }


def _count(call: Call) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count_architecture(name: str) -> Iterator[dict[str, object]]:
    """Count FLOPs for m = 1 and 2, LoRA merged and not.

    Yields:
        arch, num_down_blocks, merged, and what `FlopCounts.of` returns.
    """
    counts = FlopCounts(name)
    for num_down_blocks, merged in product((1, 2), (True, False)):
        dot = {"num_down_blocks": num_down_blocks, "merged": merged}
        yield {"arch": name, **dot, **counts.of(num_down_blocks, merged)}


def measure_architecture(
    name: str, device: torch.device, settings: LatencySettings
) -> Iterator[dict[str, object]]:
    """Measure N of what `count_architecture` counts, at each batch size and in each mode.

    Yields:
        One entry a combination: what was counted, mode, batch_size, speed_ratio (of medians) and
        the quartiles of seconds, dash_seconds and dot_seconds; or "error" in place of the last
        three where it can't be run so: out of memory, or without a compiler, say.
    """
    architecture = architectures.ARCHITECTURES[name]
    try:
        model = build_architecture(architecture, device, settings.dtype, settings.reduced)
    except RuntimeError as error:
        model = _error(error)
    for counted in count_architecture(name):
        for batch_size, mode in product(settings.batch_sizes, settings.modes):
            of_dot = (counted["num_down_blocks"], batch_size, counted["merged"])
            measured = _try_pair(name, model, of_dot, mode, device, settings.repeats)
            yield {**counted, "mode": mode, "batch_size": batch_size, **measured}


def _try_pair(
    name: str,
    model: nn.Module | dict[str, object],
    of_dot: tuple[int, int, bool],
    mode: str,
    device: torch.device,
    repeats: int,
) -> dict[str, object]:
    """Measure one pair, or say what kept it from being measured; `model` may be such an error.

    The pair is gone afterwards: two copies of merged weights are never in memory.
    """
    if isinstance(model, dict):
        return model
    try:
        return measure_pair(make_pair(name, model, *of_dot), mode, device, repeats)
    except (RuntimeError, ValueError) as error:
        return _error(error)


def _error(error: Exception) -> dict[str, object]:
    # What fails while a graph is captured shows as a failed capture, with its cause behind it.
    for cause in (error, error.__context__, error.__cause__):
        if isinstance(cause, torch.OutOfMemoryError):
            return {"error": "out of memory"}
    told = str(error).strip().partition("\n")[0]
    return {"error": f"{type(error).__name__}: {told}"}


@torch.no_grad()
def measure_pair(pair: Pair, mode: str, device: torch.device, repeats: int) -> dict[str, object]:
    """Time Dash and Dot in turn, after one round to warm up.

    Returns:
        speed_ratio (of medians), dash_seconds and dot_seconds (quartiles).
    """
    if mode == "compiled":
        torch._dynamo.reset()  # what was compiled for other pairs would count as this one's
    calls = {key: _in_mode(call, mode, device) for key, call in pair.items()}
    seconds: dict[str, list[float]] = {"dash": [], "dot": []}
    for index in range(repeats + 1):
        for key, call in calls.items():
            started = wall_clock(device)
            call()
            if index:  # the first round warms up
                seconds[key].append(wall_clock(device) - started)
    return {
        "speed_ratio": median(seconds["dash"]) / median(seconds["dot"]),
        "dash_seconds": quartiles(seconds["dash"]),
        "dot_seconds": quartiles(seconds["dot"]),
    }


def _in_mode(call: Call, mode: str, device: torch.device) -> Call:
    if mode == "eager":
        return call
    if mode == "compiled":
        compiled = torch.compile(call, dynamic=False)
        compiled()
        return compiled
    replay, _ = CudaCapture()(call, device)
    return replay
