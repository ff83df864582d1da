import json
import math
import operator

import numpy as np
import pytest
from idx_files import write_parts
from scipy import stats

from morse.cli import parse_config
from morse.evaluation.ablation.command import run_ablation
from morse.evaluation.ablation.config import AblationConfig
from morse.evaluation.ablation.latency import compare, time_in_turn
from morse.evaluation.ablation.report import compact_table, find_winners, to_markdown
from morse.evaluation.ablation.rows import ROWS, Row, select_rows
from morse.evaluation.ablation.runs import train_and_measure
from morse.evaluation.ablation.sizes import match_size, parameter_counter
from morse.evaluation.ablation.statistics import paired_difference, student_quantile
from morse.evaluation.ablation.workers import run_jobs

PLAIN = Row(name="plain", method="plain", description="a plain Dot")
NARROW = Row(
    name="narrow", method="narrow", description="less LoRA", overrides={"lora_rank": 2}
)  # fmt: skip
SHRUNK = Row(
    name="shrunk", method="narrow", description="a plain Dot of its size",
    same_size_as="narrow", shrink_lora=True,
)  # fmt: skip


# Statistics


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_quantiles_are_scipys(degrees, confidence):
    expected = stats.t.ppf((1 + confidence) / 2, degrees)
    assert student_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_that_of_the_paired_t_test():
    first, second = [0.61, 0.64, 0.60, 0.66], [0.62, 0.68, 0.61, 0.65]
    found = paired_difference(first, second)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.mean == pytest.approx(np.mean(np.subtract(first, second)))


def test_two_seeds_have_the_closed_form():
    # Student's t with one degree of freedom is Cauchy's: its 97.5 % quantile is tan(0.475 pi).
    found = paired_difference([0.0, 0.0], [0.1, 0.3])
    half = math.tan(0.475 * math.pi) * 0.1
    assert (found.mean, found.low) == pytest.approx((-0.2, -0.2 - half))


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        ([0.50, 0.51, 0.49], "better"),
        ([0.70, 0.71, 0.69], "worse"),
        ([0.55, 0.65, 0.59], "within noise"),
        ([0.50], "one seed"),
    ],
)
def test_verdicts(first, verdict):
    assert paired_difference(first, [0.6] * len(first)).verdict == verdict


def test_what_all_seeds_share_is_no_noise():
    hard = np.array([0.1, 0.5, 0.9])  # seeds differ by far more than the rows
    assert paired_difference(list(hard - 0.01), list(hard)).verdict == "better"
    assert paired_difference(list(hard - [0.01, 0.02, -0.02]), list(hard)).verdict == "within noise"


# The table of rows


def test_rows_bring_what_they_are_compared_with():
    control = Row(name="control", method="m", description="c")
    row = Row(name="row", method="m", description="r", controls=("control",))
    table = [PLAIN, control, row, NARROW]
    assert [r.name for r in select_rows(["row"], table)] == ["plain", "control", "row"]
    assert [r.name for r in select_rows(["narrow"], table)] == ["plain", "narrow"]
    assert select_rows(["all"], table) == table


def test_unknown_methods_are_errors():
    with pytest.raises(ValueError, match=r"methods has \['nothing'\]"):
        select_rows(["plain", "nothing"], [PLAIN, NARROW])


def test_controls_follow_the_settings(tmp_path):
    rows = {row.name: row for row in ROWS}
    config = AblationConfig(train_data_dir=tmp_path, window_steps=8, max_train_steps=3000)
    assert config.overrides(rows["dnr-plain"]) == {"pairs_per_window": 8}
    settings = config.training(0, tmp_path, config.overrides(rows["ske2grid-progressive"]))
    assert settings.progressive_steps == settings.max_train_steps == 1500


def test_bad_data_claim_no_folder(tmp_path):
    config = AblationConfig(
        train_data_dir=tmp_path / "typo", output_dir=tmp_path / "out", quick=True
    )
    with pytest.raises(FileNotFoundError):
        run_ablation(config, [PLAIN])
    assert not (tmp_path / "out").exists()


