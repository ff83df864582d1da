"""Results as older measurements gave them."""

from report_fixtures import AXES


def without_errors(result):
    """The same figures without errors, seeds, memory and pictures, one row from another machine."""
    rows = [
        {
            **{key: value for key, value in row.items() if key != "images_per_second"},
            "peak_memory_mib": None,
            "scores": {
                axis: score
                and {
                    "value": score["value"],
                    "standard_error": None,
                    "interval": None,
                    "by_seed": {},
                }
                for axis, score in row["scores"].items()
            },
        }
        for row in result["rows"]
    ]
    own = {"device": "AMD EPYC, 2 threads", "dtype": "float64"}
    rows = [row | own if row["kind"] == "reuse" else row for row in rows]
    speedups = [entry | {"interval": None} for entry in result["speedups"]]
    kept = {key: value for key, value in result.items() if key != "grid"}
    return kept | {"rows": rows, "speedups": speedups, "lossless": []}


def upgraded(result):
    """A committed result in schema 2; one in schema 1 is converted, its speed-ups left out."""
    if result["schema_version"] == 2:
        return result
    scored = ("frechet", "psnr", "frechet_to_reference")
    rows = [
        row
        | {
            "scores": {
                axis: None
                if row[axis] is None
                else {
                    "value": row[axis],
                    "standard_error": row[f"{axis}_standard_error"],
                    "interval": None,
                    "by_seed": row[f"{axis}_by_seed"],
                }
                for axis in scored
            }
        }
        for row in result["rows"]
    ]
    axes = {axis: AXES[axis] for axis in scored}
    return result | {"schema_version": 2, "axes": axes, "rows": rows, "speedups": []}
