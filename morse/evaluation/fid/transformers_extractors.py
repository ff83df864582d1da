"""CLIP and DINOv2 features, through transformers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor

from morse.evaluation.digests import file_sha256
from morse.evaluation.fid.extractors import Extractor

FILES = ["*.json", "*.txt", "*.safetensors"]


def load_clip(model: str, device: torch.device) -> Extractor:
    """Load CLIP's image and text towers (Radford et al. 2021); features have length 1.

    Args:
        model: A folder, or an id on the hub.
        device: Where to run it.
    """
    folder = _fetch(model, "clip_model")
    prepare, resize = _load_processor(folder)
    network = _load(transformers.CLIPModel, folder, device)
    with _needing(folder, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def compute(images: Tensor) -> tuple[Tensor, None]:
        pooled = network.vision_model(pixel_values=prepare(images).to(device)).pooler_output
        return torch.nn.functional.normalize(network.visual_projection(pooled), dim=1), None

    @torch.no_grad()
    def embed_text(prompts: list[str]) -> Tensor:
        most = network.config.text_config.max_position_embeddings
        tokens = tokenizer(
            prompts, padding=True, truncation=True, max_length=most, return_tensors="pt"
        ).to(device)
        pooled = network.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        return torch.nn.functional.normalize(network.text_projection(pooled), dim=1)

    return Extractor(
        name="clip",
        words=f"CLIP features, {Path(model).name}",
        sha256=_weights_sha256(folder),
        resize=resize,
        channels=3,
        resizes=True,
        compute=compute,
        embed_text=embed_text,
        is_standard=_sizes(network.config.vision_config) == (1024, 14, 336),
    )


def load_dinov2(model: str, device: torch.device) -> Extractor:
    """Load DINOv2 (Oquab et al. 2023); features are the class token after the last norm.

    FD-DINOv2 (Stein et al. 2023) is defined with the large model, and with whole images squeezed
    to 224x224 where DINOv2 itself would crop.

    Args:
        model: A folder, or an id on the hub.
        device: Where to run it.
    """
    folder = _fetch(model, "dinov2_model")
    prepare, resize = _load_processor(folder, whole=True)
    network = _load(transformers.Dinov2Model, folder, device)
    return Extractor(
        name="dinov2",
        words=f"DINOv2 features, {Path(model).name}",
        sha256=_weights_sha256(folder),
        resize=resize,
        channels=3,
        resizes=True,
        compute=lambda images: (network(prepare(images).to(device)).pooler_output, None),
        is_standard=_sizes(network.config)[:2] == (1024, 14),
    )


def _sizes(config: object) -> tuple[int, int, int]:
    return config.hidden_size, config.patch_size, config.image_size


def _fetch(model: str, option: str) -> Path:
    """Return the folder of a model: its own, the hub's local copy, or a new copy from the hub.

    Raises:
        ValueError: If it cannot be had, or has no weights in safetensors.
    """
    from huggingface_hub import snapshot_download

    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, allow_patterns=FILES, local_files_only=True))
        except (OSError, ValueError):
            folder = None
        # Another program may have fetched some files alone.
        wanted = ("*.safetensors", "*processor*.json")
        if folder is None or not all(any(folder.glob(pattern)) for pattern in wanted):
            folder = _download(model, option)
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{option} is {model}, but {folder} has no weights in safetensors; run once, where "
            f"there is a network, {save_command(model)} and give --{option} saved"
        )
    return folder


def save_command(model: str) -> str:
    """Say how a model becomes a folder with all that is read here."""
    return (
        'python -c "from transformers import AutoModel, AutoProcessor; [each.from_pretrained('
        f"'{model}').save_pretrained('saved') for each in (AutoModel, AutoProcessor)]\""
    )


@contextmanager
def _needing(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{folder} has no {what} that can be read ({reason}); save it beside the weights, by "
            "AutoProcessor.from_pretrained(ID).save_pretrained(FOLDER) of transformers"
        ) from error


def _download(model: str, option: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=FILES))
    except (OSError, ValueError) as error:  # all of the hub's own errors are one of the two
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{option} is {model!r}, which is no folder and cannot be fetched from the hub "
            f"({reason}); fetch it where there is a network by `hf download {model}` and give its "
            f"folder by --{option}"
        ) from error


def _load(model_class: type, folder: Path, device: torch.device) -> torch.nn.Module:
    """Load a network, and see to it that every weight was in the file."""
    try:
        network, info = model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} is no {model_class.__name__} ({error})") from error
    if info["missing_keys"] or info["mismatched_keys"]:  # transformers would draw them at random
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
            f"{folder} is no {model_class.__name__}: it lacks {len(lacking)} weights, {lacking[:3]}"
        )
    # A variant, as with registers, which would be left out. Old files hold positions' numbers.
    unknown = sorted(k for k in map(str, info["unexpected_keys"]) if "position_ids" not in k)
    if unknown:
        raise ValueError(
            f"{folder} is no {model_class.__name__}: it has {len(unknown)} weights more, "
            f"{unknown[:3]}"
        )
    return network.float().eval().requires_grad_(False).to(device)


def _load_processor(folder: Path, whole: bool = False) -> tuple[Callable[[Tensor], Tensor], str]:
    """Return what makes pixel values (B, 3, H, W) of uint8 images, and its resize in words.

    Pillow resizes, on every machine: torchvision's result would differ in the last bits.

    Args:
        folder: Where preprocessor_config.json is.
        whole: Squeeze the whole image into the square that the model's config would crop.
    """
    with _needing(folder, "image processor"):
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True
        )
    settings = processor.to_dict()
    options = {"size": settings["crop_size"], "do_center_crop": False} if whole else {}
    settings |= options

    def prepare(images: Tensor) -> Tensor:
        arrays = [image.permute(1, 2, 0).cpu().numpy() for image in images]
        layout = {"input_data_format": "channels_last", "return_tensors": "pt"}
        return processor(arrays, **layout, **options)["pixel_values"]

    filter_name = Image.Resampling(settings["resample"]).name.lower()
    words = f"Pillow {filter_name} to {_words(settings['size'])}"
    if settings["do_center_crop"]:
        words += f", centre crop {_words(settings['crop_size'])}"
    return prepare, words


def _words(size: dict[str, int]) -> str:
    if "shortest_edge" in size:
        return f"shorter side {size['shortest_edge']}"
    return f"{size['width']}x{size['height']}"


def _weights_sha256(folder: Path) -> str:
    return file_sha256(*sorted(folder.glob("*.safetensors")))
