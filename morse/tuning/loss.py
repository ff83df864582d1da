"""What a Dot is tuned on: errors of samples, and of what other networks see of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from morse.evaluation.features import load_features
from morse.evaluation.fid.extractors import import_network
from morse.training.run import LossFunction

MAX_PSNR = 80.0  # dB of pixels in [0, 1]; runs that are nearer count as that near
_LEAST_ERROR = 1e-6  # of features; what is nearer counts as that near


class _Layers(nn.Module):
    """A `FashionFeatures` as a network that gives its layers."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.classifier.layers(images)


class FeatureLoss(nn.Module):
    """Mean logarithm of the squared errors in the features of networks.

    A Dot that is tuned on errors of pixels alone gives images whose features have another mean, as
    networks see them that were trained to tell images apart. So errors of features count too, as
    in LPIPS (Zhang et al. 2018): half of each layer's map, half of the vector at the end, and a
    quarter of the mean of a batch's vectors, which is that shift.

    Args:
        networks: Frozen. Each maps images (B, C, H, W) in [0, 1] to a tensor or a sequence of them,
            (B, C, H, W) or (B, D), the last of them (B, D).
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        """Take the networks."""
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, samples: Tensor, targets: Tensor) -> Tensor:
        """Give the mean over the networks.

        Args:
            samples: (B, C, H, W) in [0, 1].
            targets: What they are to come near to, of the same shape.
        """
        images = torch.cat([samples, targets])
        return torch.stack([_errors(network(images)) for network in self.networks]).mean()


def _errors(features: Tensor | Sequence[Tensor]) -> Tensor:
    *maps, vector = [features] if isinstance(features, Tensor) else features
    differences = [found.float().chunk(2) for found in (*maps, vector)]
    *of_maps, of_vector = [first - second for first, second in differences]
    loss = 0.5 * _log_error(of_vector) + 0.25 * _log_error(of_vector.mean(0, keepdim=True))
    if of_maps:
        loss = loss + 0.5 * torch.stack([_log_error(each) for each in of_maps]).mean()
    return loss


def _log_error(differences: Tensor, least: float = _LEAST_ERROR) -> Tensor:
    """Mean over the samples, (B, ...), of the logarithm of their mean square, at least `least`."""
    return differences.square().flatten(1).mean(1).clamp(min=least).log().mean()


def run_loss(targets_of: Sequence[int], features: FeatureLoss | None = None) -> LossFunction:
    """Give the mean logarithm of the runs' squared errors, all of a batch made in one way.

    By the logarithm each run counts alike; the few that end in another mode would make most of a
    mean error. Its negative is the mean PSNR, in other units.

    Args:
        targets_of: The index of each way's targets; one way is drawn for a batch.
        features: Errors in features, which are added.
    """

    def compute_loss(
        sampled: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> Tensor:
        numbers, all_targets = batch
        device = generator.device
        index = int(torch.randint(len(targets_of), (), generator=generator, device=device))
        samples, targets = sampled(numbers, index), all_targets[:, targets_of[index]]
        loss = _log_error(samples - targets, least=10 ** (-MAX_PSNR / 10))
        return loss if features is None else loss + features(samples, targets)

    return compute_loss


def load_feature_loss(names: Sequence[str], device: torch.device, example: Tensor) -> FeatureLoss:
    """Load the networks of `--feature_networks`, and try them.

    Args:
        names: Each the folder of a classifier by `morse train-features`, or "module.path:Name".
        device: Where to run them.
        example: Images (B, C, H, W) such as they will get.

    Raises:
        ValueError: If a network is missing, or gives no features of such images.
    """
    loss = FeatureLoss([_load(name) for name in names]).to(device)
    for name, network in zip(names, loss.networks, strict=True):
        found = network(example.to(device))
        last = found if isinstance(found, Tensor) else found[-1]
        if last.shape[:-1] != (len(example),):
            raise ValueError(
                f"feature_networks is {name!r}, which gives {tuple(last.shape)} for "
                f"{len(example)} images; the last that it gives must be (B, D)."
            )
    return loss


def _load(name: str) -> nn.Module:
    if ":" in name and not Path(name).exists():
        return import_network(name, "feature_networks")
    try:
        return _Layers(load_features(name))
    except FileNotFoundError as error:
        raise ValueError(
            f"feature_networks is {name!r}, which is no folder of `morse train-features` ({error}) "
            'and no class "module.path:Name".'
        ) from error
