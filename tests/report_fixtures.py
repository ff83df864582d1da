"""Synthetic results of the benchmark, from formulas, in the JSON's schemas 2 and 4."""

import base64
import io
import math

from PIL import Image

BUDGETS = (5, 8, 12, 20, 30)
BARE_BUDGETS = (3, 4, 6, 10, 15, 50, 100)
AXES = {
    "frechet": {
        "title": "Fréchet distance (Fashion-MNIST classifier features) to real images",
        "unit": "",
        "better": "lower",
        "side": "distribution",
    },
    "frechet_to_reference": {
        "title": "Fréchet distance (Fashion-MNIST classifier features) to the reference's images",
        "unit": "",
        "better": "lower",
        "side": "distribution",
    },
    "psnr": {
        "title": "Same-noise PSNR to the reference",
        "unit": "dB",
        "better": "higher",
        "side": "fidelity",
    },
    "ssim": {
        "title": "Same-noise SSIM to the reference",
        "unit": "",
        "better": "higher",
        "side": "fidelity",
    },
}
# label -> solver, kind, setting, how many LSD of DDIM one of its LSD is worth at 5 and at 30
METHODS = {
    "DDIM": ("ddim", "baseline", "", 1.0, 1.0),
    "DPM++ 2M": ("dpmsolver++", "baseline", "", 1.5, 1.7),
    "Morse-DDIM r2": ("ddim", "morse", "", 1.9, 0.9),
    "Morse-DPM++ 2M r1.75": ("dpmsolver++", "morse", "", 2.4, 1.69),
    "Reuse-DPM++ 2M r1.75": ("dpmsolver++", "reuse", "", 1.0, 0.8),
    "DeepCache-DDIM interval 3": ("ddim", "deepcache", "interval 3", 1.2, 1.1),
}
REFERENCE = ("DPM++ 2M", 100)
N = 6.0
NOTES = {
    "measured": "",
    "saturated": "better than the baseline at its largest budget",
    "out of range": "worse than the baseline at its smallest budget",
}


def bare_result(**changes):
    """A result without rows, as `morse bench --latency_only` writes it."""
    return {
        "schema_version": 2,
        "command": "morse bench --num_images 2000 --seeds 0 10000 20000",
        "device": "NVIDIA H100 80GB HBM3",
        "dtype": "float32",
        "torch": "2.13.0",
        "diffusers": "0.42.1",
        "morse-diffusion": "0.1.0",
        "python": "3.12.3",
        "speed_ratio": {"speed_ratio": N, "how": "Dash and Dot in turn, warm, 15 times each"},
        "speed_ratios": [
            {
                "batch_size": 16,
                "merged": True,
                "mode": mode,
                "speed_ratio": n,
                "dash_seconds": [0.010, 0.0101, 0.0103],
                "dot_seconds": [0.0019, 0.002, 0.0021],
            }
            for mode, n in (("eager", 5.05), ("compiled", 6.5))
        ],
        "metric": "Fréchet distance (Fashion-MNIST classifier features)",
        "features_sha256": "5e05cba11e6e66ee",
        "features_test_accuracy": 0.9205,
        "real_images": "Fashion-MNIST, 60,000 training images",
        "reference": "DPM++ 2M, 100 steps, the same noise",
        "settings": {"num_images": 2000, "batch_size": 250, "seeds": [0, 10000, 20000]},
        "not_measured": [],
        "axes": AXES,
        "rows": [],
        "baseline_curves": {},
        "speedups": [],
        "lossless": [],
    } | changes


def full_result():
    """Two solvers, Morse, reuse, a peer, one that did not engage, 3 seeds, intervals, pictures."""
    rows = [
        _row(label, budget)
        for label, (_, kind, *_) in METHODS.items()
        for budget in (*BUDGETS, *(BARE_BUDGETS if kind == "baseline" else ()))
    ]
    idle = _row("DeepCache-DDIM interval 3", 5) | {"label": "TeaCache-DDIM threshold 0.1"}
    idle |= {"setting": "threshold 0.1", "engaged": False, "note": "no step was skipped"}
    return bare_result(
        rows=[*rows, idle],
        not_measured=["DDIM, 200 LSD", "DDIM, 400 LSD"],
        speedups=_speedups(),
        lossless=[
            {
                "method": "Morse-DPM++ 2M r1.75",
                "axis": "psnr",
                "budget": budget,
                "factor": factor,
                "difference": -0.2,
                "upper_bound": -0.1,
                "delta": 0.05,
                "lossless": budget * factor < 25,
            }
            for budget in BUDGETS
            for factor in (1.25, 1.5, 2.0)
        ],
        grid={
            "seeds": list(range(8)),
            "rows": [
                {"label": f"{label}, 8 LSD", "png_base64": strip_base64(shade)}
                for shade, label in enumerate(METHODS)
            ],
        },
    )


