"""Windows kept on disk: Dash is evaluated once, and Dot trains on the result for many epochs."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.dot.view import fingerprint
from morse.training.batches import StepBatches
from morse.training.checkpoint import atomic_save_file, read_tensors, write_json
from morse.training.common import step_generator
from morse.training.config import TrainDotConfig
from morse.training.frozen import FrozenPipeline
from morse.training.guidance import Conditions
from morse.training.source import ConditionedImages, draw_windows
from morse.training.windows import Window

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD_WINDOWS = 4096
# On a CPU, features of more than a few images at a time fall out of its cache: twice as slow.
_BATCH_SIZES = {"cpu": 32}
_DEFAULT_BATCH_SIZE = 512
_LARGE_BATCH_SIZE = 16  # for denoisers such as Stable Diffusion's
_DESCRIPTION = "cache.json"
# A shard's tensors with a row for each window; those of the two groups have other numbers of rows.
_ROWS = ("timesteps", "samples", "outputs", "guidance_scale", "rows")
_TABLE, _NEGATIVE = "conditions/", "negative/"


class WindowCache:
    """All windows of a cache: memory-mapped, or on a CUDA device where half of it holds them.

    A shard keeps each of its different captions or classes once, as the denoiser takes it, and the
    windows' rows in that table.

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
            self.shards = [_join(self.shards, device)]
        self.ends = torch.tensor([len(shard["timesteps"]) for shard in self.shards]).cumsum(0)

    def __len__(self) -> int:
        """Give the number of windows."""
        return int(self.ends[-1])

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Give the indices themselves; the loop hands them to `gather`."""
        return torch.tensor(indices)

    def gather(self, indices: Tensor) -> Window:
        """Give the windows at `indices` (B,), in half precision, on the device."""
        if len(self.shards) == 1:
            shard = self.shards[0]
            return self._window(_rows_of(shard, indices.to(shard["timesteps"].device)))
        indices = indices.cpu()
        shard_of = torch.searchsorted(self.ends, indices, right=True)
        found: dict[str, Tensor] = {}
        for number in shard_of.unique().tolist():
            chosen = shard_of == number
            shard = self.shards[number]
            rows = indices[chosen] - (int(self.ends[number]) - len(shard["timesteps"]))
            for name, value in _rows_of(shard, rows).items():
                if name not in found:
                    found[name] = value.new_empty(len(indices), *value.shape[1:])
                found[name][chosen] = value
        return self._window(found)

    def _window(self, rows: dict[str, Tensor]) -> Window:
        rows = {name: value.to(self.device) for name, value in rows.items()}
        conditions = Conditions(
            _group(rows, _TABLE),
            {name: v.to(self.device) for name, v in _group(self.shards[0], _NEGATIVE).items()},
            rows.get("guidance_scale"),
        )
        return Window(rows["timesteps"], rows["samples"], rows["outputs"], conditions)


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _rows_of(shard: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Give a shard's tensors at `rows`, with the conditions of each window."""
    found = {name: shard[name][rows] for name in _ROWS if name in shard}
    own = found.pop("rows", None)
    for name, value in shard.items():
        if name.startswith(_TABLE):
            found[name] = value[own]
    return found


