"""What of several processes the main one does alone; `test_two_processes` launches some."""

from accelerate import Accelerator
from test_train_dot import arguments, base, data_dir  # noqa: F401

from morse.cli import parse_config
from morse.training.loop import TrainDotConfig, train_dot


def test_held_out_pairs_are_not_kept_where_nothing_is_validated(
    base,  # noqa: F811
    data_dir,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    def keeps_pairs(*arguments):
        raise MemoryError

    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.setattr("morse.training.loop.make_validator", keeps_pairs)
    options = ("--max_train_steps", "1", "--validation_steps", "1")
    given = arguments(base, data_dir, tmp_path / "run", *options)
    assert not any(train_dot(parse_config(TrainDotConfig, given)).iterdir())
