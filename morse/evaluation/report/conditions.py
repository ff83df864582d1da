"""What everything in a report was measured with."""

from collections.abc import Iterable

from morse.evaluation.report.blocks import Section
from morse.evaluation.report.data import (
    Measured,
    Result,
    guidance_parts,
    is_paired,
    num_paired,
    read_axes,
    read_score,
    used_seeds,
)
from morse.evaluation.report.scores import Axis

MAX_PROMPTS = 12  # that the report writes out
FEW_IMAGES = 1000  # below, the report says that Fréchet distances are biased
FEW_REPLICATES = 1000  # below, it says that the bootstrap is small
# Ends of the names that `environment.device_name` gives to a CPU or an Apple GPU.
WITHOUT_CUDA = (" thread", " threads", "(MPS)")


def conditions_section(result: Result) -> Section:
    """What everything was measured with, in a paragraph."""
    settings = result["settings"]
    parts = [f"{result['device']}, {result['dtype']}."]
    if result["rows"]:
        parts += _numbers_words(result)
        parts += _bootstrap_words(settings)
        parts += _memory_words(result)
    parts += _seeds_words(result)
    parts.append(_speed_words(result))
    for title, key in (("Reference", "reference"), ("Real images", "real_images")):
        if result["rows"] and result.get(key):
            parts.append(f"{title}: {result[key]}.")
    parts.append(_features_words(result) if result["rows"] else "")
    parts += [_versions_words(result), *_models_words(result)]
    words = "1 LSD is the time of one evaluation of Dash; one of Dot costs 1/N."
    if result["rows"]:
        words += " r is a plan's ratio, evaluations per LSD."
    if any(_has_error(row, axis) for row in result["rows"] for axis in read_axes(result)):
        words += " ± is the bootstrap's standard error over images"
        words += ", of Fréchet distances up to twice the real one." if _frechet(result) else "."
    if result["rows"] and not is_paired(result):
        words += (
            " Measured by an earlier version: whether a difference is noise is told from both "
            "errors alone, at equal budgets, and a solver's curve has a mean where it got worse."
        )
    texts = (" ".join(filter(None, parts)), words, *_guidance_words(result))
    return Section("Conditions", texts, code=result["command"])


def _numbers_words(result: Result) -> list[str]:
    """Say how many images there are, and how many of them are compared with the reference's."""
    settings, seeds, paired = result["settings"], used_seeds(result), num_paired(result)
    number, batch = settings["num_images"], settings.get("batch_size")
    each = f" from each of {len(seeds)} seeds ({join(seeds)})" if len(seeds) > 1 else ""
    size = f", batch {min(batch, number)}" if batch else ""
    words = [f"{number:,} images of each method and budget{each}{size}."]
    if paired < number:
        of = "each seed's" if each else "them"
        words.append(
            f"PSNR, SSIM and distances to the reference are of the first {paired:,} of {of}."
        )
    if _frechet(result) and paired < FEW_IMAGES:
        words.append("Fréchet distances of so few are biased upwards, those of all alike.")
    if _frechet(result) and each:
        words.append("A Fréchet distance is the mean of the seeds', with the bias of one seed's.")
    return words


def _frechet(result: Result) -> bool:
    """Tell whether Fréchet distances are among what was measured."""
    return any(axis.is_distance("frechet") for axis in read_axes(result))


def _features_words(result: Result) -> str:
    """Say what gives the features that sets of images are compared in; "" where nothing does."""
    digest = str(result.get("features_sha256", ""))[:12]
    if result.get("features_test_accuracy"):
        return (
            f"The features' classifier is right on {100 * result['features_test_accuracy']:.1f} % "
            f"of the test images (sha256 {digest})."
        )
    about = result.get("extractor")
    if not about:
        return ""
    return (
        f"Sets of images are compared in {about['words']}, {about['feature_dim']:,} numbers an "
        f"image (sha256 {digest}; resize: {about['resize']})."
    )


