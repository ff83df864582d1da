"""Windows kept on disk: Dash is evaluated once, and Dot trains on the result for many epochs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.dot.view import fingerprint
from morse.training.checkpoint import atomic_save_file, read_tensors, write_json
from morse.training.common import step_generator
from morse.training.config import TrainDotConfig
from morse.training.data import ImageDataset, StepBatches, to_model_range
from morse.training.frozen import FrozenDash
from morse.training.windows import Window, fresh_window

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD_WINDOWS = 4096
# On a CPU, features of more than a few images at a time fall out of its cache: twice as slow.
_BATCH_SIZES = {"cpu": 32}
_DEFAULT_BATCH_SIZE = 512
_DESCRIPTION = "cache.json"


class WindowCache:
    """All windows of a cache: memory-mapped, or on a CUDA device where half of it holds them.

    Args:
        paths: The shards, in order.
        device: Where `gather` puts windows.
    """

    def __init__(self, paths: list[Path], device: torch.device) -> None:
        """Open the shards."""
        self.device = device
        self.shards = [read_tensors(path) for path in paths]
        size = sum(value.nbytes for shard in self.shards for value in shard.values())
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] // 2:
            self.shards = [
                {
                    name: torch.cat([shard[name].to(device) for shard in self.shards])
                    for name in self.shards[0]
                }
            ]
        self.ends = torch.tensor([len(shard["timesteps"]) for shard in self.shards]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Give the indices themselves; the loop hands them to `gather`."""
        return torch.tensor(indices)

    def gather(self, indices: Tensor) -> Window:
        """Give the windows at `indices` (B,), in half precision, on the device."""
        if len(self.shards) == 1:
            shard = self.shards[0]
            rows = indices.to(shard["timesteps"].device)
            return Window(**{name: value[rows].to(self.device) for name, value in shard.items()})
        indices, first = indices.cpu(), self.shards[0]
        shard_of = torch.searchsorted(self.ends, indices, right=True)
        found = {
            name: value.new_empty(len(indices), *value.shape[1:]) for name, value in first.items()
        }
        for number in shard_of.unique().tolist():
            chosen = shard_of == number
            shard = self.shards[number]
            rows = indices[chosen] - (int(self.ends[number]) - len(shard["timesteps"]))
            for name, value in shard.items():
                found[name][chosen] = value[rows]
        return Window(**{name: value.to(self.device) for name, value in found.items()})


def _describe(dash: FrozenDash, config: TrainDotConfig) -> dict[str, object]:
    """What the windows of a cache depend on."""
    return {
        "dash": fingerprint(dash.model),
        "windows": config.cache_pairs,
        "window_steps": config.window_steps,
        "timestep_sampling": config.timestep_sampling,
        "seed": config.seed,
        "data": str(config.train_data_dir or config.dataset_name),
    }


def _claim(folder: Path, description: dict[str, object]) -> None:
    path = folder / _DESCRIPTION
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(folder.glob("*.safetensors")):
            raise FileExistsError(f"cache_dir is {folder}, which holds other safetensors files.")
        write_json(path, description)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != description:
        differing = sorted(key for key in description if found.get(key) != description[key])
        raise ValueError(
            f"cache_dir is {folder}, whose windows were made with other {differing}; give another "
            "--cache_dir or the settings it was made with."
        )


def prepare_cache(
    dash: FrozenDash, dataset: ImageDataset, config: TrainDotConfig, accelerator: "Accelerator"
) -> WindowCache:
    """Make the missing shards of a cache, shared out among the processes, and open all of them.

    A shard depends on the settings and its number alone, and appears whole or not at all, so a
    killed run goes on at the shard where it was.

    Raises:
        ValueError: If the folder holds a cache made with other settings.
    """
    folder = config.cache_dir or config.output_dir / "pairs"
    if accelerator.is_main_process:
        _claim(folder, _describe(dash, config))
    accelerator.wait_for_everyone()
    count = -(-config.cache_pairs // SHARD_WINDOWS)
    paths = [folder / f"windows-{number:05d}.safetensors" for number in range(count)]
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    missing = [number for number in mine if not paths[number].exists()]
    for number in _with_progress(missing, accelerator):
        size = min(SHARD_WINDOWS, config.cache_pairs - number * SHARD_WINDOWS)
        # In full precision, whatever the training's: residuals are small differences.
        atomic_save_file(_make_shard(dash, dataset, config, number, size), paths[number])
    accelerator.wait_for_everyone()
    return WindowCache(paths, accelerator.device)


def _with_progress(numbers: list[int], accelerator: "Accelerator") -> Iterator[int]:
    from rich.progress import track

    label = f"evaluating Dash, {SHARD_WINDOWS} windows a shard"
    quiet = not (numbers and accelerator.is_main_process)
    return iter(track(numbers, description=label, disable=quiet))


def _make_shard(
    dash: FrozenDash, dataset: ImageDataset, config: TrainDotConfig, number: int, size: int
) -> dict[str, Tensor]:
    device = dash.alphas_cumprod.device
    batch_size = _BATCH_SIZES.get(device.type, _DEFAULT_BATCH_SIZE)
    first, count = number * SHARD_WINDOWS // batch_size, -(-size // batch_size)
    batches = StepBatches(len(dataset), batch_size, config.seed, first, count)
    windows = []
    for step, indices in enumerate(batches):
        clean = to_model_range(dataset.__getitems__(indices)).to(device)
        generator = step_generator(config.seed, number, step, device)
        windows.append(
            fresh_window(
                dash,
                clean,
                generator,
                config.window_steps + 1,
                config.timestep_sampling,
                dash.alphas_cumprod,
                dash.prediction_type,
            )
        )
    return {
        "timesteps": torch.cat([w.timesteps for w in windows])[:size].to(torch.int16).cpu(),
        "samples": torch.cat([w.samples for w in windows])[:size].half().cpu(),
        "outputs": torch.cat([w.outputs for w in windows])[:size].half().cpu(),
    }
