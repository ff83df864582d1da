"""The rows of the ablation: what each changes about a plain Dot, and what it is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

PLAIN = "plain"
# Over single pairs, or over the steps that follow a Dash evaluation.
Figure = Literal["residual_ratio", "sequence_ratio"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of Dot.

    Attributes:
        name: Of the row.
        method: Of which it is a row or a control.
        description: In one line.
        overrides: Of `TrainDotConfig`.
        derived: Further ones: of `TrainDotConfig` -> which attribute of `AblationConfig` they have.
        controls: Rows that differ from it in nothing but what the method claims.
        same_size_as: The row whose own parameters other than zero it has as many of, as nearly as
            widths allow; its sizes are found when that row is trained.
        figure: What it is compared by, of what is measured of every Dot.
        shrink_lora: Whether these sizes include the LoRA's rank, and not only the blocks' widths.
    """

    name: str
    method: str
    description: str
    overrides: Mapping[str, object] = field(default_factory=dict)
    derived: Mapping[str, str] = field(default_factory=dict)
    controls: tuple[str, ...] = (PLAIN,)
    same_size_as: str | None = None
    shrink_lora: bool = False
    figure: Figure = "residual_ratio"

    @property
    def needs(self) -> tuple[str, ...]:
        """Name the rows that this one is compared with or sized by."""
        sized = () if self.same_size_as is None else (self.same_size_as,)
        return (PLAIN, *self.controls, *sized)


def _conv(name: str, method: str, description: str, conv: str, *options: str) -> Row:
    overrides: dict[str, object] = {"conv": conv}
    if options:
        overrides["conv_options"] = options
    return Row(name=name, method=method, description=description, overrides=overrides)


def _distilled(
    name: str, method: str, description: str, term: str, controls: tuple[str, ...] = (PLAIN,)
) -> Row:
    return Row(
        name=name,
        method=method,
        description=description,
        overrides={"distill": (term,)},
        controls=controls,
    )


def _pruned(percent: int) -> tuple[Row, ...]:
    """A pruned Dot, with one pruned at once and a dense one of as many parameters."""
    name, share = f"prune-{percent}", percent / 100
    once, dense = f"{name}-one-shot", f"{name}-dense"
    return (
        Row(
            name=name,
            method="prune",
            description=f"network surgery, {percent} % of each weight matrix of Dot's own",
            overrides={"prune": share},
            controls=(once, dense),
        ),
        Row(
            name=once,
            method="prune",
            description="as many weights, the smallest, pruned once by magnitude",
            overrides={"prune": share, "prune_method": "one_shot"},
        ),
        Row(
            name=dense,
            method="prune",
            description="a plain Dot with narrower blocks and less LoRA, of its size",
            same_size_as=name,
            shrink_lora=True,
        ),
    )


ROWS = (
    Row(name=PLAIN, method=PLAIN, description="a Dot without any of the methods"),
    _conv(
        "odconv-features", "odconv", "ODConv on what goes in", "odconv", "condition=features"
    ),
    _conv("odconv-time", "odconv", "ODConv on the times t_i and t_s", "odconv", "condition=time"),
    Row(
        name="kernel-warehouse-half",
        method="kernel_warehouse",
        description="KernelWarehouse, budget 1/2",
        overrides={"conv": "kernel_warehouse", "conv_options": ("budget=1/2",)},
        controls=("kernel-warehouse-half-plain",),
    ),
    Row(
        name="kernel-warehouse-half-plain",
        method="kernel_warehouse",
        description="a plain Dot with blocks of other widths, of its size",
        same_size_as="kernel-warehouse-half",
    ),
    _conv(
        "kernel-warehouse-one", "kernel_warehouse", "KernelWarehouse, budget 1",
        "kernel_warehouse", "budget=1",
    ),
    _conv("gridconv", "gridconv", "grid convolutions with their attention", "gridconv"),
    Row(
        name="dnr",
        method="dnr",
        description="Dynamic Normalization and Relay, on all steps of each window in order; "
        "compared by the sequence ratio",
        overrides={"norm": "dnr", "pairs_per_window": 1},
        controls=("dnr-plain",),
        figure="sequence_ratio",
    ),
    Row(
        name="dnr-plain",
        method="dnr",
        description="a plain Dot on as many pairs of the same windows, drawn at random",
        derived={"pairs_per_window": "window_steps"},
    ),
    Row(
        name="ske2grid",
        method="ske2grid",
        description="blocks that learn to interpolate where they double the resolution",
        overrides={"resample": "ske2grid"},
    ),
    Row(
        name="ske2grid-progressive",
        method="ske2grid",
        description="the same, with one pair of blocks for half of the updates, then grown",
        overrides={"resample": "ske2grid"},
        derived={"progressive_steps": "half_the_steps"},
        controls=("ske2grid",),
    ),
    Row(
        name="narrow",
        method="narrow",
        description="a plain Dot with blocks half as wide",
        overrides={"block_out_channels": (8, 16)},
    ),
    *_pruned(50),
    *_pruned(80),
    _distilled(
        "norm", "norm", "NORM on the trunk feature", "norm",
        ("norm-transform-only", "feature-mse"),
    ),
    _distilled(
        "norm-transform-only", "norm", "NORM's transform without its loss", "norm_transform_only"
    ),
    _distilled(
        "af-dcd", "af_dcd", "Af-DCD on the output of the last block", "af_dcd", ("feature-mse",)
    ),
    _distilled(
        "af-dcd-feature", "af_dcd", "its squared error without the contrast", "af_dcd_feature"
    ),
    _distilled(
        "scale-kd", "scale_kd", "ScaleKD on the middle and the trunk feature", "scale_kd",
        ("feature-mse",),
    ),
    _distilled("feature-mse", "feature_mse", "the trunk feature's squared error", "feature_mse"),
)  # fmt: skip


def select_rows(names: Sequence[str], rows: Sequence[Row] = ROWS) -> list[Row]:
    """Return the named rows, and what they are compared with, in the table's order.

    Args:
        names: Rows, methods (all rows of each), or "all".
        rows: The table.

    Raises:
        ValueError: If no row or method has a name.
    """
    by_name = {row.name: row for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    unknown = [name for name in names if name not in {"all", *by_name, *methods}]
    if unknown:
        raise ValueError(
            f"methods has {unknown}; choose all, of the methods {methods}, or of the rows "
            f"{sorted(by_name.keys() - set(methods))}"
        )
    chosen = {row.name for row in rows if {"all", row.name, row.method} & set(names)}
    waiting = [*chosen, PLAIN]
    while waiting:
        row = by_name[waiting.pop()]
        chosen.add(row.name)
        waiting += [name for name in row.needs if name not in chosen]
    return [row for row in rows if row.name in chosen]