def test_the_table_is_sound():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) and names[0] == "plain"
    for row in ROWS:
        assert set(row.needs) <= set(names)
        assert row.same_size_as != row.name and (
            row.name not in row.controls or row.name == "plain"
        )
    sized = {row.name for row in ROWS if row.same_size_as}
    assert not sized & {row.same_size_as for row in ROWS}, "a size must not follow from a size"


# Sizes


def test_sizes_are_counted_as_dots_have_them(dash):
    from morse import MorseDot

    count = parameter_counter(dash)
    for widths, rank in (((8, 12), 3), ((16, 32), 16), ((4, 4), 0)):
        dot = MorseDot.from_dash(
            dash, num_down_blocks=2, block_out_channels=widths, lora_rank=rank
        )  # fmt: skip
        assert count(widths, rank) == sum(p.numel() for p in dot.parameters())


def test_sizes_match_and_shrink_evenly():
    def count(widths, rank):
        return 1000 * sum(widths) + 500 * rank

    plain = (16, 32)
    assert match_size(count, 24_000, plain, 16, shrink_lora=False) == {
        "block_out_channels": (4, 12), "lora_rank": 16,
    }  # fmt: skip
    # Half of everything: 8 + 16 widths and half the rank.
    assert match_size(count, 28_000, plain, 16, shrink_lora=True) == {
        "block_out_channels": (8, 16), "lora_rank": 8,
    }  # fmt: skip


# Latency


def test_latencies_are_compared_round_by_round():
    seconds = {"dash": [6.0, 6.0, 6.0], "plain": [1.0, 2.0, 4.0], "dot": [2.0, 4.0, 8.0]}
    found = compare(seconds)
    assert found["to_plain"] == [2.0, 2.0, 2.0] and found["speed_ratio"] == 1.5
    assert found["plain_seconds"] == [1.5, 2.0, 3.0]


def test_every_call_takes_every_place_in_a_round():
    import torch

    calls = []
    names = ("dash", "plain", "dot")
    time_in_turn(
        {name: lambda index, name=name: calls.append((index, name)) for name in names},
        3,
        torch.device("cpu"),
    )
    assert len(calls) == 6 * 3
    places = [[name for _, name in calls[i : i + 3]] for i in range(0, 18, 3)]
    assert all(sorted(round_) == sorted(names) for round_ in places)
    assert {round_[0] for round_ in places[3:]} == set(names)


# The report


def facts(name, ratios, controls=["plain"], **changes):  # noqa: B006
    runs = [
        {"seed": seed, "ratios": {"residual_ratio": ratio, "residual_ratio/0-20": ratio + 1,
                                 "sequence_ratio": 1 - ratio, "sequence_ratio/1": 0.3},
         "parameters": 1000, "nonzero": 900, "bytes": 4000, "seconds": 9.0, "cpu_seconds": 8.0}
        for seed, ratio in enumerate(ratios)
    ]  # fmt: skip
    latency = {
        "batch_size": 16, "dash_seconds": [0.1, 0.2, 0.3], "plain_seconds": [0.03, 0.04, 0.05],
        "dot_seconds": [0.04, 0.05, 0.06], "to_plain": [1.2, 1.25, 1.3], "speed_ratio": 4.0,
    }  # fmt: skip
    row = {"name": name, "method": name, "description": f"what {name} is", "controls": controls}
    return row | {
        "same_size_as": None,
        "figure": "residual_ratio",
        "overrides": {},
        "latency": latency,
        "runs": runs,
        **changes,
    }


@pytest.fixture
def result():
    return {
        "schema_version": 1,
        "command": "python -m eval.ablate",
        "environment": {"device": "a CPU", "torch": "2", "dtype": "float32"},
        "settings": {
            "max_train_steps": 5, "train_batch_size": 2, "cache_windows": 8,
            "validation_images": 4, "latency_rounds": 3, "latency_batch_size": 2,
        },
        "seeds": [0, 1, 2],
        "rows": [
            facts("plain", [0.60, 0.61, 0.62]),
            facts("good", [0.50, 0.51, 0.52], controls=["its control"]),
            facts("lucky", [0.50, 0.51, 0.52], controls=["its control", "a better control"]),
            facts("its control", [0.55, 0.56, 0.575]),
            facts("a better control", [0.49, 0.53, 0.51]),
            facts("bad", [0.70, 0.71, 0.72]),
            facts("absent", [], latency=None),
        ],
        "failures": {"absent-seed0": "ValueError('no')"},
    }  # fmt: skip


