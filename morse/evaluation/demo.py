"""The demo: the same noise sampled by the bare pipeline and by Morse, measured and shown."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from morse.evaluation.bench.loading import load_pipelines
from morse.evaluation.bench.methods import REFERENCE_SOLVER
from morse.evaluation.bench.runs import Samples
from morse.evaluation.demo_report import Row, has_distances, plot_quality, results_table, save_grid
from morse.evaluation.demo_sampling import (
    DEMO_SOLVERS,
    REFERENCE_NAME,
    Run,
    check_demo,
    measure_rows,
    measure_warm,
    sample_all,
)
from morse.evaluation.environment import command_line, device_name, environment
from morse.files import write_json
from morse.settings import option, require, require_least, require_places, require_positive

if TYPE_CHECKING:
    from rich.console import Console

    from morse.calls import SpeedRatio

BUSY = 1.5  # third over first quartile of equal evaluations
NOTE = (
    "A Fréchet distance of so few images is biased upwards: compare it within this table only. "
    "`morse bench --num_images 5000` measures it with more."
)


@dataclass(frozen=True)
class DemoConfig:
    """Sample the same noise with and without Morse; show a table, pictures and a plot."""

    quick: bool = option(False, "fewer images and budgets: under half a minute on a CPU")
    json: Path | None = option(None, "also write the figures to this file")
    output_dir: Path = option(Path("demo_output"), "folder for grid.png and quality.png")
    pipeline: str = option(
        "fashion-mnist", "fashion-mnist, or a folder or hub id of an unconditional one"
    )
    dot: str | None = option(None, "another Dot's folder or hub id; the pipeline's own if left out")
    lsd: tuple[int, ...] | None = option(
        None, "budgets in LSD; 5 10 20 if left out, 5 10 with --quick"
    )
    num_images: int | None = option(
        None, "images of each method; if left out 16, with --quick 4, on CUDA 512"
    )
    speed_ratio: float | None = option(
        None, "how many times faster Dot is than Dash; measured here if left out"
    )
    seed: int = option(0, "image i starts from the noise of seed + i")
    device: str = option("auto", "cpu, cuda or another torch device; auto takes a GPU")

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_least(self, {"num_images": 2, "lsd": 2})
        require_positive(self, ("speed_ratio",))
        require_places(self, ("output_dir",), ("json",))
        require(self.lsd != (), "lsd", self.lsd, "one budget or more, or left out")

    def budgets(self) -> tuple[int, ...]:
        """Return the budgets asked for, or the default ones."""
        return tuple(sorted(set(self.lsd or ((5, 10) if self.quick else (5, 10, 20)))))

    def images_on(self, device_type: str) -> int:
        """Return the number of images asked for, or the default one on such a device."""
        if self.num_images is not None:
            return self.num_images
        if device_type == "cuda":
            return 512
        return 4 if self.quick else 16


def run_demo(config: DemoConfig) -> list[Row]:
    """Sample, measure, print a table, write grid.png, quality.png and if asked a JSON file.

    Returns:
        One row a method and budget.

    Raises:
        ValueError: If the pipeline takes more than noise.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    with console.status("loading Dash and Dot"):
        pipelines = load_pipelines(config.pipeline, config.dot, DEMO_SOLVERS, config.device)
        check_demo(pipelines[REFERENCE_SOLVER], config.pipeline)
        device = pipelines[REFERENCE_SOLVER].device
        num_images = config.images_on(device.type)
    with console.status("measuring how many times faster Dot is than Dash"):
        speed = measure_warm(pipelines, num_images)
    speed_ratio = config.speed_ratio or speed.speed_ratio
    _print_speed(console, speed, f"{device_name(device)}, batch {num_images}", config.speed_ratio)
    seeds = range(config.seed, config.seed + num_images)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        reference, runs = sample_all(pipelines, config.budgets(), seeds, speed_ratio, progress)
    rows = measure_rows(reference, runs, speed_ratio)
    title = f"{num_images} images of the same noise; reference: {REFERENCE_NAME}"
    console.print(results_table(rows, title))
    if has_distances(rows):
        console.print(NOTE, style="yellow")
    _print_fallbacks(console, runs)
    files = _write_pictures(config, rows, reference, runs, title)
    if config.json is not None:
        facts = {**environment(device), "num_images": num_images, "speed_ratio": speed_ratio}
        facts |= {"measured": dataclasses.asdict(speed), "reference_seconds": reference.seconds}
        files.append(_write_json(config, facts, rows))
    for file in files:
        console.print(f"wrote {file}", soft_wrap=True)
    return rows


def _print_speed(console: "Console", speed: "SpeedRatio", where: str, given: float | None) -> None:
    """Say what was measured, and whether to trust it."""
    console.print(
        f"On {where}: Dash {1e3 * speed.dash_seconds[1]:.1f} ms, "
        f"Dot {1e3 * speed.dot_seconds[1]:.1f} ms, N = {speed.speed_ratio:.2f}",
        soft_wrap=True,
    )
    if given is not None:
        console.print(f"Planning with the given N = {given:g}")
    elif max(q75 / q25 for q25, _, q75 in (speed.dash_seconds, speed.dot_seconds)) > BUSY:
        console.print(
            "These times vary much, so the machine seems busy and N may be off: run again when it "
            "is quiet, or give N by --speed_ratio.",
            style="yellow",
        )


def _print_fallbacks(console: "Console", runs: list[Run]) -> None:
    """Say where Dash stood in for Dot."""
    for method, lsd, samples in runs:
        if samples.fallbacks:
            console.print(
                f"{method.label} at {lsd} LSD ran Dash in place of Dot: {samples.fallbacks}",
                style="red",
            )


def _write_json(config: DemoConfig, facts: dict[str, object], rows: list[Row]) -> Path:
    """Write the figures and what they were measured with; return the file."""
    content = {
        "command": command_line(),
        **facts,
        "seed": config.seed,
        "reference": REFERENCE_NAME,
        "note": NOTE if has_distances(rows) else None,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(config.json, content)
    return config.json


def _write_pictures(
    config: DemoConfig,
    rows: list[Row],
    reference: Samples,
    runs: list[Run],
    title: str,
) -> list[Path]:
    """Write the grid and the plot; return the files."""
    grid, plot = config.output_dir / "grid.png", config.output_dir / "quality.png"
    labelled = [
        (f"{row.label}, {row.budget} LSD", samples.images)
        for row, (_, _, samples) in zip(rows, runs, strict=True)
    ]
    save_grid([(REFERENCE_NAME, reference.images), *labelled], grid)
    plot_quality(rows, plot, title)
    return [grid, plot]
