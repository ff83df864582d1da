"""Imports go one way, and importing the package is instant, offline and free of pickles."""

import ast
import subprocess
import sys
from pathlib import Path

import morse

PACKAGE = Path(morse.__file__).parent
# Each module may import those of its own group and of the groups above it.
GROUPS = [
    (
        "files",
        "settings",
        "folder_settings",
        "plan",
        "spaces",
        "sampling",
        "history",
        "signatures",
        "modules",
        "distillation",
        "compression",
    ),
    ("dot",),
    (
        "clock",
        "leapfrog_moves",
        "leapfrog",
        "flow_leapfrog",
        "saved_plans",
        "steps",
        "rates",
        "denoisers",
        "branches",
        "estimates",
        "guess",
        "one_pass",
        "controlnet",
        "slot",
        "switch",
        "prepare",
        "summary",
        "plan_choice",
        "calls",
        "attach",
        "schedulers",
        "pipeline",
        "capture",
        "graphed",
        "graphs",
    ),
    ("training",),
    ("evaluation",),
    ("tuning",),
    ("cli", "__main__"),
]
RANKS = {name: rank for rank, group in enumerate(GROUPS) for name in group}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports_of(path):
            parts = name.split(".")
            assert parts != ["morse"], f"{path} imports the package itself"
            if parts[0] == "morse":
                assert RANKS[parts[1]] <= RANKS[own], f"{path} imports {name}"
            if RANKS[own] == 0:
                allowed = {"torch", "morse", *sys.stdlib_module_names}
                allowed |= {"safetensors"} if own in ("files", "compression") else set()
                assert parts[0] in allowed, f"{path} imports {name}"


def test_the_plan_needs_no_torch():
    assert "torch" not in set(imports_of(PACKAGE / "plan.py"))


def test_nothing_unpickles():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("torch.load", "import pickle", "weights_only", "joblib"):
            assert word not in text, f"{path} has {word}"


def test_import_is_light():
    code = "import sys, morse; print(sorted(m for m in ('torch', 'diffusers') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    expected = {
        "MorsePipeline", "MorseDot", "MorsePlan", "enable_morse", "disable_morse", "morse_sample",
        "dot_loss", "LeapfrogScheduler", "FlowMatchLeapfrogScheduler", "enable_cuda_graphs",
        "disable_cuda_graphs", "JumpPoint", "estimate",
    }  # fmt: skip
    assert set(morse.__all__) == expected
    assert all(getattr(morse, name).__name__ == name for name in expected)


def test_the_switch_stays_readable():
    assert len((PACKAGE / "sampling.py").read_text(encoding="utf-8").splitlines()) < 140
