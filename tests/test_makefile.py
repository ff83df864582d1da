import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path):
    """What make needs, in a path with spaces, with a stand-in for Python that logs its calls."""
    folder = tmp_path / "a clone with spaces"
    (folder / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", ".ci/run"):
        shutil.copy(ROOT / name, folder / name)
    script = folder / "fake python"
    script.write_text(
        '#!/bin/sh\necho "$@" >> log.txt\n'
        'if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi\n'
    )
    script.chmod(0o755)
    return folder


def run(folder, *command):
    subprocess.run(
        [*command, f"PYTHON={folder}/fake python"] if command[0] == "make" else command,
        cwd=folder.parent,
        check=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": f"{folder}/fake python"},
    )
    return (folder / "log.txt").read_text().splitlines()


def test_the_first_run_sets_up_and_the_second_does_not(checkout):
    make = ("make", "-C", str(checkout))
    log = run(checkout, *make, "demo", "ARGS=--quick --output-dir x")
    assert [line for line in log if "pip" in line] == [
        "-m pip install --disable-pip-version-check torch==2.13.0",
        "-m pip install --disable-pip-version-check --editable .[dev,notebook,peers]",
        "-m pip install --disable-pip-version-check --no-deps torch-fidelity==0.4.0",
    ]
    assert log[-1] == "-m morse demo --quick --output-dir x"
    again = run(checkout, *make, "demo")[len(log) :]
    assert again == ["-m morse demo "] or again == ["-m morse demo"]


def test_ci_runs_exactly_make_test(checkout):
    log = run(checkout, str(checkout / ".ci" / "run"))
    assert log[-1].strip() == "-m pytest -n 2 --dist loadfile"