def line_of(text, name):
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |"))


def test_the_report_states_figures_and_verdicts(result):
    text = to_markdown(result)
    good, lucky = line_of(text, "good"), line_of(text, "lucky")
    assert "0.5100 ± 0.0100 | -0.1000 [-0.1000, -0.1000] | better | its control -0.0517 [" in good
    # Differences .01, -.02, .01: 4.3027, of two degrees of freedom, times .01.
    assert "a better control +0.0000 [-0.0430, +0.0430] within noise" in lucky
    assert "| +0.1000 [+0.1000, +0.1000] | worse |" in line_of(text, "bad")
    assert "not measured" in line_of(text, "absent")
    assert "- absent-seed0: `ValueError('no')`" in text
    cost = text.split("## Size and speed")[1]
    assert "| 1,000 | 900 | 4 | 50.0 (40.0–60.0) | 1.25 (1.20–1.30) | 4.00 | 8 |" in line_of(
        cost, "good"
    )
    assert "1.6100 ± 0.0100" in line_of(text.split("by gap")[1], "plain")


def test_a_winner_beats_plain_and_its_control(result):
    assert [row["name"] for row in find_winners(result)] == ["good"]
    assert "their controls: good (0.5100" in compact_table(result)
    result["rows"][1]["runs"] = facts("good", [0.60, 0.60, 0.63])["runs"]
    assert compact_table(result).endswith("their controls: none.")


def test_a_row_is_compared_by_its_figure(result):
    result["rows"][5]["figure"] = "sequence_ratio"  # of which the bad row has less
    assert "| -0.1000 [-0.1000, -0.1000] | better |" in line_of(to_markdown(result), "bad")


def test_only_common_seeds_are_compared(result):
    result["rows"][1]["runs"].pop(0)
    assert "-0.1000" in line_of(to_markdown(result), "good")


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf])
def test_a_run_that_diverged_is_told(result, ratio):
    for index, seed in ((1, 0), (3, 2)):  # the good row, and its control elsewhere
        result["rows"][index]["runs"][seed]["ratios"]["residual_ratio"] = ratio
    good = line_of(to_markdown(result), "good")
    assert good == "| good | not finite |  | not finite | its control not finite |"
    assert compact_table(result).endswith("their controls: none.")


def test_from_json_redraws_the_table(result, tmp_path):
    file = tmp_path / "old.json"
    file.write_text(json.dumps(result))
    config = parse_config(
        AblationConfig, ["--from", str(file), "--report_dir", str(tmp_path / "new")]
    )
    run_ablation(config)
    assert (tmp_path / "new/ablation.md").read_text() == to_markdown(result)
    assert json.loads((tmp_path / "new/ablation.json").read_text()) == result
    file.write_text(json.dumps(result | {"schema_version": 0}))
    with pytest.raises(ValueError, match="schema_version is 0"):
        run_ablation(config)


# Settings


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match="train_data_dir is not given"):
        AblationConfig()
    with pytest.raises(ValueError, match="seeds is 0"):
        AblationConfig(train_data_dir=tmp_path, seeds=0)
    config = AblationConfig(train_data_dir=tmp_path, quick=True, train_batch_size=2)
    assert (config.max_train_steps, config.train_batch_size) == (4, 2)
    argv = f"--quick --seeds 3 --train_data_dir {tmp_path}".split()
    asked = parse_config(AblationConfig, argv)
    assert (asked.seeds, asked.max_train_steps) == (3, 4)
    with pytest.raises(ValueError, match="'seed'"):
        config.training(0, tmp_path, {"seed": 3})


def test_a_first_stage_gets_no_updates_of_its_own(tmp_path):
    for updates, first in ((300, 150), (100, 50)):
        config = AblationConfig(train_data_dir=tmp_path, max_train_steps=updates)
        settings = config.training(0, tmp_path, {"progressive_steps": 150})
        assert settings.progressive_steps == first
        assert settings.max_train_steps == updates - first


