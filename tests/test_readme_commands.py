"""Commands and code in the documents: their options and names are there."""

import ast
import json
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from morse.cli import COMMANDS, find_command, parse_config

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs/guide.md"
PAGES = [
    ROOT / "README.md",
    GUIDE,
    ROOT / "training/README.md",
    *ROOT.glob("morse/assets/*/README.md"),
]
NOTEBOOKS = [*ROOT.glob("pipelines/*.ipynb")]


def blocks(page, language):
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.M)
    assert found
    return found


def commands(page):
    """Give the words of each command; what belongs to the one before is indented."""
    lines = [line for block in blocks(page, "bash") for line in re.split(r"\n(?=\S)", block)]
    found = [shlex.split(line.replace("\\\n", " "), comments=True) for line in lines]
    return [words for words in found if words and words[0] in ("morse", "accelerate", "python")]


def parse(words, monkeypatch):
    """Parse a command as the script or the `morse` command does that it names."""
    if words[0] == "morse":
        count = 2 if " ".join(words[1:3]) in COMMANDS else 1
        config, function, _ = COMMANDS[" ".join(words[1 : count + 1])]
        assert callable(find_command(function))
        return [parse_config(find_command(config), words[count + 1 :])]
    parsed, start = [], 2  # `accelerate launch` or `python -m`
    script = words[start] if words[0] == "accelerate" else f"{words[start].replace('.', '/')}.py"

    def run_command(config, function, *rest):
        parsed.append(parse_config(config, words[start + 1 :]))

    monkeypatch.setattr("morse.cli.run_command", run_command)
    runpy.run_path(str(ROOT / script), run_name="__main__")
    return parsed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_command_is_understood(page, monkeypatch):
    found = commands(page)
    assert found
    for words in found:
        assert len(parse(words, monkeypatch)) == 1, words


def test_a_wrong_option_would_be_noticed(monkeypatch, capsys):
    for command in ("morse plan", "accelerate launch training/train_dot.py"):
        with pytest.raises(SystemExit):
            parse([*command.split(), "--no_such_option"], monkeypatch)
    assert capsys.readouterr().err.count("required") == 2


def check_code(text):
    """Compile code, and look its imports from morse up."""
    compile(text, "code", "exec")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "morse":
            module = import_module(node.module)
            assert [each.name for each in node.names if not hasattr(module, each.name)] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", GUIDE], ids=lambda page: page.name)
def test_code_in_pages_compiles_and_its_names_are_there(page):
    for text in blocks(page, "python"):
        check_code(text)


def test_the_code_in_the_guide_runs():
    for text in blocks(GUIDE, "python"):
        exec(text.replace("batch_size=16", "batch_size=1"), {})


def test_the_first_code_in_readme_runs():
    """What needs no pipeline but the embedded one, with one image and few steps for many."""
    scope, shorter = {}, {"batch_size=16": "batch_size=1", "num_inference_steps=50": "lsd=4"}
    for text in blocks(ROOT / "README.md", "python")[:2]:
        for words, fewer in shorter.items():
            text = text.replace(words, fewer)
        exec(text, scope)
    assert len(scope["images"]) == 1
    assert scope["pipe"].speed_ratio == scope["pipe"].measured.speed_ratio


def test_cells_of_notebooks_too():
    cells = [cell for path in NOTEBOOKS for cell in json.loads(path.read_text("utf-8"))["cells"]]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 3
    for text in code:
        check_code(text)


def test_the_notebook_is_what_its_script_writes():
    script = ast.parse((ROOT / "pipelines/build_notebook.py").read_text("utf-8"))
    (written,) = (
        ast.literal_eval(node.value) for node in script.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "CELLS"
    )  # fmt: skip
    (notebook,) = NOTEBOOKS
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == written
