import dataclasses
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from morse.cli import COMMANDS, find_command, main, parse_config, run_command
from morse.evaluation.demo import DemoConfig
from morse.evaluation.environment import command_line
from morse.evaluation.fid.config import FidConfig
from morse.settings import option

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Config:
    """Do something."""

    lsd: tuple[int, ...] = option((5,), "budgets", alias="budgets")
    from_json: Path | None = option(None, "input", alias="from")
    quick: bool = option(False, "100 % faster")

    def __post_init__(self):
        if min(self.lsd) < 1:
            raise ValueError(f"lsd is {self.lsd}, but each must be 1 or more")


def test_options_follow_the_fields():
    assert parse_config(Config, []) == Config()
    assert parse_config(Config, ["--lsd", "3", "4", "--quick"]) == Config((3, 4), quick=True)
    for spelling in ("--from", "--from_json", "--from-json"):
        assert parse_config(Config, [spelling, "a.json"]).from_json == Path("a.json")


def test_help_shows_the_fields_name_first_unless_it_stands_for_a_keyword(capsys):
    assert parse_config(Config, ["--budgets", "3"]) == parse_config(Config, ["--lsd", "3"])
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert "[--lsd LSD" in usage and "--budgets" not in usage
    assert "[--from FROM_JSON]" in usage and "--from_json" not in usage


def test_a_bad_value_ends_with_its_message(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, ["--lsd", "0"])
    assert stop.value.code == 2
    assert "lsd is (0,), but each must be 1 or more" in capsys.readouterr().err


def test_what_must_be_given_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--lsd", "5"])
    assert stop.value.code == 2
    assert "required: --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["sing"], ["eval"], ["eval", "sing"]])
def test_unknown_commands_show_the_known_ones(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "eval fid" in capsys.readouterr().err


@pytest.mark.parametrize(("group", "count"), [([], len(COMMANDS)), (["eval"], 1)])
def test_help_has_a_line_for_each_command(group, count, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*group, "--help"])
    told = capsys.readouterr()
    assert stop.value.code == 0 and told.err == ""
    lines = {line[:17].strip(): line[17:].strip() for line in told.out.splitlines()[1:]}
    assert lines["eval fid"].startswith("measure FID") and all(lines.values())
    assert len(lines) == count and set(lines) <= set(COMMANDS)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("eval fid --real a --fake b --json {folder}", "json is {folder}, a folder"),
        ("eval fid --real a --fake b --json {file}/a.json", "json is {file}/a.json, but {file} is"),
        ("eval fid --real a --save_stats {file}/b/a.npz", "but {file} is a file"),
        ("demo --json {folder}", "json is {folder}, a folder"),
        ("plan --output_dir {file}/a/b", "output_dir is {file}/a/b, but {file} is a file"),
        ("bench --json {folder}", "json is {folder}, a folder"),
        ("bench --output_dir {file}", "give another --output_dir"),
        ("eval fid --pipeline a --lsd 5 --output_dir {file}", "output_dir is {file}, but {file}"),
        ("train-dash --train_data_dir a --output_dir {file}/b", "output_dir is {file}/b, but"),
        ("train-features --train_data_dir a --output_dir {file}", "output_dir is {file}, but"),
        (
            "train-dot --pretrained_model_name_or_path a --train_data_dir a --output_dir {folder} "
            "--cache_pairs 8 --cache_dir {file}",
            "cache_dir is {file}, but {file} is a file; give another --cache_dir",
        ),
        (
            "tune-dot --pretrained_model_name_or_path a --output_dir {folder} --cache_dir {file}/b",
            "cache_dir is {file}/b, but {file} is a file",
        ),
    ],
)
def test_places_that_cannot_be_written_to_are_told_before_anything_is_measured(
    argv, told, tmp_path, capsys
):
    places = {"folder": tmp_path, "file": tmp_path / "file"}
    places["file"].touch()
    with pytest.raises(SystemExit) as stop:
        main(argv.format(**places).split())
    assert stop.value.code == 2
    assert told.format(**places) in capsys.readouterr().err


def test_a_folder_without_the_right_to_write_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    with pytest.raises(ValueError, match=f"nothing can be written to {tmp_path}; give another"):
        DemoConfig(json=tmp_path / "new" / "a.json")
    FidConfig(pipeline="a", lsd=(5.0,), output_dir=tmp_path)  # whose images may all be there


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    config, function = map(find_command, COMMANDS[command][:2])
    assert callable(function)
    for field in dataclasses.fields(config):
        assert field.metadata["help"], f"{command} --{field.name} has no help text"
        assert f"--{field.name}" in text


def test_options_are_explained_without_waiting_for_diffusers():
    settings = [COMMANDS[name][0] for name in ("bench", "plan", "eval fid", "tune-dot")]
    code = f"""
import sys
from morse.cli import find_command
for path in {settings}:
    find_command(path)
assert "torch" in sys.modules and "diffusers" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", [OSError, ImportError, ValueError])
def test_what_a_user_can_mend_is_told_in_one_line(error, capsys):
    def fail(config):
        raise error("no such pipeline")

    with pytest.raises(SystemExit) as stopped:
        run_command(Config, fail, [])
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: no such pipeline\n"


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert capsys.readouterr().out == f"morse {project['version']}\n"


def test_a_mistyped_command_is_repeated(capsys):
    with pytest.raises(SystemExit):
        main(["bnch", "--lsd", "5", "--help"])
    assert "unknown command 'bnch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "told"),
    [(None, "morse"), ("morse.__main__", "python -m morse"), ("eval.fid", "python -m eval.fid")],
)
def test_a_command_is_told_as_it_was_run(module, told, monkeypatch):
    started = SimpleNamespace(__spec__=module and SimpleNamespace(name=module))
    monkeypatch.setitem(sys.modules, "__main__", started)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/morse", "bench", "--prompts", "a cat"])
    assert command_line() == f"{told} bench --prompts 'a cat'"
