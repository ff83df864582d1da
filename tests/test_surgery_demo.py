"""The network surgery demonstration, and its committed results."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import write_idx

from morse.compression import NetworkSurgery
from pipelines.network_surgery import (
    LAYERS,
    SurgeryConfig,
    keep_largest,
    make_lenet,
    run,
    to_markdown,
)

RESULTS = Path(__file__).parents[1] / "eval/results/surgery"


@pytest.fixture
def images(tmp_path):
    """Noisy images of ten easy classes."""
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 200, (10, 28, 28))
    for prefix, count in (("train", 500), ("t10k", 100)):
        labels = generator.integers(0, 10, count).astype(np.uint8)
        noise = generator.integers(0, 56, (count, 28, 28))
        pixels = (classes[labels] + noise).astype(np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", pixels)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", labels)
    return tmp_path


def test_quick_run(images, tmp_path, capsys):
    output = tmp_path / "results"
    run(SurgeryConfig(train_data_dir=images, output_dir=output, quick=True, batch_size=16))
    result = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert (output / "results.md").read_text(encoding="utf-8") == to_markdown(result)
    rows = {row["network"]: row for row in result["rows"]}
    assert len(rows) == 6 and 0.99 * 266_610 < rows["dense"]["kept"]["mean"] <= 266_610
    assert rows["dense"]["accuracy"]["mean"] > 90
    for rates in ("3, 2, 1", "5, 3, 3"):
        surgery, control = rows[f"surgery, c_rate {rates}"], rows[f"one-shot, as many as {rates}"]
        assert surgery["kept"] == control["kept"] and surgery["fewer_parameters"] > 10
        assert surgery["fewer_bytes"] > 10
    assert str(tmp_path) not in json.dumps(result["config"])
    assert capsys.readouterr().out.count("seed 0") == 6


def test_one_shot_keeps_the_largest():
    torch.manual_seed(0)
    surgery = NetworkSurgery(make_lenet())
    counts = {"ip1": 100, "ip2": 20, "ip3": 1010}
    keep_largest(surgery, counts)
    network = surgery.finalize()
    dense = make_lenet()
    torch.manual_seed(0)
    dense = make_lenet()
    for name in LAYERS:
        pruned, full = (
            torch.cat([p.detach().abs().flatten() for p in each.get_submodule(name).parameters()])
            for each in (network, dense)
        )
        kept = pruned != 0
        assert int(kept.sum()) <= counts[name]  # of ip3 all are kept, zero biases too
        assert full[kept].min() >= full.topk(counts[name]).values.min()
        assert torch.equal(pruned[kept], full[kept])


def test_bad_settings(tmp_path):
    folders = {"train_data_dir": tmp_path, "output_dir": tmp_path}
    for options in ({"seeds": 0}, {"prune_steps": 0}, {"iter_stop": 0.0}, {"iter_stop": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SurgeryConfig(**folders, **options)


def test_committed_results_agree():
    result = json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))
    assert (RESULTS / "results.md").read_text(encoding="utf-8") == to_markdown(result)
    assert "/home/" not in json.dumps(result) and "/tmp/" not in json.dumps(result)
