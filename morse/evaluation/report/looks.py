"""Colours, lines and markers that tell a plot's curves apart."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from morse.evaluation.report.plots import Curve, Panel

# One colour a solver and kind: Okabe and Ito's palette but for its yellow, which white paper hides,
# and darker ones for the rarer solvers. Colour-blind readers tell them apart too.
COLORS = {
    ("ddim", "baseline"): "#56B4E9",
    ("ddim", "morse"): "#0072B2",
    ("dpmsolver++", "baseline"): "#E69F00",
    ("dpmsolver++", "morse"): "#D55E00",
    ("leapfrog", "baseline"): "#CC79A7",
    ("leapfrog", "morse"): "#009E73",
    ("leapfrog-dense", "baseline"): "#882255",
    ("dpmsolver++1", "baseline"): "#000000",
    ("unipc", "baseline"): "#332288",
    ("deis", "baseline"): "#0B5E2B",
    ("pndm", "baseline"): "#663300",
    ("heun", "baseline"): "#777777",
}
DOTS, DASH_DOTS = (0, (1, 3)), (0, (5, 1, 1, 1))
# Line and marker of each kind; a kind without a colour of its own has its solver's.
KINDS = {
    "baseline": ("--", "s"),
    "morse": ("-", "o"),
    "reuse": (":", "v"),
    "extrapolation": (":", "^"),
    "independent": ("-.", "X"),
    "shrunk": ("-.", "D"),
    "mixture": ("--", "d"),
    "pfdiff": (DASH_DOTS, "P"),
    "ays": (DASH_DOTS, "p"),
    "deepcache": (DOTS, "*"),
    "tomesd": (DOTS, "h"),
    "fbcache": (DOTS, "<"),
    "pab": (DOTS, ">"),
    "fastercache": (DOTS, "8"),
    "taylorseer": (DOTS, "v"),
    "cache-dit": (DOTS, "^"),
}
OTHER = (DOTS, "H")
SOLVER_MARKERS = {"dpmsolver++1": "p", "unipc": "^", "deis": "<", "pndm": ">", "heun": "H"}
# What tells curves apart that are alike in solver and kind (ratios): fills, then other markers.
FILLS = ("full", "none", "left", "right")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "8", "d", "H")


class Look(NamedTuple):
    """What tells a curve from others."""

    color: str
    line: str | tuple[int, tuple[int, ...]]
    marker: str
    fill: str


def find_looks(panels: Sequence["Panel"]) -> dict[str, Look]:
    """Return each curve's look by its label: the same in every panel, and no two alike."""
    looks: dict[str, Look] = {}
    for curve in (curve for panel in panels for curve in panel.curves):
        if curve.label not in looks:
            free = (look for look in _possible_looks(curve) if look not in looks.values())
            looks[curve.label] = next(free, next(_possible_looks(curve)))
    return looks


def _possible_looks(curve: "Curve") -> Iterator[Look]:
    """Yield how curves of a solver and kind may look, the usual first."""
    color = COLORS.get((curve.solver, "baseline"), "#777777")
    color = COLORS.get((curve.solver, curve.kind), color)
    line, marker = KINDS.get(curve.kind, OTHER)
    if curve.kind == "baseline":
        marker = SOLVER_MARKERS.get(curve.solver, marker)
    for shape, fill in product(dict.fromkeys((marker, *MARKERS)), FILLS):
        yield Look(color, line, shape, fill)
