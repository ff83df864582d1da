"""Which layers of each supported denoiser class Dot replaces or reuses."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from morse.dot.lora import describe_leaf
from morse.dot.wrapped import base_layer, is_ip_adapter, named_layers


@dataclass(frozen=True)
class Ports:
    """Names of the layers of a denoiser class that Dot replaces or reuses, dotted where nested.

    Attributes:
        entry: First layer, from the sample to features; a transformer's includes what adds
            position embeddings.
        exit: Last layer, from features to the model output.
        time_projection: From timesteps to sinusoids.
        time_embedding: From sinusoids to the embedding that the blocks take; a "*" stands for
            every block's own.
        features: What runs between entry and exit: pictures, (B, C, H, W), or tokens, (B, N, C),
            that are patches of a picture or of a sample which is itself packed into tokens.
        any_size: Whether sizes that Dash's levels or Dot's don't divide are handled.
        time_scale: What Dash's forward method multiplies timesteps with.
    """

    entry: str
    exit: str
    time_projection: str
    time_embedding: str
    features: Literal["picture", "patches", "packed"] = "picture"
    any_size: bool = True
    time_scale: float = 1.0


_UNET_PORTS = ("conv_in", "conv_out", "time_proj", "time_embedding")


_TEXT_TIME = ("time_text_embed.time_proj", "time_text_embed.timestep_embedder")
PORTS = {
    "UNet2DModel": Ports(*_UNET_PORTS, any_size=False),
    "UNet2DConditionModel": Ports(*_UNET_PORTS),
    "DiTTransformer2DModel": Ports(
        "pos_embed",
        "proj_out_2",
        "transformer_blocks.0.norm1.emb.time_proj",
        "transformer_blocks.*.norm1.emb.timestep_embedder",
        features="patches",
    ),
    "PixArtTransformer2DModel": Ports(
        "pos_embed",
        "proj_out",
        "adaln_single.emb.time_proj",
        "adaln_single.emb.timestep_embedder",
        features="patches",
    ),
    "SD3Transformer2DModel": Ports("pos_embed", "proj_out", *_TEXT_TIME, features="patches"),
    "FluxTransformer2DModel": Ports(
        "x_embedder", "proj_out", *_TEXT_TIME, features="packed", time_scale=1000.0
    ),
}


def find_ports(dash: nn.Module) -> Ports:
    """Look up the ports of a denoiser's class or of the class that it derives from.

    Raises:
        ValueError: If a weight-shared Dot is not supported for the class; the known ones are named.
    """
    for cls in type(dash).__mro__:
        if cls.__name__ in PORTS:
            return PORTS[cls.__name__]
    raise ValueError(
        f"A weight-shared Dot is not supported for {type(dash).__name__}; supported: "
        f"{sorted(PORTS)}. Your own Dot can still be attached with enable_morse(pipe, dot)."
    )


def time_embeddings(dash: nn.Module) -> list[str]:
    """Name every layer that embeds timesteps, the one that Dot's own blocks listen to first."""
    outer, star, inner = find_ports(dash).time_embedding.partition(".*.")
    if not star:
        return [outer]
    return [f"{outer}.{index}.{inner}" for index in range(len(dash.get_submodule(outer)))]


def lora_targets(dash: nn.Module) -> dict[str, dict[str, object]]:
    """Describe every Linear and Conv2d of Dash that Dot shares, by name."""
    ports = find_ports(dash)
    left_out = (f"{ports.entry}.", f"{ports.exit}.")
    leaves = {
        name: describe_leaf(module)
        for name, module in named_layers(dash)
        if not f"{name}.".startswith(left_out) and not is_ip_adapter(name)
    }
    return {name: spec for name, spec in leaves.items() if spec is not None}


def describe_layers(dash: nn.Module, num_down_blocks: int) -> dict[str, object]:
    """Give the sizes of a `MorseDot` with `num_down_blocks` that follow from its Dash.

    Raises:
        ValueError: If a weight-shared Dot is not supported for its class (`find_ports`), or for
            networks of the class that read the sample beside their first layer too.
    """
    ports = find_ports(dash)
    config = dash.config
    blocks = (*(config.get("down_block_types") or ()), *(config.get("up_block_types") or ()))
    if config.get("addition_embed_type") == "image_hint" or any("Skip" in name for name in blocks):
        raise ValueError(
            f"A weight-shared Dot is not supported for a {type(dash).__name__} with skip blocks or "
            "an image hint: they read the sample again, in whose place Dot has features. Your own "
            "Dot can still be attached with enable_morse(pipe, dot)."
        )
    entry, last = (base_layer(dash.get_submodule(name)) for name in (ports.entry, ports.exit))
    embedding = dash.get_submodule(time_embeddings(dash)[0])
    sizes: dict[str, object] = {"time_embed_dim": embedding.linear_2.out_features}
    if ports.features == "picture":
        halvings = 0 if ports.any_size else len(dash.config.block_out_channels) - 1
        return sizes | {
            "sample_channels": entry.in_channels,
            "output_channels": last.out_channels,
            "feature_channels": entry.out_channels,
            "size_multiple": 2 ** (num_down_blocks + halvings),
        }
    sizes["feature_channels"] = last.in_features
    if ports.features == "packed":
        channels = {"sample_channels": entry.in_features, "output_channels": last.out_features}
        return sizes | channels | {"size_multiple": 1}
    patch = entry.patch_size
    return sizes | {
        "sample_channels": base_layer(entry.proj).in_channels,
        "output_channels": last.out_features // patch**2,
        "size_multiple": patch,  # Dash's own; samples are filled up to what Dot needs
        "patch_size": patch,
    }


def default_widths(dash: nn.Module) -> tuple[int, ...]:
    """Channels of Dot's blocks; wider on tokens, which stand for 2x2 positions of the latents."""
    factor = 1 if find_ports(dash).features == "picture" else 4
    return tuple(factor * width for width in (16, 32, 64))
