"""Distances between sets of images in feature space."""

import math

import torch
from torch import Tensor

from morse.evaluation.fid.extractors import Extractor
from morse.evaluation.fid.feature_sets import FeatureSet
from morse.evaluation.fid.fidelity import FIDELITY, mean_score
from morse.evaluation.metrics import feature_statistics, frechet_distance
from morse.evaluation.report.scores import Score
from morse.evaluation.scoring import Axis
from morse.evaluation.stats.frechet import Gaussians, frechet_distances
from morse.evaluation.torch_fidelity_loader import fidelity_module

KID_SUBSETS, PRC_NEIGHBOURS, IS_SPLITS = 100, 3, 10  # the values of published figures
IS_LEAST = 100  # images of a split: of n images the score is at most n, and too low for few
JACKKNIFE_GROUPS = 10
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
LOWER = {"frechet", "kernel_distance", "cmmd"}


def axes(extractor: Extractor | None) -> dict[str, Axis]:
    """Describe every score; those of distributions have the extractor's titles."""
    titles = {} if extractor is None else extractor.titles
    distributions = {
        name: Axis(title, "", "lower" if name in LOWER else "higher", "distribution")
        for name, title in titles.items()
    }
    return distributions | FIDELITY


def feature_scores(
    extractor: Extractor,
    real: FeatureSet | None,
    fake: FeatureSet,
    kid_subset_size: int = 1000,
    device: torch.device | str = "cpu",
) -> dict[str, Score]:
    """Measure everything that the two sets allow.

    Statistics alone allow the Fréchet distance; features of both sets also the kernel distance,
    precision and recall, and with CLIP the CMMD; class logits of 100 images or more the Inception
    score, without real images too.

    Args:
        extractor: What the features are of.
        real: The reference; may be statistics alone, or None.
        fake: What is measured.
        kid_subset_size: Images in a subset of the kernel distance.
        device: Where to compute the distances between all pairs of images.

    Raises:
        ValueError: If the sets have features of different lengths.
    """
    scores = {} if real is None else _distances(extractor, real, fake, kid_subset_size, device)
    if fake.logits is not None and inception_splits(len(fake.logits)):
        scores["inception_score"] = inception_score(fake.logits)
    return scores


def _distances(
    extractor: Extractor,
    real: FeatureSet,
    fake: FeatureSet,
    kid_subset_size: int,
    device: torch.device | str,
) -> dict[str, Score]:
    if len(real.mean) != len(fake.mean):
        raise ValueError(
            f"{real.name} has {len(real.mean)} features an image and {fake.name} "
            f"{len(fake.mean)}; use one extractor for both"
        )
    distance = frechet_distance(real.mean, real.covariance, fake.mean, fake.covariance)
    scores = {"frechet": Score(distance, frechet_error(real, fake))}
    if real.features is not None and fake.features is not None:
        pair = real.features, fake.features
        if min(len(part) for part in pair) >= 4:
            scores["kernel_distance"] = kernel_distance(*pair, kid_subset_size)
        if min(len(part) for part in pair) > PRC_NEIGHBOURS:
            moved = (part.to(device) for part in pair)
            scores["precision"], scores["recall"] = precision_recall(*moved)
        if extractor.name == "clip":
            scores["cmmd"] = cmmd(*pair)
    return scores


