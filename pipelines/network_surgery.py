"""Network surgery against one-shot pruning: a LeNet-300-100 on Fashion-MNIST, at two sparsities.

python -m pipelines.network_surgery --train_data_dir /usr/share/datasets/fashion-mnist \
    --output_dir DIR

Writes results.json and results.md. `--quick` takes seconds and its figures say nothing.
"""

import copy
import statistics
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from morse.cli import run_command
from morse.compression import NetworkSurgery, save_sparse
from morse.evaluation.environment import command_line, environment
from morse.evaluation.report.markdown import pipe_table
from morse.files import write_bytes, write_json
from morse.settings import REQUIRED, option, replace_defaults, require, require_least
from morse.training.batches import StepBatches
from morse.training.data import open_images

# The c_rate of each layer; the second line is the paper's for MNIST.
RATES = ((3.0, 2.0, 1.0), (5.0, 3.0, 3.0))
LAYERS = ("ip1", "ip2", "ip3")
Data = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class SurgeryConfig:
    """Compare network surgery with one-shot pruning on a LeNet-300-100."""

    train_data_dir: Path = option(REQUIRED, "folder of the IDX files of Fashion-MNIST")
    output_dir: Path = option(REQUIRED, "folder for results.json and results.md")
    seeds: int = option(3, "runs, of seeds 0, 1, ...")
    dense_steps: int = option(6000, "updates of the dense network")
    prune_steps: int = option(8000, "further updates of each other one")
    iter_stop: float = option(0.7, "share of these after which the masks stay")
    batch_size: int = option(64, "images an update")
    quick: bool = option(False, "one seed, 50 updates each, unless given")

    def __post_init__(self) -> None:
        """Check the ranges, and take --quick's settings where none were given."""
        if self.quick:
            tiny = {"seeds": 1, "dense_steps": 50, "prune_steps": 50}
            replace_defaults(self, tiny)
        counts = ("seeds", "dense_steps", "prune_steps", "batch_size")
        require_least(self, dict.fromkeys(counts, 1))
        require(0 < self.iter_stop <= 1, "iter_stop", self.iter_stop, "in (0, 1]")


def load_data(folder: Path) -> Data:
    """Return training images (n, 784) in [0, 1] and labels (n,), and the same for testing."""
    parts: list[Tensor] = []
    for split in ("train", "test"):
        images = open_images(folder, 28, 1, split)
        if images.labels is None:
            raise ValueError(f"train_data_dir is {folder}, whose images have no IDX labels")
        pixels = images.fetch(list(range(len(images))))
        parts += [pixels.flatten(1).float() / 255, images.labels]
    return tuple(parts)


def make_lenet() -> nn.Sequential:
    """Return an untrained LeNet-300-100, initialised as in Caffe."""
    network = nn.Sequential()
    for name, inputs, outputs in zip(LAYERS, (784, 300, 100), (300, 100, 10), strict=True):
        layer = nn.Linear(inputs, outputs)
        nn.init.uniform_(layer.weight, -((3 / inputs) ** 0.5), (3 / inputs) ** 0.5)
        nn.init.zeros_(layer.bias)
        network.add_module(name, layer)
        if name != LAYERS[-1]:
            network.add_module(f"{name}_relu", nn.ReLU())
    return network


def train(
    network: nn.Sequential, data: Data, batches: Iterable[list[int]], surgery: NetworkSurgery | None
) -> None:
    """Train by the authors' recipe: momentum, weight decay and Caffe's "inv" learning rate."""
    images, labels = data[:2]
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + 1e-4 * step) ** -0.75
        if surgery is not None:
            surgery.step()
        optimizer.zero_grad()
        functional.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()


