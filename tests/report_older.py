"""Results as older measurements gave them."""


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