def frechet_error(real: FeatureSet, fake: FeatureSet) -> float | None:
    """Return the Fréchet distance's standard error over the images measured, by a jackknife.

    Each of `JACKKNIFE_GROUPS` equal groups of images is left out in turn (Efron 1982, chapter 3).
    The real images are held fixed, and the bias of few images is not in it.

    Returns:
        None where `fake` is statistics alone, or too few images for a covariance without a group.
    """
    if fake.features is None or len(fake.features) < 2 * JACKKNIFE_GROUPS:
        return None
    groups = torch.arange(len(fake.features)) % JACKKNIFE_GROUPS
    groups[len(groups) // JACKKNIFE_GROUPS * JACKKNIFE_GROUPS :] = -1  # the rest is always in
    reals = Gaussians.of(real.mean, real.covariance)
    left = (feature_statistics(fake.features[groups != g]) for g in range(JACKKNIFE_GROUPS))
    return jackknife_error([frechet_distances(Gaussians.of(*each), reals).item() for each in left])


def jackknife_error(values: list[float]) -> float:
    """Return the standard error of a figure from its values with each group left out."""
    kept = torch.tensor(values, dtype=torch.float64)
    return math.sqrt((len(kept) - 1) * float(kept.var(correction=0)))


def kernel_distance(real: Tensor, fake: Tensor, subset_size: int = 1000) -> Score:
    """Return the mean polynomial-kernel MMD over random subsets (Bińkowski et al. 2018).

    It is called KID only with Inception features. The standard error is that of a delete-d
    jackknife (Shao and Wu 1989): the spread over subsets of m of n images, its square times
    m / (n - m), to which the draw of so few subsets adds one over their number. It is conservative
    for sets that differ little, where the distance is a degenerate U-statistic.

    Args:
        real: (N, D).
        fake: (M, D).
        subset_size: m; at most half of the smaller set is taken.
    """
    smallest = min(len(real), len(fake))
    subset_size = kernel_subset_size(smallest, subset_size)
    sides = fake.double(), real.double()  # CLIP's kernels are all near 1
    found = fidelity_module("metric_kid").kid_features_to_metric(
        *sides, kid_subsets=KID_SUBSETS, kid_subset_size=subset_size, verbose=False
    )
    spread = found["kernel_inception_distance_std"]
    error = spread * math.sqrt(subset_size / (smallest - subset_size) + 1 / KID_SUBSETS)
    return Score(found["kernel_inception_distance_mean"], error)


def kernel_subset_size(smallest: int, asked: int) -> int:
    """Return how many of the smaller set's images a subset of the kernel distance has."""
    return min(asked, smallest // 2)


def precision_recall(real: Tensor, fake: Tensor) -> tuple[Score, Score]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019) with 3 neighbours.

    Precision is a share of the images measured, and has the standard error of a share, the real
    ones held fixed. Recall is one of the real images: what other images would give is not known.

    Args:
        real: (N, D), N > 3.
        fake: (M, D), M > 3.
    """
    found = fidelity_module("metric_prc").prc_features_to_metric(
        fake,
        real,
        prc_neighborhood=PRC_NEIGHBOURS,
        prc_batch_size=2000,
        save_cpu_ram=True,
        verbose=False,
    )
    share = found["precision"]
    return Score(share, math.sqrt(share * (1 - share) / len(fake))), Score(found["recall"])


def inception_score(logits: Tensor) -> Score:
    """Return exp E KL(p(y|x) || p(y)) (Salimans et al. 2016), mean and error over the splits.

    Args:
        logits: Of the images measured, (N, K), N >= 100; below 200 they are one split and there is
            no error.
    """
    splits = inception_splits(len(logits))
    found = fidelity_module("metric_isc").isc_features_to_metric(logits, splits)
    # That of the mean of the splits.
    error = found["inception_score_std"] / math.sqrt(splits - 1) if splits > 1 else None
    return Score(found["inception_score_mean"], error)


def inception_splits(num_images: int) -> int:
    """Return over how many splits the Inception score of so many images is taken, 0 to 10."""
    return min(IS_SPLITS, num_images // IS_LEAST)


def cmmd(real: Tensor, fake: Tensor, block: int = 2000) -> Score:
    """Return the CLIP maximum mean discrepancy (Jayasumana et al. 2024, Equation 4), times 1000.

    Like the authors' program: a Gaussian kernel of sigma 10 on CLIP embeddings of length 1, and
    the biased estimate, the kernel of an image with itself included. The sets may differ in size,
    which the MMD functions of torchmetrics and torch-fidelity do not foresee. Unlike there, images
    that are not square were cropped, as CLIP's own processor does and the CLIP score wants. The
    standard error is a jackknife's over groups of the images measured, as for `frechet_error`.

    Args:
        real: (N, D), unit vectors.
        fake: (M, D), likewise.
        block: Rows of the kernel matrix at a time.
    """
    kernel = fidelity_module("metric_kid").kernel_rbf

    def sums(a: Tensor, b: Tensor) -> float:
        a, b = a.double().numpy(), b.double().numpy()
        blocks = (a[i : i + block] for i in range(0, len(a), block))
        return sum(float(kernel(rows, b, kid_kernel_rbf_sigma=CMMD_SIGMA).sum()) for rows in blocks)

    groups = [fake[g::JACKKNIFE_GROUPS] for g in range(JACKKNIFE_GROUPS) if len(fake[g:]) > 0]
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    with_real = torch.tensor([sums(real, group) for group in groups], dtype=torch.float64)
    among = torch.zeros(len(groups), len(groups), dtype=torch.float64)
    for one in range(len(groups)):
        for other in range(one + 1):
            among[one, other] = among[other, one] = sums(groups[one], groups[other])
    within_real = sums(real, real) / len(real) ** 2

    def distance(kept: Tensor) -> float:
        """Of the images of some groups, as zeros and ones."""
        count = float(kept @ sizes)
        within = within_real + float(kept @ among @ kept) / count**2
        return CMMD_SCALE * (within - 2 * float(kept @ with_real) / (len(real) * count))

    everyone = torch.ones(len(groups), dtype=torch.float64)
    if len(groups) < JACKKNIFE_GROUPS:
        return Score(distance(everyone))
    left_out = everyone - torch.eye(len(groups), dtype=torch.float64)
    return Score(distance(everyone), jackknife_error([distance(kept) for kept in left_out]))


def clip_score(image_features: Tensor, text_features: Tensor) -> Score:
    """Return 100 max(cos, 0) of images and their prompts (Hessel et al. 2021), mean and error.

    Args:
        image_features: (N, D), unit vectors.
        text_features: Of the prompt of each image, (N, D), unit vectors.
    """
    cosines = (image_features.double() * text_features.cpu().double()).sum(dim=1)
    return mean_score(100 * cosines.clamp(min=0))
