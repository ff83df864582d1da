"""Windows kept on disk: Dash is evaluated once, and Dot trains on the result for many epochs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.dot.fingerprint import fingerprint, identify
from morse.training.batches import StepBatches
from morse.training.cache_sizes import choose_rows, size_on_disk, window_shards
from morse.training.common import step_generator
from morse.training.conditions import ConditionTable
from morse.training.config import TrainDotConfig
from morse.training.frozen import FrozenPipeline
from morse.training.guidance import Conditions
from morse.training.shards import digest, gather_rows, make_shards, read_shard
from morse.training.source import ConditionedImages, describe_data, draw_windows
from morse.training.windows import Window

if TYPE_CHECKING:
    from accelerate import Accelerator

# On a CPU, features of more than a few images at a time fall out of its cache: twice as slow.
_BATCH_SIZES = {"cpu": 32}
_DEFAULT_BATCH_SIZE = 512
_LARGE_BATCH_SIZE = 16  # for denoisers such as Stable Diffusion's
_ENCODED_AT_ONCE = 32  # captions
# Of the GPU's memory that is free when a cache is opened: the optimizer, the averaged weights and
# all activations are yet to come.
_SHARE_FOR_WINDOWS = 1 / 8
# A shard's tensors with a row for each window; those of the two groups have other numbers of rows.
_ROWS = ("timesteps", "samples", "outputs", "guidance_scale", "rows")
_TABLE, _NEGATIVE = "conditions/", "negative/"


class WindowCache:
    """All windows of a cache: memory-mapped, or on a CUDA device that has room for them.

    A shard keeps each of its different captions or classes once, as the denoiser takes it, and the
    windows' rows in that table.

    Args:
        paths: The shards, in order.
        device: Where `gather` puts windows.
    """

    def __init__(self, paths: list[Path], device: torch.device) -> None:
        """Open the shards."""
        self.device = device
        self.shards = [read_shard(path) for path in paths]
        size = sum(value.nbytes for shard in self.shards for value in shard.values())
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        if size < free * _SHARE_FOR_WINDOWS:
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
    pipeline, numbers = source.pipeline, source.numbers
    # Which caption or class each image has: shards keep it, so that the set of them won't do.
    conditions = None if numbers is None else (source.table.values, numbers.tolist())
    return {
        "dash": fingerprint(pipeline.dash.model),
        "vae": None if pipeline.codec is None else fingerprint(pipeline.codec.vae),
        "scaling": None if pipeline.codec is None else pipeline.codec.constants,
        "text_encoders": [identify(model) for model in pipeline.encoder.models],
        "schedule": digest(repr(pipeline.dash.schedule.sigmas.tolist())),
        "prediction_type": pipeline.dash.prediction_type,
        "dtype": config.dtype,
        "resolution": pipeline.resolution,
        "windows": config.cache_pairs,
        "window_steps": config.window_steps,
        "timestep_sampling": config.timestep_sampling,
        "guidance_scale": list(pipeline.guidance_scale),
        "seed": config.seed,
        "conditions": digest(repr(conditions)),
    } | describe_data(source, config)


def prepare_cache(
    source: ConditionedImages, config: TrainDotConfig, accelerator: "Accelerator"
) -> WindowCache:
    """Make the missing shards of a cache, as `make_shards` does, and open all of them.

    A shard depends on the settings and its number alone.

    Raises:
        ValueError: If the folder holds a cache made with other settings.
    """
    folder = config.cache_dir or config.output_dir / "pairs"
    total, shard_bytes = config.cache_pairs, window_shards(source, config)
    size = choose_rows(shard_bytes)
    on_disk = size_on_disk(total, size, shard_bytes)
    accelerator.print(f"cache: {total} windows, {on_disk} in {folder}")
    # Shards hold whole batches: both are powers of two.
    batch_size = min(_batch_size(source.pipeline), size)

    def make(rows: range) -> dict[str, Tensor]:
        # In Dash's precision, without the training's autocast: residuals are small differences.
        return _make_shard(source, config, rows.start // size, rows, batch_size)

    paths = make_shards(
        folder=folder,
        name="windows",
        total=total,
        shard_size=size,
        label=f"evaluating Dash, {size} windows a shard",
        describe=lambda: _describe(source, config),
        make=make,
        accelerator=accelerator,
    )
    return WindowCache(paths, accelerator.device)


def _batch_size(pipeline: FrozenPipeline) -> int:
    usual = _BATCH_SIZES.get(pipeline.device.type, _DEFAULT_BATCH_SIZE)
    return pipeline.batch_size(usual, _LARGE_BATCH_SIZE)


def _stored(window: Window) -> dict[str, Tensor]:
    """Give what is kept of windows, but for what images they are of."""
    found = {
        "timesteps": window.timesteps.to(torch.int16),
        "samples": window.samples.half(),
        "outputs": window.outputs.half(),
    }
    scale = window.conditions.guidance_scale
    return found if scale is None else found | {"guidance_scale": scale}


def _make_shard(
    source: ConditionedImages, config: TrainDotConfig, number: int, rows: range, batch_size: int
) -> dict[str, Tensor]:
    first, count = rows.start // batch_size, -(-len(rows) // batch_size)
    batches = StepBatches(len(source), batch_size, config.seed, first, count)

    def stored() -> Iterator[dict[str, Tensor]]:
        for step, indices in enumerate(batches):
            generator = step_generator(config.seed, number, step, source.pipeline.device)
            yield _stored(draw_windows(source, config, source.__getitems__(indices), generator))

    found = gather_rows(stored(), len(rows))
    if source.numbers is not None:
        indices = torch.tensor([index for batch in batches for index in batch])[: len(rows)]
        different, found["rows"] = source.numbers[indices].unique(return_inverse=True)
        found |= _conditions(source.table, different)
    return found


def _conditions(table: ConditionTable, numbers: Tensor) -> dict[str, Tensor]:
    """Give what a shard keeps of the captions or classes of these numbers, on the CPU."""
    chunks = (table.look_up(chunk).positive for chunk in numbers.split(_ENCODED_AT_ONCE))
    found = gather_rows(chunks, len(numbers))
    found = {f"{_TABLE}{name}": value for name, value in found.items()}
    negative = table.encoder.negative or {}
    return found | {f"{_NEGATIVE}{name}": value.cpu() for name, value in negative.items()}
