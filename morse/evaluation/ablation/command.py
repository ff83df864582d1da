"""The ablation as a command: trains, measures, times, and writes the table."""

import json
from collections.abc import Iterator, Sequence

from morse.dot.ports import default_widths
from morse.evaluation.ablation.config import AblationConfig
from morse.evaluation.ablation.latency import measure_row
from morse.evaluation.ablation.report import SCHEMA_VERSION, write_report
from morse.evaluation.ablation.rows import PLAIN, ROWS, Row, select_rows
from morse.evaluation.ablation.runs import (
    check_data,
    open_pipeline,
    prepare_windows,
    train_and_measure,
)
from morse.evaluation.ablation.sizes import match_size, parameter_counter
from morse.evaluation.ablation.store import AblationStore, Facts
from morse.evaluation.ablation.workers import one_thread, quiet_loading, run_jobs
from morse.evaluation.environment import command_line, environment
from morse.training.config import TrainDotConfig

Failures = dict[str, str]


def run_ablation(config: AblationConfig, rows: Sequence[Row] = ROWS) -> Facts:
    """Do what is not done yet of an ablation, and write ablation.json and ablation.md.

    Returns:
        The result, as it is in ablation.json.

    Raises:
        OSError: If the pipeline or the images can't be read; nothing is written then.
        ValueError: If they don't suit each other, or a row's settings are out of range.
        RuntimeError: If runs failed; the table of the others is written first.
    """
    if config.from_json is not None:
        result = json.loads(config.from_json.read_text("utf-8"))
        write_report(result, config.reports)
        return result
    selected = select_rows(config.methods, rows)
    for row in selected:
        config.training(0, config.output_dir, config.overrides(row))  # checks the values
    check_data(config)
    store = AblationStore(config.output_dir, config.identity(), config.resume)
    quiet_loading()
    failures: Failures = {}
    train_all(config, selected, store, failures)
    measure_latencies(config, selected, store, failures)
    result = collect(config, selected, store) | {"failures": failures}
    write_report(result, config.reports)
    if failures:
        raise RuntimeError(
            f"{len(failures)} runs failed, --resume tries them again: "
            + "; ".join(f"{name}: {error}" for name, error in failures.items())
        )
    return result


def train_all(
    config: AblationConfig, rows: Sequence[Row], store: AblationStore, failures: Failures
) -> None:
    """Train every row and seed; rows whose size another decides come after that one."""
    from tqdm import tqdm

    first = [(row, config.overrides(row)) for row in rows if row.same_size_as is None]
    waiting = [row for row in rows if row.same_size_as is not None]
    with tqdm(total=len(rows) * config.seeds, desc="runs", unit="run", smoothing=0) as bar:
        for name in train_rows(config, first, store, failures):
            bar.set_postfix_str(name)
            bar.update()
        sizes = find_sizes(config, waiting, store, failures)
        sized = [
            (row, {**config.overrides(row), **sizes[row.name]})
            for row in waiting
            if row.name in sizes
        ]
        for name in train_rows(config, sized, store, failures):
            bar.set_postfix_str(name)
            bar.update()


def train_rows(
    config: AblationConfig,
    rows: Sequence[tuple[Row, Facts]],
    store: AblationStore,
    failures: Failures,
) -> Iterator[str]:
    """Train rows with their overrides, seed by seed; yield the name of each run as it ends."""
    jobs = []
    for seed in range(config.seeds):
        for row, overrides in rows:
            if store.cell(row.name, seed, overrides) is None:
                jobs.append((config, row.name, seed, overrides))
            else:
                yield f"{row.name}-seed{seed}"
    seeds = sorted({job[2] for job in jobs})
    windows = run_jobs(prepare_windows, [(config, seed) for seed in seeds], config.workers)
    for (_, seed), outcome in windows:
        if isinstance(outcome, Exception):
            raise RuntimeError(f"the windows of seed {seed} could not be made") from outcome
    for (_, name, seed, _), outcome in run_jobs(train_and_measure, jobs, config.workers):
        if isinstance(outcome, Exception):
            failures[f"{name}-seed{seed}"] = repr(outcome)
        else:
            store.add_cell(outcome)
        yield f"{name}-seed{seed}"


def find_sizes(
    config: AblationConfig, rows: Sequence[Row], store: AblationStore, failures: Failures
) -> dict[str, Facts]:
    """Find the sizes of rows that are as large as another's first Dot."""
    targets = {row.name: store.first_cell(row.same_size_as) for row in rows}
    for row in rows:
        if targets[row.name] is None:
            failures[row.name] = f"its size comes from {row.same_size_as}, which failed"
    known = [row for row in rows if targets[row.name] is not None]
    if not known:
        return {}
    dash = open_pipeline(config).dash.model
    widths = default_widths(dash)[: TrainDotConfig.num_down_blocks]
    count = parameter_counter(dash)
    return {
        row.name: match_size(
            count, targets[row.name]["nonzero"], widths, config.lora_rank, row.shrink_lora
        )
        for row in known
    }


def measure_latencies(
    config: AblationConfig, rows: Sequence[Row], store: AblationStore, failures: Failures
) -> None:
    """Time the first Dot of every row that is not timed yet, alone, after all training."""
    from tqdm import tqdm

    saved = [row.name for row in rows if store.first_cell(row.name) is not None]
    todo = [name for name in saved if store.latency(name) is None]
    if PLAIN not in saved:
        return
    with tqdm(total=len(todo), desc="latency", unit="row") as bar:
        for (_, name), outcome in run_jobs(measure_row, [(config, name) for name in todo], 1):
            if isinstance(outcome, Exception):
                failures[f"{name}, latency"] = repr(outcome)
            else:
                store.add_latency(name, outcome)
            bar.update()


def collect(config: AblationConfig, rows: Sequence[Row], store: AblationStore) -> Facts:
    """Put everything that was measured together, ready for JSON."""
    with one_thread():
        place = environment(open_pipeline(config).device)
    settings = {key: value for key, value in config.identity().items() if key != "train_data_dir"}
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command_line(),
        "environment": place,
        "settings": settings,
        "seeds": list(range(config.seeds)),
        "rows": [_row_facts(config, row, store) for row in rows],
    }


def _row_facts(config: AblationConfig, row: Row, store: AblationStore) -> Facts:
    runs = [store.any_cell(row.name, seed) for seed in range(config.seeds)]
    runs = [run for run in runs if run is not None]
    return {
        "name": row.name,
        "method": row.method,
        "description": row.description,
        "controls": list(row.controls),
        "same_size_as": row.same_size_as,
        "figure": row.figure,
        "overrides": runs[0]["overrides"] if runs else config.overrides(row),
        "latency": store.latency(row.name),
        "runs": [{k: v for k, v in run.items() if k not in ("row", "overrides")} for run in runs],
    }
