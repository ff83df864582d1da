"""A mixture of Gaussians in the data's place: its exact denoiser needs no network.

At high noise a denoiser hardly knows more of the data than mean and covariance, so that the first
part of a run can be had for next to nothing ("analytical teleportation": Wang and Vastola 2024,
arXiv 2412.09726). A few Gaussians, each with its main directions and one variance for all others,
go further down than one does.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from morse.spaces import Rates

NUM_COMPONENTS, RANK = 10, 8  # enough for small images; see eval/results/NOTES.md
_ROUNDS = 25  # of k-means
_LEAST_VARIANCE = 1e-4


class GaussianMixture(nn.Module):
    """Knows E[x_0 | x_t] in closed form for x_0 from a mixture of Gaussians.

    Component k has the covariance directions_k^T diag(variances_k) directions_k, and rest_k in
    every other direction (probabilistic PCA; Tipping and Bishop 1999). Computes in float32, on CUDA
    in float64.

    Args:
        num_components: K.
        rank: Main directions of each, R.
        sample_shape: Of one sample, (C, ...).
    """

    def __init__(self, num_components: int, rank: int, sample_shape: Sequence[int]) -> None:
        """Make an empty mixture; `fit` makes one of samples."""
        super().__init__()
        for name, value in {"num_components": num_components, "rank": rank}.items():
            if value < 1:
                raise ValueError(f"mixture has {name} = {value!r}, but it must be 1 or more.")
        self.sample_shape = tuple(sample_shape)
        self.register_buffer("weights", torch.full((num_components,), 1 / num_components))
        self.register_buffer("means", torch.zeros(num_components, *self.sample_shape))
        self.register_buffer("directions", torch.zeros(num_components, rank, *self.sample_shape))
        self.register_buffer("variances", torch.ones(num_components, rank))
        self.register_buffer("rest", torch.ones(num_components))

    @classmethod
    def fit(
        cls,
        samples: Tensor,
        num_components: int = NUM_COMPONENTS,
        rank: int = RANK,
        seed: int = 0,
    ) -> Self:
        """Cluster samples by k-means and fit a Gaussian to each cluster.

        Args:
            samples: x_0, (N, C, ...), as the pipeline's denoiser has them: images in [-1, 1] where
                it works on pixels.
            num_components: Clusters; those with fewer than two samples are left out.
            rank: Main directions of each.
            seed: Of the clusters' first centres, which are some of the samples.

        Raises:
            ValueError: If there are fewer than two samples for each component, or not finite ones.
        """
        if len(samples) < 2 * num_components or not bool(samples.isfinite().all()):
            raise ValueError(
                f"samples are {len(samples)} for num_components = {num_components}, but there must "
                "be two or more for each, all of them finite."
            )
        flat = samples.detach().flatten(1).double().cpu()
        nearest = _cluster(flat, num_components, seed)
        clusters = [flat[nearest == k] for k in range(num_components)]
        clusters = [cluster for cluster in clusters if len(cluster) > 1]
        mixture = cls(len(clusters), rank, samples.shape[1:])
        for k, cluster in enumerate(clusters):
            mean, directions, variances, rest = _main_directions(cluster, rank)
            mixture.weights[k] = len(cluster) / sum(map(len, clusters))
            mixture.means[k] = mean.reshape(mixture.sample_shape)
            mixture.directions[k] = directions.reshape(rank, *mixture.sample_shape)
            mixture.variances[k], mixture.rest[k] = variances, rest
        return mixture

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # As vectors: torch refuses channels_last for `directions`, of five dimensions for images.
        return super()._apply(lambda each: function(each.flatten()).reshape(each.shape), recurse)

    def to_config(self) -> dict[str, object]:
        """Give the arguments of an empty mixture of this size."""
        count, rank = self.variances.shape
        return {
            "num_components": count,
            "rank": rank,
            "sample_shape": list(self.sample_shape),
        }

    def forward(self, sample: Tensor, rates: Rates) -> Tensor:
        """Give E[x_0 | x_t].

        Args:
            sample: x_t = alpha x_0 + sigma epsilon, (B, *sample_shape).
            rates: alpha and sigma, which broadcast to it, one of each an image or for all.

        Returns:
            Like `sample`.
        """
        noisy = sample.flatten(1).to(_precision(sample.device))
        alpha, sigma = (rate.to(noisy).reshape(-1, 1) for rate in rates)  # (B, 1) or (1, 1)
        # Model offloading brings a whole Dot to where it runs, but only when Dot itself is called.
        means = self.means.to(noisy).flatten(1)  # (K, D)
        directions = self.directions.to(noisy).flatten(2)  # (K, R, D)
        rest, variances, weights = (
            each.to(noisy) for each in (self.rest, self.variances, self.weights)
        )
        size = noisy.shape[1]

        # All by projections: differences to every mean would take (B, K, D) numbers.
        own = torch.einsum("krd,kd->kr", directions, means)
        along = torch.einsum("bd,krd->bkr", noisy, directions) - alpha[..., None] * own
        distance = noisy.square().sum(1, keepdim=True) - 2 * alpha * (noisy @ means.T)
        distance = distance + alpha**2 * means.square().sum(1)  # (B, K)
        across = (distance - along.square().sum(2)).clamp(min=0)
        noisy_rest = alpha**2 * rest + sigma**2
        noisy_variances = alpha[..., None] ** 2 * variances + sigma[..., None] ** 2
        likelihood = (along.square() / noisy_variances + noisy_variances.log()).sum(2)
        others = size - variances.shape[1]
        likelihood = likelihood + across / noisy_rest + others * noisy_rest.log()
        shares = (weights.log() - likelihood / 2).softmax(1)  # (B, K)

        # Each component's Wiener filter, summed by share.
        gain = alpha * rest / noisy_rest  # (B, K)
        further = alpha[..., None] * variances / noisy_variances - gain[..., None]
        clean = (shares * gain).sum(1, keepdim=True) * noisy
        clean = clean + (shares * (1 - alpha * gain)) @ means
        clean = clean + torch.einsum("bkr,krd->bd", shares[..., None] * further * along, directions)
        return clean.reshape(sample.shape).to(sample.dtype)


def _precision(device: torch.device) -> torch.dtype:
    """Choose one whose products CUDA does not round to TF32, as training lets it.

    Large numbers are subtracted from each other. The products are few, so that GPUs which are slow
    in float64 hardly take longer.
    """
    return torch.float64 if device.type == "cuda" else torch.float32


def _cluster(flat: Tensor, count: int, seed: int) -> Tensor:
    """Number each row's cluster (k-means; Lloyd 1982)."""
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed), device="cpu")
    centres = flat[order[:count]]
    for _ in range(_ROUNDS):
        nearest = torch.cdist(flat, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, flat)
        sizes = nearest.bincount(minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return torch.cdist(flat, centres).argmin(1)


def _main_directions(cluster: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give mean (D,), directions (R, D), their variances (R,), and the variance of all others ().

    Where a cluster spans fewer than R directions, the last ones are zero vectors.
    """
    mean = cluster.mean(0)
    centred = cluster - mean
    count, size = centred.shape
    # By way of the samples' products: there are fewer samples than numbers in one.
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    kept = min(rank, count - 1, size - 1)
    values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
    directions, variances = torch.zeros(rank, size).double(), torch.ones(rank).double()
    directions[:kept] = (centred.T @ vectors / values.clamp(min=1e-12).sqrt()).T
    total = centred.square().sum() / (count - 1)
    own = values / (count - 1)
    rest = ((total - own.sum()) / max(size - kept, 1)).clamp(min=_LEAST_VARIANCE)
    variances *= rest
    variances[:kept] = own.clamp(min=_LEAST_VARIANCE)
    return mean, directions, variances, rest
