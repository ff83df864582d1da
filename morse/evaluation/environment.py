"""What a figure was measured with."""

import platform
import shlex
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path

import torch

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, mixed_precision: str) -> AbstractContextManager:
    """Run networks in "fp16" or "bf16" within; "no" changes nothing."""
    if mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, AUTOCAST[mixed_precision])


def wall_clock(device: torch.device) -> float:
    """Return the seconds of a clock that runs on, once `device` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def command_line() -> str:
    """Return the running command without its folder, such as "morse bench --num_images 64".

    A module that `python -m` runs is named so: "python -m eval.fid".
    """
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = [Path(sys.argv[0]).name]
    if module is not None:
        program = ["python", "-m", module.name.removesuffix(".__main__")]
    return shlex.join([*program, *sys.argv[1:]])


def resolve_device(device: str) -> torch.device:
    """Return the torch device; "auto" takes CUDA, else MPS, else the CPU.

    Raises:
        ValueError: If torch knows no such device, or has no CUDA where that is asked for.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; use auto, cpu, cuda or cuda:0") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no CUDA; use auto or cpu")
    return found


def device_name(device: torch.device) -> str:
    """Return the device in words: the GPU's name, or the CPU's and how many threads are in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.machine()} GPU (MPS)"
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"


def check_precision(dtype: str, mixed_precision: str) -> None:
    """Raise `ValueError` for autocast of networks that are not in float32."""
    if dtype != "float32" and mixed_precision != "no":
        raise ValueError(f"dtype is {dtype} and mixed_precision {mixed_precision}; leave one out")


def environment(
    device: torch.device, mixed_precision: str = "no", dtype: str = "float32"
) -> dict[str, object]:
    """Return the device, the precision and the versions, ready for JSON.

    Args:
        device: Where it ran.
        mixed_precision: The autocast of networks in float32, if any.
        dtype: The networks' own.
    """
    precisions = {"no": dtype, "fp16": "float16 autocast", "bf16": "bfloat16 autocast"}
    return {
        "device": device_name(device),
        "dtype": precisions[mixed_precision],
        "cudnn_allows_tf32": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
        "torch": torch.__version__,
        **{name: version(name) for name in ("diffusers", "morse-diffusion")},
        "python": platform.python_version(),
    }
