"""Fits a mixture of Gaussians to what a pipeline draws, for the beginning of its runs."""

from typing import TYPE_CHECKING

from morse.dot.mixture import NUM_COMPONENTS, GaussianMixture
from morse.evaluation.bench.runs import sample_images
from morse.evaluation.conditions import Conditions

if TYPE_CHECKING:
    from morse.pipeline import MorsePipeline

_STEPS = 20  # enough for mean and covariance


def check_mixture(pipe: "MorsePipeline", count: int) -> None:
    """Refuse what no mixture can be fitted for.

    Raises:
        ValueError: If the pipeline has no Dot or works on latents, or there are too few samples.
    """
    if pipe.dot is None:
        raise ValueError(
            f"mixture_images is {count}, but the pipeline has no Dot to save the mixture with; "
            "give one with --dot, or leave mixture_images out."
        )
    if getattr(pipe, "vae", None) is not None or getattr(pipe, "vqvae", None) is not None:
        raise ValueError(
            f"mixture_images is {count}, but {type(pipe).__name__} works on latents, for which the "
            "mixture is of no use (eval/results/NOTES.md); leave it out."
        )
    if count < 2 * NUM_COMPONENTS:
        raise ValueError(
            f"mixture_images is {count}, but must be 0 or at least {2 * NUM_COMPONENTS}, better "
            "1024."
        )


def fit_mixture(
    pipe: "MorsePipeline", seeds: range, batch_size: int, conditions: Conditions
) -> GaussianMixture:
    """Sample one image a seed with the bare pipeline, and fit a mixture to them."""
    images = sample_images(pipe, _STEPS, seeds, batch_size, conditions=conditions).images
    return GaussianMixture.fit(images * 2 - 1)
