"""What training a Dot with dynamic convolutions adds: options as words, and the temperature."""

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING

from morse.dot import MorseDot
from morse.dot.convolutions import anneal

if TYPE_CHECKING:
    from morse.training.config import TrainDotConfig


def parse_conv_options(words: tuple[str, ...] | None) -> dict[str, object] | None:
    """Read a Dot's `conv_options` from words such as "num_kernels=4", "budget=1/2", "paddings=a,b".

    Raises:
        ValueError: If a word is something else, or a name comes twice.
    """
    if words is None:
        return None
    options: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(
                f"conv_options has {word!r}; it must be words NAME=VALUE such as condition=time"
            )
        if name in options:
            raise ValueError(f"conv_options has {name!r} twice; give it once")
        parts = [_read(part) for part in value.split(",")]
        options[name] = parts if len(parts) > 1 else parts[0]
    return options


def _read(text: str) -> int | float | str:
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text
    if text.lstrip("+-").isdecimal():
        return int(number)
    try:
        return float(number)
    except OverflowError:  # as a word it would be told to be no number
        return math.inf if number > 0 else -math.inf


def make_annealer(dot: MorseDot, config: "TrainDotConfig") -> Callable[[int], None]:
    """Give what sets the convolutions' temperature before an update, by its number from 0.

    The temperature follows from the number alone, so that a resumed run has the same ones.
    """
    total = annealing_steps(config)

    def before_step(step: int) -> None:
        if dot.conv_settings is not None:
            anneal(dot, dot.conv_settings, step + 1, total)

    return before_step


def annealing_steps(config: "TrainDotConfig") -> int:
    """Updates until the final temperature: if not given, a tenth of all, as ODConv's authors.

    A Dot to start from, also one to grow, has come to it: at another its layers were not those that
    it learnt.
    """
    if config.conv_annealing_steps is not None:
        return config.conv_annealing_steps
    return max(1, config.max_train_steps // 10) if config.init_from is None else 0


def settle(dot: MorseDot) -> MorseDot:
    """Bring a Dot that is validated and saved to the final temperature."""
    if dot.conv_settings is not None:
        anneal(dot, dot.conv_settings, step=0, total=0)
    return dot


def warn_unless_annealed(dot: MorseDot, config: "TrainDotConfig", step: int) -> None:
    """Warn if training ended, after `step` updates, before the final temperature was reached."""
    total, most = annealing_steps(config), config.max_train_steps
    if dot.conv_settings is None or step >= total:
        return
    way_out = "resume the run"
    if step >= most:
        way_out += f" with a max_train_steps (of a first stage: progressive_steps) above {most}"
    warnings.warn(
        f"training ended at step {step}, but the convolutions' temperature is annealed over "
        f"{total} steps, and the saved Dot runs at its end: {way_out}, or set a lower "
        "conv_annealing_steps",
        stacklevel=2,
    )