# All of it, on a tiny random Dash


@pytest.fixture(scope="module")
def tiny(build_unet, tmp_path_factory):
    """Arguments of a quick ablation of a tiny random Dash."""
    from diffusers import DDPMPipeline, DDPMScheduler

    folder = tmp_path_factory.mktemp("tiny")
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    DDPMPipeline(build_unet(channels=(8, 8), sample_size=8), scheduler).save_pretrained(
        folder / "dash"
    )
    write_parts(folder)
    return ["--pipeline", str(folder / "dash"), "--train_data_dir", str(folder), "--quick",
            "--lora_rank", "4"]  # fmt: skip


def contents(folder, pattern):
    return {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob(pattern)
    }


@pytest.mark.slow
def test_a_killed_ablation_goes_on(tiny, tmp_path, monkeypatch):
    import morse.evaluation.ablation.command as command

    table, trained = [PLAIN, NARROW, SHRUNK], []

    def train(config, name, seed, overrides):
        trained.append((name, seed))
        if len(trained) == 4:
            raise RuntimeError("out of luck")
        return train_and_measure(config, name, seed, overrides)

    def start(*options):
        arguments = [*tiny, "--output_dir", str(tmp_path), "--seeds", "2", *options]
        return run_ablation(parse_config(AblationConfig, arguments), table)

    monkeypatch.setattr(command, "train_and_measure", train)
    with pytest.raises(RuntimeError, match="narrow-seed1: RuntimeError"):
        start()
    # Seed by seed, and what takes its size from another row after that one.
    assert trained == [
        ("plain", 0), ("narrow", 0), ("plain", 1), ("narrow", 1), ("shrunk", 0), ("shrunk", 1),
    ]  # fmt: skip
    assert "narrow-seed1" in (tmp_path / "ablation.md").read_text()
    with pytest.raises(FileExistsError, match="--resume"):
        start()
    with pytest.raises(ValueError, match="max_train_steps was 4 and is 5"):
        start("--resume", "--max_train_steps", "5")
    cells, windows = contents(tmp_path, "cells/*"), contents(tmp_path, "windows-*/*")
    result = start("--resume")
    assert trained[6:] == [("narrow", 1)]
    assert contents(tmp_path, "windows-*/*") == windows
    assert contents(tmp_path, "cells/*").items() > cells.items()
    check_result(result)
    file = tmp_path / "cells" / "plain-seed0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"overrides": {"conv": "odd"}}))
    with pytest.raises(ValueError, match="delete that file"):
        start("--resume")


def check_result(result):
    plain, narrow, shrunk = result["rows"]
    assert [[run["seed"] for run in row["runs"]] for row in result["rows"]] == [[0, 1]] * 3
    assert result["failures"] == {} and all(row["latency"] for row in result["rows"])
    assert narrow["runs"][0]["parameters"] < plain["runs"][0]["parameters"]
    sizes = [row["runs"][0]["nonzero"] for row in (shrunk, narrow)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert all(run["ratios"]["residual_ratio"] > 0 for row in result["rows"] for run in row["runs"])


def test_rows_are_trained_on_the_same_windows_and_repeat(tiny, tmp_path):
    same = Row(name="same", method="same", description="a plain Dot", overrides={"lora_rank": 4})
    arguments = [*tiny, "--output_dir", str(tmp_path)]
    result = run_ablation(parse_config(AblationConfig, arguments), [PLAIN, same])
    first, second = (row["runs"][0]["ratios"] for row in result["rows"])
    assert first == second
    assert {"residual_ratio", "sequence_ratio", "sequence_ratio/3"} <= first.keys()
    assert len(list(tmp_path.glob("windows-*/*.safetensors"))) == 1


def test_jobs_go_on_where_one_fails():
    outcomes = dict(run_jobs(operator.truediv, [(1, 2), (1, 0), (6, 3)], workers=1))
    assert isinstance(outcomes.pop((1, 0)), ZeroDivisionError)
    assert outcomes == {(1, 2): 0.5, (6, 3): 2}
