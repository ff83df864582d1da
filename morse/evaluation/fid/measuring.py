"""The measuring half of `morse eval fid`: from images to scores."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from morse.evaluation.environment import command_line, environment
from morse.evaluation.fid.extractors import Extractor
from morse.evaluation.fid.feature_sets import (
    FeatureSet,
    extract_feature_set,
    is_statistics,
    load_feature_set,
    save_statistics,
)
from morse.evaluation.fid.fidelity import fidelity_scores
from morse.evaluation.fid.generation import generated_set
from morse.evaluation.fid.image_metrics import (
    IS_LEAST,
    IS_SPLITS,
    axes,
    clip_score,
    feature_scores,
    inception_splits,
    kernel_subset_size,
)
from morse.evaluation.fid.image_sets import open_image_set
from morse.evaluation.fid.lpips import LPIPS_LEAST, Lpips, load_lpips
from morse.evaluation.progress import progress_bar
from morse.evaluation.prompts import read_prompts
from morse.evaluation.report.scores import Score
from morse.settings import as_json

if TYPE_CHECKING:
    from morse.evaluation.fid.config import FidConfig

SCHEMA_VERSION = 1
NOTHING = (
    "nothing will be measured: give --real for distances, --reference_steps for PSNR, --extractor "
    f"inception for the Inception score of {IS_LEAST} images or more"
)


def check_real(config: "FidConfig", extractor: Extractor | None) -> None:
    """Raise what `measure` would raise about --real, before anything is sampled."""
    if config.real is None:
        return
    if is_statistics(config.real):
        load_feature_set(config.real, extractor, options=config.set_options)
    else:
        open_image_set(config.real, config.set_options)


def check_size(
    config: "FidConfig", extractor: Extractor | None, size: tuple[int, int] | None
) -> None:
    """Raise what `measure` would raise about the size of generated images, before any is sampled.

    Args:
        config: The settings.
        extractor: Tried on blank images; None for none.
        size: Height and width that the pipeline makes; None where that is not known.
    """
    if config.lpips and size is not None and min(size) < LPIPS_LEAST:
        raise ValueError(
            f"lpips is on, but AlexNet takes images of {LPIPS_LEAST}x{LPIPS_LEAST} or more and "
            f"pipeline {config.pipeline!r} makes {size[1]}x{size[0]}; leave out --lpips"
        )
    taken = size if config.resolution is None else (config.resolution,) * 2
    if extractor is None or taken is None:
        return
    try:
        extractor.compute(torch.zeros(2, extractor.channels, *taken, dtype=torch.uint8))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"extractor {extractor.name} cannot take images of {taken[1]}x{taken[0]}, which it "
            f"would get of pipeline {config.pipeline!r} ({error}); give --resolution, or another "
            "--extractor"
        ) from error


def measures_nothing(config: "FidConfig", extractor: Extractor | None) -> bool:
    """Tell whether the rows that are asked for will have no score."""
    if config.real is not None or config.reference_steps is not None:
        return False
    if extractor is None or is_statistics(config.fake or ""):
        return True
    has_classes = extractor.has_logits and config.num_images >= IS_LEAST
    return not (has_classes or (extractor.embed_text is not None and _prompts(config)))


def measure(
    config: "FidConfig",
    extractor: Extractor | None,
    generated: list[dict[str, object]] | None,
    device: torch.device,
) -> dict[str, object]:
    """Measure every row.

    Args:
        config: The settings.
        extractor: What distances are measured in; None for none.
        generated: The rows of `generate_all`; None to measure `config.fake`.
        device: Where to compute distances between all pairs of images.

    Returns:
        The result, ready for JSON.
    """
    real = _real_features(config, extractor)
    rows = []
    if generated is None:
        if config.fake is not None:
            fake = _load(config, config.fake, extractor)
            row = {"label": Path(config.fake).name, "kind": "images", "source": config.fake}
            scores = _scores(config, extractor, real, fake, device, _prompts(config))
            rows.append(_finish(config, row, extractor, real, fake, scores))
    else:
        lpips = load_lpips(config.lpips_weights, device) if config.lpips else None
        rows = [
            _measure_generated(config, extractor, real, row, generated, device, lpips)
            for row in generated
        ]
    found = [axis for row in rows for axis in row["scores"]]
    known = axes(extractor)
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command_line(),
        **environment(device, dtype=config.dtype),
        "settings": as_json(config),
        "extractor": _extractor_facts(extractor, real),
        "real": None if real is None else {"name": real.name, **_reading(real)},
        "axes": {name: asdict(axis) for name, axis in known.items() if name in found},
        "rows": rows,
        "warnings": [] if real is None else [*real.notes, *real.warnings()],
    }


def _real_features(config: "FidConfig", extractor: Extractor | None) -> FeatureSet | None:
    if config.real is None:
        return None
    real = _load(config, config.real, extractor)
    if config.save_stats is not None:
        save_statistics(config.save_stats, real, extractor)
        print(f"wrote {config.save_stats}")
    return real


def _load(config: "FidConfig", source: str, extractor: Extractor) -> FeatureSet:
    with progress_bar(
        f"features of {Path(source).name}", shown=not is_statistics(source)
    ) as on_images:
        return load_feature_set(
            source,
            extractor,
            batch_size=config.batch_size,
            strict=config.strict,
            options=config.set_options,
            on_images=on_images,
        )


def _measure_generated(
    config: "FidConfig",
    extractor: Extractor | None,
    real: FeatureSet | None,
    row: dict[str, object],
    rows: list[dict[str, object]],
    device: torch.device,
    lpips: Lpips | None,
) -> dict[str, object]:
    images, scores, fake = generated_set(Path(row["source"]), config.num_images), {}, None
    if extractor is not None:
        fitted = replace(images, resolution=config.resolution)
        with progress_bar(f"features of {row['label']}", shown=True) as on_images:
            fake = extract_feature_set(fitted, extractor, config.batch_size, True, on_images)
        prompts = _prompts(config, bool(row["made_with"]["class_labels"]))
        scores = _scores(config, extractor, real, fake, device, prompts)
    reference = next((other for other in rows if other["kind"] == "reference"), None)
    if reference is not None and reference is not row:
        references = generated_set(Path(reference["source"]), config.num_images)
        with progress_bar(f"fidelity of {row['label']}", shown=True) as on_images:
            scores |= fidelity_scores(
                images, references, config.batch_size, lpips, device, on_images
            )
    row = {**row, "num_images": config.num_images}
    return _finish(config, row, extractor, real, fake, scores)


def _scores(
    config: "FidConfig",
    extractor: Extractor,
    real: FeatureSet | None,
    fake: FeatureSet,
    device: torch.device,
    prompts: tuple[str, ...],
) -> dict[str, Score]:
    scores = feature_scores(extractor, real, fake, config.kid_subset_size, device)
    if prompts and extractor.embed_text is not None and fake.features is not None:
        if fake.facts["num_unreadable"]:
            raise ValueError(
                f"{fake.name} has unreadable images ({fake.facts['unreadable']}), so it is not "
                "known which prompt belongs to which image; remove them, or leave out the prompts"
            )
        used = prompts[: len(fake.features)]
        text = torch.cat(
            [
                extractor.embed_text(list(used[first : first + config.batch_size])).cpu()
                for first in range(0, len(used), config.batch_size)
            ]
        )
        scores["clip_score"] = clip_score(
            fake.features, text[torch.arange(len(fake.features)) % len(text)]
        )
    return scores


def _prompts(config: "FidConfig", of_classes: bool = False) -> tuple[str, ...]:
    """Give the words that images were asked for by; numbers of classes are none.

    Args:
        config: The settings.
        of_classes: Whether a class-conditional pipeline made the images, where also a number among
            names is that of a class.
    """
    names, some = config.class_names, any if of_classes else all
    return read_prompts(config.prompts) or (() if some(map(str.isdecimal, names)) else names)


def _finish(
    config: "FidConfig",
    row: dict[str, object],
    extractor: Extractor | None,
    real: FeatureSet | None,
    fake: FeatureSet | None,
    scores: dict[str, Score],
) -> dict[str, object]:
    """Add to a row what was measured and what to keep in mind."""
    side = {} if fake is None else _reading(fake)
    if "kernel_distance" in scores:  # of so few images it may be less than asked for
        smallest = min(real.num_images, fake.num_images)
        side["kid_subset_size"] = kernel_subset_size(smallest, config.kid_subset_size)
    notes = [*row.get("notes", []), *([] if fake is None else fake.notes)]
    if None not in (real, fake):
        notes += fake.warnings()  # of distances between the two
    if fake is not None and fake.logits is not None:
        notes += _splits_notes(extractor, len(fake.logits))
    sizes = [set(each.facts.get("sizes", ())) for each in (real, fake) if each is not None]
    if len(sizes) == 2 and all(sizes) and sizes[0] != sizes[1]:
        notes.append(
            "real images have other sizes than these, and resizing tells them apart; --resolution "
            "brings all to one size"
        )
    told = {
        axis: {"value": score.value, "standard_error": score.standard_error}
        for axis, score in scores.items()
    }
    return {**row, **side, "scores": told, "notes": notes}


def _splits_notes(extractor: Extractor, num_images: int) -> list[str]:
    """Say what is otherwise with the Inception score of so few images than with published ones."""
    splits, title = inception_splits(num_images), extractor.titles["inception_score"]
    if splits == 0:
        return [f"{title} takes {IS_LEAST} images or more, so it was not measured of {num_images}"]
    if splits == IS_SPLITS:
        return []
    return [
        f"{title} of {num_images} images is over {splits} of the usual {IS_SPLITS} splits; few "
        "images make it too low"
    ]


def _reading(features: FeatureSet) -> dict[str, object]:
    return {"num_images": features.num_images, "reading": features.facts}


def _extractor_facts(
    extractor: Extractor | None, real: FeatureSet | None
) -> dict[str, object] | None:
    if extractor is None:
        return None
    facts = {**extractor.identity(), "words": extractor.words}
    return facts if real is None else {**facts, "feature_dim": len(real.mean)}
