"""What every training command shares: its settings, optimizer, randomness and checks."""

import hashlib
import importlib.util
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn

from morse.settings import (
    REQUIRED,
    MixedPrecision,
    option,
    require,
    require_least,
    require_places,
    require_positive,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of every training loop, named as in diffusers' training examples."""

    output_dir: Path = option(REQUIRED, "folder for the result, the checkpoints and the logs")
    train_batch_size: int = option(64, "images per process in one forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes summed into one update")
    max_train_steps: int = option(10_000, "optimizer updates in all, resumed ones included")
    max_train_seconds: float | None = option(
        None,
        "stop after so many seconds of training (caches are made before), but not before the "
        "first update, and save as at the end",
    )
    learning_rate: float = option(1e-4, "highest learning rate")
    lr_scheduler: Literal["cosine", "constant"] = option("cosine", "course after the warm-up")
    lr_warmup_steps: int = option(500, "updates over which the rate rises from zero")
    adam_beta1: float = option(0.9, "AdamW's beta1")
    adam_beta2: float = option(0.999, "AdamW's beta2")
    adam_weight_decay: float = option(1e-6, "AdamW's weight decay")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    mixed_precision: MixedPrecision | None = option(
        None,
        "autocast precision, most CPUs are far slower in half precision; that of `accelerate "
        "launch` if not given, else no",
    )
    compile: bool = option(False, "compile the trained network with torch.compile")
    use_ema: bool = option(True, "keep and save an exponential moving average of the weights")
    ema_max_decay: float = option(0.9999, "highest decay of that average")
    checkpointing_steps: int = option(1000, "updates between checkpoints")
    checkpoints_total_limit: int | None = option(2, "keep only so many newest checkpoints")
    resume_from_checkpoint: str | None = option(
        None,
        '"latest" or a checkpoint folder; those after an earlier one are removed when the next is '
        "saved",
    )
    report_to: Literal["none", "tensorboard"] = option("none", "tracker for losses")
    logging_steps: int = option(50, "updates between two logged losses")
    dataloader_num_workers: int = option(0, "extra processes that read images")
    seed: int = option(0, "seed of weights, order of images, and noise")

    @property
    def least_train_steps(self) -> int:
        """Least number of updates that makes sense."""
        return 1

    def __post_init__(self) -> None:
        """Check ranges and combinations, and settle the precision."""
        if self.mixed_precision is None:
            object.__setattr__(self, "mixed_precision", _launched_precision())
        positive = (
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "logging_steps",
            "learning_rate",
            "max_grad_norm",
            "adam_epsilon",
            "max_train_seconds",
            "checkpoints_total_limit",
        )
        require_positive(self, positive)
        least = ("lr_warmup_steps", "adam_weight_decay", "dataloader_num_workers", "seed")
        require_least(self, dict.fromkeys(least, 0) | {"max_train_steps": self.least_train_steps})
        for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "in [0, 1)")
        require_places(self, ["output_dir"])


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """Settings of the training commands that learn from images."""

    train_data_dir: Path | None = option(
        None,
        "folder of images, or IDX files such as /usr/share/datasets/fashion-mnist; without a test "
        "part every 20th image is held out",
    )
    dataset_name: str | None = option(None, "dataset on the Hugging Face hub, instead of a folder")
    dataset_config_name: str | None = option(
        None, "configuration of that dataset, where it has several"
    )
    image_column: str = option("image", "column of a hub dataset that holds the images")

    def __post_init__(self) -> None:
        """Check that there is one source of images, and what is checked of every run."""
        super().__post_init__()
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError(
                f"train_data_dir is {self.train_data_dir} and dataset_name is "
                f"{self.dataset_name}; give exactly one of the two"
            )
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError(
                f"dataset_config_name is {self.dataset_config_name!r}, but it is for datasets on "
                "the hub; give --dataset_name too, or leave --dataset_config_name out"
            )


def _launched_precision() -> str:
    """Give the precision that `accelerate launch` hands on, "no" without it.

    Raises:
        ValueError: If it is none that training knows.
    """
    found = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if found not in get_args(MixedPrecision):
        raise ValueError(
            f"mixed_precision is not given, and accelerate's, ACCELERATE_MIXED_PRECISION, is "
            f"{found!r}; give --mixed_precision no, fp16 or bf16"
        )
    return found


def check_frozen_dtype(dtype: str, mixed_precision: str) -> None:
    """Raise `ValueError` unless autocast is of the frozen networks' precision, if that is half."""
    wanted = {"float16": "fp16", "bfloat16": "bf16"}.get(dtype, mixed_precision)
    if mixed_precision != wanted:
        raise ValueError(
            f"dtype is {dtype} and mixed_precision {mixed_precision}, but Dot's own "
            f"float32 layers share Dash's weights; give --mixed_precision {wanted} too"
        )


def derive_seed(*parts: int) -> int:
    """Hash integers, such as (seed, step, rank), into one 63-bit seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def step_generator(
    seed: int, step: int, rank: int, device: torch.device | str, micro_step: int = 0
) -> torch.Generator:
    """Give the source of all random numbers of one forward pass.

    It depends on its arguments only, so that a resumed run draws what the uninterrupted one would
    have drawn, and no state of a random number generator is ever saved.
    """
    generator = torch.Generator(device)
    generator.manual_seed(derive_seed(seed, step, micro_step, rank))
    return generator


def learning_rate_at(config: RunConfig, step: int) -> float:
    """Give the rate of update `step` (from 0): linear warm-up, then constant or half a cosine.

    Equals diffusers' `get_scheduler("cosine")` and `("constant_with_warmup")` at that step.
    """
    warmup = config.lr_warmup_steps
    if step < warmup:
        return config.learning_rate * step / warmup
    if config.lr_scheduler == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, config.max_train_steps - warmup)
    return config.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def make_optimizer(parameters: Iterable[nn.Parameter], config: RunConfig) -> torch.optim.AdamW:
    """Build AdamW over `parameters`; on CUDA its fused form, which is one kernel an update."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True if parameters[0].is_cuda else None,
    )


def make_ema(parameters: Iterable[nn.Parameter], config: RunConfig) -> "EMAModel | None":
    """Build the moving average with the warm-up of diffusers' examples; None without `use_ema`."""
    if not config.use_ema:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(
        parameters, decay=config.ema_max_decay, use_ema_warmup=True, power=0.75, foreach=True
    )


def has_cpu_only() -> bool:
    """Tell whether accelerate finds no device but the CPU.

    It has to be told (`cpu=`), for launched processes form no group on CPUs otherwise.
    """
    from accelerate.utils import is_torch_xla_available

    return not (torch.accelerator.is_available() or is_torch_xla_available())


def make_accelerator(config: RunConfig) -> "Accelerator":
    """Build the accelerator, and on CUDA allow TF32 and the search for fast convolutions.

    Raises:
        ValueError: If the tracker is not installed, or the device does not train in the precision.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    if config.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "report_to is 'tensorboard', which is not installed; "
            "run `pip install tensorboard` or use --report_to none"
        )
    # Processes wait for the one that validates or makes a longer part of a cache.
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    # Buffers are alike in all; sent before each pass, one that is evaluated several times before
    # its gradients would find those that it kept changed.
    alike = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        cpu=has_cpu_only(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[waiting, alike],
    )
    # accelerate scales no gradients there, and the small ones of float16 vanish.
    if accelerator.device.type == "cpu" and config.mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision is fp16, in which a CPU does not train; give --mixed_precision bf16, "
            "with --dtype bfloat16 where that is float16, or --mixed_precision no"
        )
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return accelerator
