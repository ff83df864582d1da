"""Published denoiser architectures with random weights: latency does not depend on the weights.

The settings are those of the models' own config.json files on the hub.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from morse.training.guidance import nest

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """A denoiser's class, settings and inputs.

    Attributes:
        class_name: The class in diffusers.
        config: Its settings.
        reduced: Settings with fewer layers of the same width, for machines without a GPU.
        size: Height and width of the latents that the model was trained on.
        channels: Channels of the latents.
        shapes: (batch size) -> shapes of the conditions, by argument name; a dot separates the key
            of a nested dictionary.
        packed: Whether latents come as a sequence of tokens, (B, size * size, channels).
    """

    class_name: str
    config: dict[str, object]
    reduced: dict[str, object]
    size: int
    channels: int
    shapes: Callable[[int], Shapes]
    packed: bool = False


def _cross_attention(width: int) -> Callable[[int], Shapes]:
    return lambda batch: {"encoder_hidden_states": (batch, 77, width)}


def _sdxl_conditions(batch: int) -> Shapes:
    return {
        "encoder_hidden_states": (batch, 77, 2048),
        "added_cond_kwargs.text_embeds": (batch, 1280),
        "added_cond_kwargs.time_ids": (batch, 6),
    }


def _sd3_conditions(batch: int) -> Shapes:
    return {"encoder_hidden_states": (batch, 333, 4096), "pooled_projections": (batch, 2048)}


def _flux_conditions(batch: int) -> Shapes:
    return {
        "encoder_hidden_states": (batch, 512, 4096),
        "pooled_projections": (batch, 768),
        "guidance": (batch,),
        "txt_ids": (512, 3),
    }


ARCHITECTURES = {
    "sd15": Architecture(
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        {"layers_per_block": 1},
        64,
        4,
        _cross_attention(768),
    ),
    "sdxl": Architecture(
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 2]},
        128,
        4,
        _sdxl_conditions,
    ),
    "dit-xl-2": Architecture(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 32,
        },
        {"num_layers": 4},
        32,
        4,
        lambda batch: {"class_labels": (batch,)},
    ),
    "sd3": Architecture(
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        {"num_layers": 3},
        128,
        16,
        _sd3_conditions,
    ),
    "flux": Architecture(
        "FluxTransformer2DModel",
        {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True},
        {"num_layers": 1, "num_single_layers": 2},
        64,  # after 2x2 latents are packed into a token
        64,
        _flux_conditions,
        packed=True,
    ),
}


def build_architecture(
    architecture: Architecture, device: torch.device, dtype: torch.dtype, reduced: bool
) -> nn.Module:
    """Build the denoiser with random weights, on "meta" without memory."""
    import diffusers

    config = {**architecture.config, **(architecture.reduced if reduced else {})}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that billions of parameters are never held in float32
    try:
        with torch.device(device):
            model = getattr(diffusers, architecture.class_name)(**config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def make_inputs(
    architecture: Architecture, batch_size: int, like: Tensor
) -> tuple[Tensor, Tensor, dict[str, object]]:
    """Make a sample, a timestep and conditions at the model's own resolution.

    Args:
        architecture: What they are for.
        batch_size: Samples.
        like: A tensor of the device and dtype to use.

    Returns:
        The sample, (B, C, H, W) or packed (B, H * W, C), the timestep, (B,), and the conditions.
    """

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=like.device, dtype=like.dtype)

    size = architecture.size
    flat = {name: random(shape) for name, shape in architecture.shapes(batch_size).items()}
    if "class_labels" in flat:
        flat["class_labels"] = torch.zeros_like(flat["class_labels"], dtype=torch.long)
    conditions = nest(flat)
    timestep = torch.full((batch_size,), 500, device=like.device)
    if architecture.packed:
        places = torch.arange(size, device=like.device, dtype=like.dtype)
        rows, columns = torch.meshgrid(places, places, indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
        conditions["img_ids"] = ids.flatten(0, 1)
        return random((batch_size, size * size, architecture.channels)), timestep, conditions
    return random((batch_size, architecture.channels, size, size)), timestep, conditions