def _join(shards: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Make one shard of all, on a device."""
    joined = {
        name: torch.cat([shard[name].to(device) for shard in shards])
        for name in shards[0]
        if not name.startswith(_NEGATIVE)
    }
    if "rows" in joined:
        table = next(name for name in shards[0] if name.startswith(_TABLE))
        sizes = torch.tensor([0, *(len(shard[table]) for shard in shards[:-1])]).cumsum(0)
        joined["rows"] += torch.cat(
            [size.expand(len(s["rows"])) for size, s in zip(sizes, shards, strict=True)]
        ).to(device)
    negative = {k: v.to(device) for k, v in shards[0].items() if k.startswith(_NEGATIVE)}
    return joined | negative


def _describe(source: ConditionedImages, config: TrainDotConfig) -> dict[str, object]:
    """What the windows of a cache depend on."""
    pipeline, kind = source.pipeline, source.pipeline.encoder.kind
    return {
        "dash": fingerprint(pipeline.dash.model),
        "vae": None if pipeline.codec is None else fingerprint(pipeline.codec.vae),
        "schedule": _digest(repr(pipeline.dash.schedule.sigmas.tolist())),
        "prediction_type": pipeline.dash.prediction_type,
        "resolution": pipeline.resolution,
        "windows": config.cache_pairs,
        "window_steps": config.window_steps,
        "timestep_sampling": config.timestep_sampling,
        "guidance_scale": list(pipeline.guidance_scale),
        "seed": config.seed,
        "data": str(config.train_data_dir or config.dataset_name),
        "captions": _digest(repr(source.table.values)) if kind == "text" else None,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def claim_folder(folder: Path, description: dict[str, object]) -> None:
    """Note what a cache's folder holds, or check that it holds just this.

    Raises:
        FileExistsError: If it holds other safetensors files.
        ValueError: If it holds a cache made with other settings.
    """
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
            f"cache_dir is {folder}, whose contents were made with other {differing}; give another "
            "--cache_dir or the settings it was made with."
        )


def prepare_cache(
    source: ConditionedImages, config: TrainDotConfig, accelerator: "Accelerator"
) -> WindowCache:
    """Make the missing shards of a cache, shared out among the processes, and open all of them.

    A shard depends on the settings and its number alone, and appears whole or not at all, so a
    killed run goes on at the shard where it was.

    Raises:
        ValueError: If the folder holds a cache made with other settings.
    """
    folder = config.cache_dir or config.output_dir / "pairs"
    if accelerator.is_main_process:
        claim_folder(folder, _describe(source, config))
    accelerator.wait_for_everyone()
    count = -(-config.cache_pairs // SHARD_WINDOWS)
    paths = [folder / f"windows-{number:05d}.safetensors" for number in range(count)]
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    missing = [number for number in mine if not paths[number].exists()]
    label = f"evaluating Dash, {SHARD_WINDOWS} windows a shard"
    for number in with_progress(missing, label, accelerator):
        size = min(SHARD_WINDOWS, config.cache_pairs - number * SHARD_WINDOWS)
        # In full precision, whatever the training's: residuals are small differences.
        atomic_save_file(_make_shard(source, config, number, size), paths[number])
    accelerator.wait_for_everyone()
    return WindowCache(paths, accelerator.device)


def with_progress(numbers: list[int], label: str, accelerator: "Accelerator") -> Iterator[int]:
    """Go through shards with a bar on the terminal of the main process."""
    from rich.progress import track

    quiet = not (numbers and accelerator.is_main_process)
    return iter(track(numbers, description=label, disable=quiet))


def _batch_size(pipeline: FrozenPipeline) -> int:
    if pipeline.is_large:
        return _LARGE_BATCH_SIZE
    return _BATCH_SIZES.get(pipeline.device.type, _DEFAULT_BATCH_SIZE)


def _make_shard(
    source: ConditionedImages, config: TrainDotConfig, number: int, size: int
) -> dict[str, Tensor]:
    batch_size = _batch_size(source.pipeline)
    first, count = number * SHARD_WINDOWS // batch_size, -(-size // batch_size)
    batches = StepBatches(len(source), batch_size, config.seed, first, count)
    windows: list[Window] = []
    for step, indices in enumerate(batches):
        generator = step_generator(config.seed, number, step, source.pipeline.device)
        windows.append(draw_windows(source, config, source.__getitems__(indices), generator))
    found = {
        "timesteps": torch.cat([w.timesteps for w in windows])[:size].to(torch.int16).cpu(),
        "samples": torch.cat([w.samples for w in windows])[:size].half().cpu(),
        "outputs": torch.cat([w.outputs for w in windows])[:size].half().cpu(),
    }
    if windows[0].conditions.guidance_scale is not None:
        scales = torch.cat([w.conditions.guidance_scale for w in windows])
        found["guidance_scale"] = scales[:size].cpu()
    if source.numbers is not None:
        indices = torch.tensor([index for batch in batches for index in batch])[:size]
        different, found["rows"] = source.numbers[indices].unique(return_inverse=True)
        conditions = source.table.look_up(different)
        found |= {f"{_TABLE}{name}": v.cpu() for name, v in conditions.positive.items()}
        found |= {f"{_NEGATIVE}{name}": v.cpu() for name, v in conditions.negative.items()}
    return found
