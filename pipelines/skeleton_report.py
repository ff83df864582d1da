"""The skeleton demonstration's table and picture."""

import io
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from morse.evaluation.report.markdown import pipe_table
from pipelines.skeleton_data import PARENTS, VALID, bone_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = {"solver": "DPM++ 2M", "morse": "Morse", "reuse": "Reuse"}
# Colour, line and marker; Okabe and Ito's palette, told apart by colour-blind readers too.
STYLES = {
    "solver": ("#E69F00", "--", "s"), "morse": ("#D55E00", "-", "o"), "reuse": ("#777777", ":", "v")
}  # fmt: skip
METRICS = {
    "valid": "bones within 5 % of their length, %",
    "bone_error": "mean error of a bone's length, %",
    "energy_distance": "energy distance to held-out poses",
    "rmse": "RMSE to 100 steps, same noise",
}
RIGHT, LEFT = {1, 2, 3, 14, 15, 16}, {4, 5, 6, 11, 12, 13}
TRUNK_COLOR, WRONG = "#333333", "#D40000"
BONE_COLORS = np.array(
    [
        "#0072B2" if joint in RIGHT else "#009E73" if joint in LEFT else TRUNK_COLOR
        for joint in range(1, len(PARENTS))
    ]
)
COLUMNS = 12
WIDTH, HEIGHT = 3.2, 4.1  # of a pose's place


def _value(found: dict[str, object], digits: int) -> str:
    spread = "" if found["std"] is None else f" ± {found['std']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{spread}"


def _cells(row: dict[str, object], name: str, budget: str, plan: str) -> list[str]:
    digits = {"valid": 1, "bone_error": 2, "energy_distance": 4, "rmse": 3}
    values = [_value(row[key], n) if key in row else "" for key, n in digits.items()]
    return [budget, name, plan, *values]


def to_markdown(result: dict[str, object]) -> str:
    """Return the report as Markdown."""
    config, place, speed = result["config"], result["environment"], result["measured"]
    measured = (
        f"{speed['speed_ratio']:.2f} (medians in one run with both: Dash "
        f"{1e3 * speed['dash_seconds'][1]:.0f} ms, Dot {1e3 * speed['dot_seconds'][1]:.0f} ms)"
    )
    given = "that is what plans are made with"
    if config["speed_ratio"] is not None:
        given = f"**plans are made with an assumed N = {config['speed_ratio']:g} all the same**"
    rows = [
        _cells(row, METHODS[row["method"]], str(row["lsd"]), row["plan"] or "bare")
        for row in result["rows"]
    ]
    rows.append(_cells(result["reference"], "DPM++ 2M", "100", "bare"))
    rows.append(_cells(result["floor"], "training poses", "", ""))
    header = ("LSD", "method", "plan", *METRICS.values())
    lines = [
        "# Morse on skeletons: 17 joints, denoised on a grid",
        "",
        f"`{result['command']}`, {place['device']}, torch {place['torch']}, {place['dtype']}; "
        f"{result['seconds'] / 60:.1f} minutes in all."
        + (f" **{config['note']}**" if config["note"] else ""),
        "",
        f"N measured at batch {config['num_poses']}: {measured}; {given}. "
        f"On held-out poses Dot leaves {result['dot_error']:.2f} of the squared error of reusing "
        f"Dash's latest estimate. Dash's loss: {result['dash_loss']:.3f}.",
        "",
        pipe_table(header, rows, "|--:|---|---|" + "--:|" * len(METRICS)),
        "",
        f"{config['num_poses']} samples a method and seed; mean ± standard deviation over "
        f"{config['seeds']} sets of noise, the same for every method. It does not cover the "
        "randomness of training. Dash evaluations (D) cost 1 LSD, Dot's (o) 1/N; Reuse has Morse's "
        f"plan and no Dot. Grid: {config['grid']}, 6 x 6. Real poses have an energy distance above "
        "0 as well, since both sets are finite: the last line. Coordinates are half metres.",
    ]
    return "\n".join(lines) + "\n"


def draw_report(
    result: dict[str, object], samples: dict[tuple[str, int], Tensor], title: str
) -> bytes:
    """Draw poses, a row a method and a column a noise, above the curves against LSD; a PNG.

    Args:
        result: As written to JSON.
        samples: Poses (n, J, 2) of one seed by method and LSD, as the rows shall be.
        title: Above all.
    """
    from matplotlib.figure import Figure

    upper_height = 1.12 * len(samples)
    figure = Figure(figsize=(12, upper_height + 4.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(upper_height, 4))
    _draw_poses(upper, samples)
    _draw_curves(lower, result)
    figure.suptitle(title, fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _draw_poses(figure: "Figure", samples: dict[tuple[str, int], Tensor]) -> None:
    """Draw a table of poses: right limbs blue, left ones green, bones of a wrong length red."""
    from matplotlib.collections import LineCollection

    axes = figure.subplots()
    for row, ((method, lsd), poses) in enumerate(samples.items()):
        shown = poses[:COLUMNS]
        axes.text(-2, -HEIGHT * row, f"{METHODS[method]}\n{lsd} LSD", ha="right", va="center")
        places = np.stack([WIDTH * np.arange(len(shown)), np.full(len(shown), -HEIGHT * row)], 1)
        points = shown.numpy() + places[:, None]
        bones = np.stack([points[:, PARENTS[1:]], points[:, 1:]], 2)  # (n, J - 1, 2 ends, 2)
        wrong = (bone_errors(shown) > VALID).numpy()
        colors = np.where(wrong, WRONG, BONE_COLORS)
        lines = bones.reshape(-1, 2, 2)
        axes.add_collection(LineCollection(lines, colors=colors.ravel(), linewidths=2))
        axes.plot(*points[:, 10].T, "o", color=TRUNK_COLOR, markersize=4.5)
    axes.set(
        xlim=(-2 - WIDTH, WIDTH * COLUMNS), ylim=(-HEIGHT * len(samples) + 1.8, 2.2), aspect="equal"
    )
    axes.set_axis_off()


def _draw_curves(figure: "Figure", result: dict[str, object]) -> None:
    shown = ("valid", "energy_distance", "rmse")
    for axes, metric in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for method, (color, line, marker) in STYLES.items():
            rows = [row for row in result["rows"] if row["method"] == method]
            axes.errorbar(
                [row["cost"] for row in rows],
                [row[metric]["mean"] for row in rows],
                yerr=[row[metric]["std"] or 0 for row in rows],
                color=color, linestyle=line, marker=marker, capsize=2, label=METHODS[method],
            )  # fmt: skip
        for name, line, color in (("reference", "-.", "#0072B2"), ("floor", ":", "#009E73")):
            if metric in result[name] and result[name][metric]["mean"] > 0:
                label = {"reference": "DPM++ 2M, 100 LSD", "floor": "training poses"}[name]
                axes.axhline(result[name][metric]["mean"], linestyle=line, color=color, label=label)
        axes.set(xlabel="cost, LSD (1 = one Dash evaluation)", title=METRICS[metric])
        axes.title.set_fontsize(10)
        if metric != "valid":
            axes.set_yscale("log")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
