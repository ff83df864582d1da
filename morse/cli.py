"""The `morse` command, and command lines built from configuration dataclasses."""

import argparse
import dataclasses
import sys
import types
import typing
from importlib import import_module
from itertools import takewhile
from keyword import iskeyword
from typing import Literal

from morse.settings import REQUIRED, Config, make_given

# command -> (settings, function, what it does): the first two lie in modules of their own, and what
# a command runs is imported once its options are parsed, as diffusers takes seconds.
COMMANDS = {
    "demo": (
        "morse.evaluation.demo.DemoConfig",
        "morse.evaluation.demo.run_demo",
        "sample the same noise with and without Morse, and show it",
    ),
    "bench": (
        "morse.evaluation.bench.config.BenchmarkConfig",
        "morse.evaluation.bench.benchmark.run_benchmark",
        "measure quality against cost, of Morse and of solvers alone",
    ),
    "plan": (
        "morse.evaluation.planning.config.PlanConfig",
        "morse.evaluation.planning.command.run_plan",
        "fit leapfrog's steps, and search which evaluations Dot makes",
    ),
    "eval fid": (
        "morse.evaluation.fid.command.FidConfig",
        "morse.evaluation.fid.command.run_fid",
        "measure FID and other distances of images, or make them first",
    ),
    "train-dash": (
        "morse.training.dash.TrainDashConfig",
        "morse.training.dash.train_dash",
        "train a small diffusion model",
    ),
    "train-dot": (
        "morse.training.config.TrainDotConfig",
        "morse.training.loop.train_dot",
        "train a Dot for a pretrained pipeline",
    ),
    "tune-dot": (
        "morse.tuning.config.TuneDotConfig",
        "morse.tuning.command.tune_dot",
        "tune a trained Dot on whole runs of its plans",
    ),
    "train-features": (
        "morse.evaluation.train_features.TrainFeaturesConfig",
        "morse.evaluation.train_features.train_features",
        "train the classifier that images of Fashion-MNIST are measured by",
    ),
}


def find_command(path: str) -> typing.Any:
    """Import what `COMMANDS` names by its path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _argument(hint: object) -> dict[str, object]:
    """Translate a field's type into the keywords of `add_argument`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return _argument(inner)
    if origin is Literal:
        return {"choices": list(args), "type": type(args[0])}
    if origin is tuple:
        return {"nargs": "+", **_argument(args[0])}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint}


def parse_config(
    config_class: type[Config], argv: list[str] | None = None, prog: str | None = None
) -> Config:
    """Build a command line from a dataclass and parse it into an instance.

    Its fields, which `morse.settings.option` makes, become options of their names (dashes work
    too) and of their `alias`; help shows the field's name first, unless the alias is a keyword of
    Python, which no field can be called. Supported types are str, int, float, bool, Path,
    `Literal`, `tuple[X, ...]` and `X | None`. A `ValueError` raised by the dataclass's own checks
    ends the program with exit status 2 and the message.

    Args:
        config_class: A dataclass.
        argv: The arguments; `sys.argv[1:]` when None.
        prog: The program's name in messages.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(config_class.__doc__ or "").strip().split("\n")[0],
    )
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        required = field.default is REQUIRED
        spellings = filter(None, (field.name, field.metadata["alias"]))
        names = dict.fromkeys(
            f"--{name}"
            for each in sorted(spellings, key=iskeyword, reverse=True)
            for name in (each, each.replace("_", "-"))
        )
        parser.add_argument(
            *names,
            dest=field.name,
            required=required,
            default=argparse.SUPPRESS,
            help=_help_text(field, required),
            **_argument(hints[field.name]),
        )
    values = vars(parser.parse_args(argv))
    try:
        return make_given(
            config_class,
            {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
            },
        )
    except ValueError as error:
        parser.error(str(error))


def _help_text(field: dataclasses.Field, required: bool) -> str:
    text = field.metadata["help"].replace("%", "%%")
    default = field.default
    if required or default is None or default == ():
        return text
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"


def main(argv: list[str] | None = None) -> None:
    """Run `morse COMMAND [options]`; user errors end with one line and exit status 2.

    `morse --version` prints the package's version.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"morse {import_module('morse').__version__}")
        return
    words = next((n for n in (2, 1) if " ".join(argv[:n]) in COMMANDS), 0)
    if not words:
        _explain(argv)
    command = " ".join(argv[:words])
    config, function, _ = COMMANDS[command]

    def run(settings: object) -> None:
        find_command(function)(settings)

    run_command(find_command(config), run, argv[words:], command)


def _explain(argv: list[str]) -> typing.NoReturn:
    """List the commands, or those of a group such as `eval`, and end the program."""
    asked = list(takewhile(lambda word: not word.startswith("-"), argv))
    found = [name for name in COMMANDS if asked == name.split()[: len(asked)]]
    helps = bool(found) and bool({"-h", "--help"} & set(argv))
    output = sys.stdout if helps else sys.stderr
    if not found or (argv and not asked and not helps):
        print(f"unknown command {' '.join(asked or argv[:1])!r}", file=sys.stderr)
    usage = "usage: morse COMMAND [options], or morse --version; --help after a command"
    print(usage, file=output)
    for name in found or COMMANDS:
        print(f"  {name:15} {COMMANDS[name][2]}", file=output)
    raise SystemExit(0 if helps else 2)


def run_command(
    config_class: type[Config],
    function: typing.Callable[[Config], object],
    argv: list[str] | None = None,
    name: str | None = None,
) -> None:
    """Parse `config_class` from `argv`, call `function`, show user errors as one line."""
    config = parse_config(config_class, argv, prog=name and f"morse {name}")
    try:
        function(config)
    except ConnectionError:  # of processes or pipes, and no mistake in what was asked for
        raise
    # OSError: also what diffusers raises for names that are neither a folder nor on the hub.
    except (ValueError, OSError, ImportError) as error:
        if getattr(error, "name", None) and str(error.name).startswith("morse"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
