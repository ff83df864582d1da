"""Builders of tiny random transformers, what they are called with, and pipelines of them."""

import torch
from tiny_pipelines import TEXT_CHANNELS


def _fill(model):
    """Random weights everywhere: some layers start at zero, which would hide what they get."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


_DIT = {"num_attention_heads": 3, "attention_head_dim": 4, "in_channels": 4}
_DIT |= {"out_channels": 8, "num_layers": 2, "sample_size": 16}


def tiny_dit(**options):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return _fill(DiTTransformer2DModel(**_DIT | options))


def tiny_pixart(**options):
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    settings = {**_DIT, "caption_channels": TEXT_CHANNELS, "cross_attention_dim": 12}
    return _fill(PixArtTransformer2DModel(**settings | options))


def tiny_sd3(**options):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    settings = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    settings |= {"attention_head_dim": 4, "num_attention_heads": 3, "caption_projection_dim": 12}
    settings |= {"joint_attention_dim": TEXT_CHANNELS, "pooled_projection_dim": TEXT_CHANNELS}
    settings |= {"pos_embed_max_size": 12, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    return _fill(SD3Transformer2DModel(**settings | options))


def tiny_flux(**options):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    settings = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1}
    settings |= {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    settings |= {"joint_attention_dim": TEXT_CHANNELS, "pooled_projection_dim": TEXT_CHANNELS}
    return _fill(FluxTransformer2DModel(**settings | options))


BUILDERS = {"dit": tiny_dit, "pixart": tiny_pixart, "sd3": tiny_sd3, "flux": tiny_flux}


def grid_ids(height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([0 * rows, rows, columns], dim=-1).flatten(0, 1).float()


def conditions(name, batch_size=2, grid=(8, 8), seed=3):
    """Everything but the sample and the timestep, for Dash and Dot alike."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch_size, 5, TEXT_CHANNELS, generator=generator)
    pooled = torch.randn(batch_size, TEXT_CHANNELS, generator=generator)
    joint = {"encoder_hidden_states": text, "pooled_projections": pooled}
    return {
        "dit": {"class_labels": torch.arange(batch_size)},
        "pixart": {"encoder_hidden_states": text},
        "sd3": joint,
        "flux": {**joint, "img_ids": grid_ids(*grid), "txt_ids": torch.zeros(5, 3)},
    }[name]


def sample_shapes(name, size=(16, 16), batch_size=2):
    """Shapes of the sample and of the model's output; `size` is that of the latents."""
    height, width = size
    if name == "flux":
        return ((batch_size, height * width // 4, 16),) * 2
    channels = 4 if name == "sd3" else 8
    return (batch_size, 4, height, width), (batch_size, channels, height, width)