@torch.no_grad()
def measure(network: nn.Sequential, data: Data) -> dict[str, float]:
    """Return test accuracy in percent, parameters other than zero, and bytes as a sparse file."""
    images, labels = data[2:]
    accuracy = 100 * (network(images).argmax(1) == labels).double().mean().item()
    kept = sum(int(parameter.count_nonzero()) for parameter in network.parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        save_sparse(network, path)
        return {"accuracy": accuracy, "kept": kept, "bytes": path.stat().st_size}


@torch.no_grad()
def keep_largest(surgery: NetworkSurgery, counts: dict[str, int]) -> None:
    """Let each layer keep its `counts` largest entries, biases included, and freeze the masks."""
    for name, count in counts.items():
        masks = {key: mask for key, mask in surgery.masks.items() if key.startswith(name)}
        layer = surgery.module.get_submodule(name)
        sizes = torch.cat([getattr(layer, key.split(".")[1]).abs().flatten() for key in masks])
        chosen = torch.zeros_like(sizes, dtype=torch.bool)
        chosen[sizes.topk(count).indices] = True
        parts = chosen.split([mask.numel() for mask in masks.values()])
        for mask, part in zip(masks.values(), parts, strict=True):
            mask.copy_(part.view_as(mask))
    surgery.freeze()


def run_seed(config: SurgeryConfig, data: Data, seed: int) -> dict[str, dict[str, float]]:
    """Train the dense network and all that start from it; return what `measure` says of each."""

    def batches(start: int, steps: int) -> StepBatches:
        return StepBatches(len(data[0]), config.batch_size, seed, start, steps)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dense = make_lenet()
    train(dense, data, batches(0, config.dense_steps), None)
    results = {"dense": measure(dense, data)}
    further = batches(config.dense_steps, config.prune_steps)
    longer = copy.deepcopy(dense)
    train(longer, data, further, None)
    results["dense, trained on"] = measure(longer, data)
    for rates in RATES:
        label = ", ".join(f"{rate:g}" for rate in rates)
        surgery = NetworkSurgery(
            copy.deepcopy(dense), c_rate=dict(zip(LAYERS, rates, strict=True)), gamma=1e-4,
            iter_stop=max(1, int(config.iter_stop * config.prune_steps)),
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        train(surgery.module, data, further, surgery)
        counts = {
            name: sum(int(m.sum()) for key, m in surgery.masks.items() if key.startswith(name))
            for name in LAYERS
        }
        results[f"surgery, c_rate {label}"] = measure(surgery.finalize(), data)
        control = NetworkSurgery(copy.deepcopy(dense))
        keep_largest(control, counts)
        train(control.module, data, further, control)
        results[f"one-shot, as many as {label}"] = measure(control.finalize(), data)
    for name, result in results.items():
        print(f"seed {seed}, {name}: {result}", flush=True)
    return results


def summarise(runs: list[dict[str, dict[str, float]]]) -> list[dict[str, object]]:
    """Return a row for each network: mean and standard deviation over seeds, and each value."""
    total, dense_bytes = runs[0]["dense"]["kept"], runs[0]["dense"]["bytes"]
    rows = []
    for name in runs[0]:
        values = {key: [run[name][key] for run in runs] for key in ("accuracy", "kept", "bytes")}
        row = {"network": name} | {
            key: {"mean": statistics.fmean(v), "std": statistics.stdev(v) if v[1:] else None}
            for key, v in values.items()
        }
        row["fewer_parameters"] = total / row["kept"]["mean"]
        row["fewer_bytes"] = dense_bytes / row["bytes"]["mean"]
        rows.append(row | {"seeds": values})
    return rows


def to_markdown(result: dict[str, object]) -> str:
    """Return the report as Markdown."""
    config, place = result["config"], result["environment"]
    rows = []
    for row in result["rows"]:
        kept, size, accuracy = (
            f"{row[key]['mean']:,.{digits}f}"
            + (f" ± {row[key]['std']:,.{digits}f}" if row[key]["std"] is not None else "")
            for key, digits in (("kept", 0), ("bytes", 0), ("accuracy", 2))
        )
        fewer, smaller = (f"{row[key]:.1f}×" for key in ("fewer_parameters", "fewer_bytes"))
        rows.append((row["network"], kept, fewer, size, smaller, accuracy))
    header = "network", "parameters left", "fewer", "file, bytes", "fewer", "test accuracy, %"
    lines = [
        "# Network surgery and one-shot pruning: LeNet-300-100 on Fashion-MNIST",
        "",
        f"`{result['command']}`, {place['device']}, torch {place['torch']}, {place['dtype']}, "
        f"seeds 0 to {config['seeds'] - 1}; mean ± standard deviation.",
        "",
        pipe_table(header, rows, "|---|--:|--:|--:|--:|--:|"),
        "",
        f"The dense network had {config['dense_steps']} updates; each other one starts from it and "
        f"had {config['prune_steps']} more on the same batches of {config['batch_size']}. Surgery "
        f"moves its masks in the first {config['iter_stop']:.0%} of these; one-shot pruning keeps, "
        "from the dense network, as many of each layer's largest parameters as surgery ended with, "
        "and trains those. c_rate is given for the three layers; files hold float32 numbers.",
    ]
    return "\n".join(lines) + "\n"


def run(config: SurgeryConfig) -> None:
    """Run all seeds and write the report."""
    data = load_data(config.train_data_dir)
    with warnings.catch_warnings():
        # At 50 times fewer parameters many units are meant to die.
        warnings.filterwarnings("ignore", message=".* entries of .* are left")
        runs = [run_seed(config, data, seed) for seed in range(config.seeds)]
    settings = {key: value for key, value in asdict(config).items() if not key.endswith("_dir")}
    result = {
        "command": command_line(),
        "environment": environment(torch.device("cpu")),
        "config": settings, "rows": summarise(runs),
    }  # fmt: skip
    write_json(config.output_dir / "results.json", result)
    write_bytes(config.output_dir / "results.md", to_markdown(result).encode())


if __name__ == "__main__":
    run_command(SurgeryConfig, run)
