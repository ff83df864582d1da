"""README and the committed results agree."""

import json
from pathlib import Path

import pytest

from eval.readme_table import BEGIN, update

ROOT = Path(__file__).parents[1]


def test_the_table_is_that_of_the_committed_benchmark():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert BEGIN in text
    assert update(text) == text


@pytest.mark.parametrize("name", ["morse/assets/fashion_mnist", "eval/results/fashion_mnist"])
def test_committed_json_names_no_private_paths(name):
    for path in (ROOT / name).rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        assert "/home/" not in text and "/root/" not in text and "/tmp/" not in text


def test_the_embedded_models_are_small():
    folder = ROOT / "morse/assets/fashion_mnist"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 15e6
