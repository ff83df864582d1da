"""What a training keeps of the Dot that it starts from (`init_from`)."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from morse.dot import MorseDot
from morse.dot.conv_settings import conv_settings
from morse.dot.loading import loading_from
from morse.training.config import TrainDotConfig

# Settings of a Dot that a training has under the same names.
DOT_OPTIONS = (
    "num_down_blocks",
    "layers_per_block",
    "lora_rank",
    "independent",
    "norm",
    "history",
    "extrapolation_cap",
    "resample",
    "base_space",
    "conv",
    "block_out_channels",
    "lora_alpha",
    "guidance",
)


def inherit(config: TrainDotConfig) -> TrainDotConfig:
    """Take settings that are not given from the Dot of `init_from`, if there is one."""
    if config.init_from is None:
        return config
    start = load_start(config.init_from).config
    own = {"base_space": start.base_space}
    if start.lora_rank and config.lora_rank:
        own["lora_alpha"] = start.lora_alpha
    if config.num_down_blocks == start.num_down_blocks:
        own["block_out_channels"] = tuple(start.block_out_channels)
    if config.conv == start.conv and start.conv_options is not None:
        own["conv_options"] = _words(start.conv_options)
    return replace(config, **{k: v for k, v in own.items() if getattr(config, k) is None})


def load_start(path: Path) -> MorseDot:
    """Load the Dot of `init_from`.

    Raises:
        OSError: If there is none.
    """
    with loading_from("init_from", path):
        return MorseDot.from_pretrained(path)


def check_start(dot: MorseDot, start: MorseDot, path: Path) -> None:
    """Check that what `start` learnt means the same in `dot`, beyond the shapes of its weights.

    Free are what `start_from` adds, and the base of a Dot that left it to the scheduler. Whether a
    Dot of guided estimates starts one of branches, `start_from` checks.

    Raises:
        ValueError: If a setting differs; the message names it.
    """
    given, own = _settings(start.config), _settings(dot.config)
    free: set[str] = set()
    if given["num_down_blocks"] == own["num_down_blocks"] - 1:
        free |= {"num_down_blocks", "block_out_channels"}  # `grow` compares the widths
    if not given["history"]:
        free |= {"history", "extrapolation_cap"}
    if given["resample"] == "nearest":
        free.add("resample")
    if given["base_space"] is None:
        free.add("base_space")
    for name, value in given.items():
        if name in free or own[name] == value:
            continue
        way_out = f"give {_option(name, value)}"
        if name == "num_down_blocks":
            way_out += ", or one more to grow it, without progressive_steps"
        raise ValueError(
            f"init_from is {path}, a Dot with {name}={value!r}, but {name} is {own[name]!r} here, "
            f"and what it learnt is of no use with another: {way_out}."
        )


def _settings(config: Mapping[str, object]) -> dict[str, object]:
    """Give what is compared, the same whether it was left out, given or read from a file."""
    rank, alpha = config["lora_rank"], config["lora_alpha"]
    options = conv_settings(config["conv"], config["conv_options"])
    return {name: config[name] for name in DOT_OPTIONS if name != "guidance"} | {
        "block_out_channels": tuple(config["block_out_channels"]),
        "lora_alpha": alpha if rank and alpha is not None else rank,
        "conv_options": None if options is None else _words(asdict(options)),
    }


def _words(options: Mapping[str, object]) -> tuple[str, ...]:
    """Write a Dot's `conv_options` as `parse_conv_options` reads them."""
    return tuple(
        f"{name}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        for name, value in options.items()
        if value is not None
    )


def _option(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return " ".join(map(str, (f"--{name}", *(value if isinstance(value, tuple) else (value,)))))