def _seeds_words(result: Result) -> list[str]:
    """Name the seeds that are in no figure, as not all that was asked for was measured from them.

    The JSON has them for the whole result, or for each guidance scale.
    """
    words = {}
    for part in (result, *result.get("guidance", ())):
        scale = part.get("guidance_scale")
        at = "" if scale is None else f" at guidance {scale:g}"
        for entry in part.get("seeds_left_out", ()):
            count = entry["missing"]
            are = "are" if count > 1 else "is"
            said = f"Seed {entry['seed']} is left out{at}: {count} of its cells {are} missing."
            words[said] = None
    return list(words)


def _speed_words(result: Result) -> str:
    found = []
    for part in guidance_parts(result):
        scale, speed = part["guidance_scale"], part["speed_ratio"]
        at = "" if scale is None else f" at guidance {scale:g}"
        found += [f"N = {speed['speed_ratio']:.2f}{at} ({speed['how']})."] * bool(speed)
    return " ".join(found)


def _guidance_words(result: Result) -> list[str]:
    """Say what images were asked for and what an LSD is with guidance; [] without it."""
    if not result.get("guidance"):
        return []
    settings = result["settings"]
    asked = [str(text) for text in settings.get("prompts") or settings.get("class_names") or ()]
    scales = join(f"{entry['guidance_scale']:g}" for entry in result["guidance"])
    first = f"{result.get('pipeline_class', 'A guided pipeline')} at guidance {scales}."
    if asked:
        some = "; ".join(asked[:MAX_PROMPTS]) + "; ..." * (len(asked) > MAX_PROMPTS)
        first += f" Image i is of prompt or class i modulo {len(asked)}: {some}."
    return [
        f"{first} The reference has the same guidance.",
        "An LSD is one evaluation step of Dash at the guidance of its section. Where guidance is "
        "above 1, a step evaluates the branches with and without the prompt in one batch, and both "
        "together are 1 LSD. Wall times are end to end: text encoder, denoiser, decoder.",
    ]


def _has_error(row: Measured, axis: Axis) -> bool:
    score = read_score(row, axis)
    return score is not None and score.standard_error is not None


def _bootstrap_words(settings: Measured) -> list[str]:
    """Warn of a bootstrap that is too small for the ends of intervals; [] for a usual one."""
    number = settings.get("num_replicates")
    if number is None or number >= FEW_REPLICATES:
        return []
    if number < 2:
        return [
            "There was no bootstrap, so nothing has an interval, and what is noise is not known."
        ]
    return [
        f"The bootstrap has {number:,} replicates, fewer than {FEW_REPLICATES:,}: the ends of its "
        "intervals, and what is sure, vary from one bootstrap to the next."
    ]


def _memory_words(result: Result) -> list[str]:
    """Say why there is no peak memory; [] on CUDA, whose name no CPU or Apple GPU has."""
    is_measured = any(row.get("peak_memory_mib") is not None for row in result["rows"])
    if is_measured or not result["device"].endswith(WITHOUT_CUDA):
        return []
    return ["No peak memory: it is measured on CUDA devices only."]


def _versions_words(result: Result) -> str:
    """Name the versions, those of packages that are no dependencies last."""
    names = ("torch", "diffusers", "morse-diffusion", "python")
    versions = {name: result[name] for name in names if name in result}
    versions |= result.get("packages") or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def _models_words(result: Result) -> list[str]:
    """Say which Dash and Dots were measured; [] for an earlier version's result."""
    models = result.get("models")
    if not models:
        return []
    dash = models["dash"]
    words = f"Dash: {dash['class']} of {dash['parameters']:,} parameters (structure "
    words += f"{dash['structure']}); Dot: sha256 {models['dot_sha256'][:12]}"
    if "independent_dot_sha256" in models:
        words += f"; independent Dot: sha256 {models['independent_dot_sha256'][:12]}"
    return [f"{words}."]


def join(values: Iterable[object]) -> str:
    """Return such as "0, 10, 20"."""
    return ", ".join(str(value) for value in values)
