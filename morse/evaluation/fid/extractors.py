"""What turns images into the features that sets of images are compared in."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from morse.evaluation.digests import file_sha256, state_sha256
from morse.evaluation.features import features_sha256, load_features
from morse.evaluation.metrics import FRECHET_LABEL
from morse.evaluation.torch_fidelity_loader import fidelity_module
from morse.training.idx import fit_images

FASHION_MNIST = "fashion-mnist"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


def conversion(source: str, target: str) -> str:
    """Return the command that makes a safetensors file of a pickled state dictionary."""
    return (
        'python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v '
        f"in torch.serialization.load('{source}').items()}}, '{target}')\""
    )


CONVERT = conversion(INCEPTION_FILE, "inception.safetensors")


@dataclass(frozen=True)
class Extractor:
    """A feature extractor and what must be told of it with every figure.

    Attributes:
        name: What `--extractor` calls it.
        words: What its features are called in the names of metrics.
        sha256: SHA-256 of its weights.
        resize: How an image gets the size that the network wants.
        channels: 1 if it takes grey images, 3 for colour.
        resizes: Whether it takes images of any size.
        compute: Maps (B, channels, H, W) uint8 on any device to features (B, D) and, if there
            are any, class logits (B, K), else None.
        embed_text: Maps B prompts to unit vectors (B, D) in the same space, where there is one.
        is_standard: Whether it is the model that FD-DINOv2 or CMMD are defined with.
        has_logits: Whether `compute` gives class logits.
    """

    name: str
    words: str
    sha256: str
    resize: str
    channels: int
    resizes: bool
    compute: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    embed_text: Callable[[list[str]], Tensor] | None = None
    is_standard: bool = True
    has_logits: bool = False

    @property
    def titles(self) -> dict[str, str]:
        """The metrics' names: "FID" and its kin belong to Inception-v3 alone."""
        if self.name == "inception":
            names = ("FID", "KID", "Inception score", "Precision", "Recall")
        elif self.name == "dinov2" and self.is_standard:
            names = ("FD-DINOv2", "KD-DINOv2", "", "Precision (DINOv2)", "Recall (DINOv2)")
        else:
            kinds = ("Fréchet distance", "Kernel distance", "Class score", "Precision", "Recall")
            names = tuple(f"{kind} ({self.words})" for kind in kinds)
        keys = ("frechet", "kernel_distance", "inception_score", "precision", "recall")
        titles = dict(zip(keys, names, strict=True))
        of_model = "" if self.is_standard else f" ({self.words})"
        return {**titles, "cmmd": f"CMMD{of_model}", "clip_score": f"CLIP score{of_model}"}

    def identity(self) -> dict[str, str]:
        """Return what makes features comparable: name, SHA-256 of the weights, resize mode."""
        return {"extractor": self.name, "sha256": self.sha256, "resize": self.resize}


@dataclass(frozen=True)
class ExtractorOptions:
    """Where weights are: a safetensors file for Inception; folders or hub ids for the others."""

    inception_weights: Path | None = None
    clip_model: str = "openai/clip-vit-large-patch14-336"
    dinov2_model: str = "facebook/dinov2-large"


def load_extractor(
    name: str, device: torch.device, options: ExtractorOptions = ExtractorOptions()
) -> Extractor:
    """Load an extractor.

    Args:
        name: "inception", "clip", "dinov2", "fashion-mnist", or "module.path:Name", an `nn.Module`
            without arguments that maps images (B, 3, H, W) in [0, 1] to features (B, D). If it
            has an attribute `channels` that is 1, it gets grey images.
        device: Where to run it.
        options: Where weights are.

    Raises:
        ValueError: If the name is unknown, or weights or a package are missing.
        FileNotFoundError: If the named weights don't exist.
    """
    if name == "inception":
        return _load_inception(options.inception_weights, device)
    if name in ("clip", "dinov2"):
        from morse.evaluation.fid.transformers_extractors import load_clip, load_dinov2

        if name == "clip":
            return load_clip(options.clip_model, device)
        return load_dinov2(options.dinov2_model, device)
    if name == FASHION_MNIST:
        return _load_fashion_mnist(device)
    if ":" in name:
        return _load_module(name, device)
    raise ValueError(
        f"extractor is {name!r}; choose inception, clip, dinov2, {FASHION_MNIST} or your own "
        "network by module.path:Name"
    )


def _load_inception(weights: Path | None, device: torch.device) -> Extractor:
    """Load Inception-v3 of 2015 as FID was defined with it (Heusel et al. 2017).

    torch-fidelity's port, its TensorFlow-1 bilinear resize included, gives the published numbers.
    """
    if weights is None:
        raise ValueError(
            f"extractor inception needs --inception_weights: download {INCEPTION_FILE} from "
            "torch-fidelity's release v0.2.0 on GitHub (toshas/torch-fidelity), convert it once by "
            f"{CONVERT} and give --inception_weights inception.safetensors"
        )
    if not weights.is_file():
        raise FileNotFoundError(f"inception_weights is {weights}, which is no file")
    module = fidelity_module("feature_extractor_inceptionv3")
    try:
        state = load_file(weights)
        # The constructor would unpickle a file or download one; it is handed these tensors instead.
        with mock.patch.object(module, "load_state_dict_from_url", lambda *_, **__: state):
            network = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], verbose=False
            )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"inception_weights is {weights}, which does not hold the tensors of {INCEPTION_FILE} "
            f"as safetensors ({str(error)[:200]}); convert it by {CONVERT}"
        ) from error
    network.to(device)
    return Extractor(
        name="inception",
        words="Inception-v3 features",
        sha256=file_sha256(weights),
        resize="bilinear to 299x299 as in TensorFlow 1, without antialiasing",
        channels=3,
        resizes=True,
        compute=lambda images: network(images.to(device)),
        has_logits=True,
    )


def _load_fashion_mnist(device: torch.device) -> Extractor:
    model = load_features().to(device)

    def compute(images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[2:] == (28, 28):
            images = fit_images(images, 32)
        features = model.features(images.to(device).float() / 255)
        return features, model.classify(features)

    return Extractor(
        name=FASHION_MNIST,
        words=FRECHET_LABEL.partition("(")[2].rstrip(")"),
        sha256=features_sha256(),
        resize="none (32x32; 28x28 gets a black border of 2 pixels)",
        channels=1,
        resizes=False,
        compute=compute,
        has_logits=True,
    )


def import_network(name: str, argument: str = "extractor") -> nn.Module:
    """Make a user's own network, "module.path:Name", frozen.

    Raises:
        ValueError: If there is none of that name; it names the argument.
    """
    module_name, _, class_name = name.partition(":")
    try:
        network = getattr(import_module(module_name), class_name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{argument} is {name!r}, which cannot be loaded ({error}); it must name a class "
            "without arguments in an importable module (is its folder on PYTHONPATH?)"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{argument} is {name!r}, which makes a {type(network)}, no nn.Module")
    return network.eval().requires_grad_(False)


def _load_module(name: str, device: torch.device) -> Extractor:
    network = import_network(name).to(device)

    def compute(images: Tensor) -> tuple[Tensor, None]:
        features = network(images.to(device).float() / 255)
        if not isinstance(features, Tensor) or features.shape[:-1] != (len(images),):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise ValueError(
                f"extractor {name!r} returned {shape} for {len(images)} images, but must return "
                "features (B, D)"
            )
        return features, None

    return Extractor(
        name=name,
        words=f"features of {name}",
        sha256=state_sha256(network),
        resize="none (the network gets the images' own size)",
        channels=getattr(network, "channels", 3),
        resizes=False,
        compute=compute,
    )