def paired_result():
    """The same in schema 4: gains on pairs, sure speed-ups, and the spread of batches' times."""
    result = full_result()
    for row in result["rows"]:
        bare = row["kind"] == "baseline"
        gains = {"frechet": [0.1, 0.3], "psnr": [-0.1, 0.2], "ssim": [-0.2, -0.1]}
        row |= {
            "guidance_scale": None,
            "batch_seconds": None if bare else [0.25 * row["budget"] * k for k in (0.9, 1.0, 1.2)],
            "against_best": {}
            if bare
            else {axis: {"gain": sum(ends) / 2, "interval": ends} for axis, ends in gains.items()},
        }
    for entry in result["speedups"]:
        entry |= {"guidance_scale": None, "cheaper": 1.0 if entry["budget"] == 5 else 0.5}
    return result | {"schema_version": 4}


def strip_base64(shade):
    """A PNG of 8 images of 32 pixels next to each other, in base64."""
    image = Image.linear_gradient("L").resize((8 * 32, 32)).point(lambda v: (v + 40 * shade) % 256)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def worth(label, budget):
    """How many DDIM steps a method's budget is worth."""
    *_, early, late = METHODS[label]
    share = min(max(math.log(budget / 5) / math.log(6), 0), 1)
    return budget * early ** (1 - share) * late**share


def _row(label, budget):
    solver, kind, setting, *_ = METHODS[label]
    steps = worth(label, budget)
    values = {
        "frechet": (0.4 + 120 / steps**2, 0.04 + 0.3 / steps),
        "frechet_to_reference": (150 / steps**2.2, 0.4 / steps),
        "psnr": (10 + 18 * math.log10(steps), 0.08),
        "ssim": (1 - 0.6 / steps, 0.003),
    }
    if (label, budget) == REFERENCE:
        values["psnr"] = values["ssim"] = values["frechet_to_reference"] = None
    bare = kind == "baseline"
    return {
        "label": label,
        "solver": solver,
        "kind": kind,
        "ratio": 1.0 if bare else 1.75,
        "setting": setting,
        "budget": budget,
        "lsd": float(budget) if bare else budget - 0.25,
        "num_dash": budget if bare else budget - 1,
        "num_dot": 0 if bare else 4,
        "plan": "" if bare else "DoDoD",
        "fallbacks": {},
        "engaged": True,
        "note": "",
        "seconds": budget * (0.8 if bare else 0.9),
        "images_per_second": 2000 / (budget * (0.8 if bare else 0.9)),
        "peak_memory_mib": 1234.5 + budget,
        "scores": {axis: score and _score(*score) for axis, score in values.items()},
    }


def _score(value, error):
    return {
        "value": value,
        "standard_error": error,
        "interval": [value - 2 * error, value + 2 * error],
        "by_seed": {str(seed): value + step * error for step, seed in ((-1, 0), (0, 1), (1, 2))},
    }


def _speedups():
    """Morse over the best training-free solver and over DDIM; the last budgets have no factor."""
    entries = []
    for method in ("Morse-DDIM r2", "Morse-DPM++ 2M r1.75"):
        for axis in AXES:
            for cost in ("lsd", "seconds"):
                for baseline, rival in (
                    ("best training-free solver", "DPM++ 2M"),
                    ("DDIM", "DDIM"),
                ):
                    for budget in BUDGETS:
                        value = worth(method, budget) / worth(rival, budget)
                        value *= 0.9 if cost == "seconds" else 1.0
                        status = {20: "saturated", 30: "out of range"}.get(budget, "measured")
                        known = status == "measured"
                        entries.append(
                            {
                                "method": method,
                                "baseline": baseline,
                                "axis": axis,
                                "cost": cost,
                                "budget": budget,
                                "spent": budget - 0.25,
                                "status": status,
                                "value": value if known else None,
                                "interval": [value - 0.03, value + 0.04] if known else None,
                                "note": NOTES[status],
                            }
                        )
    return entries
