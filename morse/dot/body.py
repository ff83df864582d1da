"""Runs a tree of shells of Dash on Dot's own features, with Dash's own forward method."""

import inspect

import torch
from torch import Tensor, nn

from morse.dot.grid import Grid
from morse.dot.ports import find_ports, time_embeddings
from morse.dot.shell import Provide, with_replaced
from morse.dot.tokens import Tap, pool_conditions, to_tokens, tokens_of_patches
from morse.signatures import find_signature


def embed_times(
    tree: nn.Module, timestep: Tensor, dtype: torch.dtype, guidance: Tensor | None = None
) -> dict[str, Tensor]:
    """Embed timesteps with the tree's own layers, of which some transformers have one a block.

    Args:
        tree: A tree of shells.
        timestep: (B,).
        dtype: The sample's; that of the weights may be float8, in which they are only stored.
        guidance: The embedded guidance scale of latent consistency models, `timestep_cond`,
            (B, C), which their time embedding takes too.

    Returns:
        (B, time_embed_dim) by the layer's name; Dot's own blocks listen to the first.
    """
    projected = _project(tree, timestep, dtype)
    conditions = () if guidance is None else (guidance,)
    return {
        name: tree.get_submodule(name)(projected, *conditions) for name in time_embeddings(tree)
    }


def embed_time(tree: nn.Module, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Embed timesteps (B,) with the first of those layers alone, (B, time_embed_dim)."""
    return tree.get_submodule(time_embeddings(tree)[0])(_project(tree, timestep, dtype))


def _project(tree: nn.Module, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    ports = find_ports(tree)
    if ports.time_scale != 1:
        timestep = timestep.to(dtype) * ports.time_scale  # rounded as Dash rounds it
    return tree.get_submodule(ports.time_projection)(timestep).to(dtype)


def run_body(
    tree: nn.Module,
    features: Tensor,
    timestep: Tensor,
    times: dict[str, Tensor],
    grid: Grid,
    factor: int,
    conditions: dict[str, object],
) -> Tensor:
    """Run the shared layers between entry and exit with Dash's own forward method.

    Args:
        tree: A tree of shells.
        features: In place of what the entry returns, (B, C, h, w).
        timestep: Handed on to the forward method, (B,).
        times: In place of the tree's time embeddings, as from `embed_times`.
        grid: The sample's.
        factor: 2^m, how many times fewer rows and columns Dash's layers see inside Dot.
        conditions: Further arguments that Dash's forward method takes.

    Returns:
        What would go into the exit, as a picture (B, C, h, w).
    """
    ports = find_ports(tree)
    replaced: dict[str, nn.Module] = {name: Provide(value) for name, value in times.items()}
    if ports.features == "picture":
        replaced |= {ports.entry: Provide(features), ports.exit: nn.Identity()}
        conditions = pool_features(conditions, factor)
        # The features stand in for the sample, of which only size and dtype are read.
        return _forward(with_replaced(tree, replaced), features, timestep, conditions)
    entry, tap = tree.get_submodule(ports.entry), Tap(tree.get_submodule(ports.exit).out_features)
    patch_size = 1
    if ports.features == "patches":
        patch_size = entry.patch_size
        tokens, sample = tokens_of_patches(entry, features, grid, factor)
    else:
        tokens = sample = to_tokens(features)
    size = grid.height // patch_size, grid.width // patch_size
    replaced |= {ports.entry: Provide(tokens), ports.exit: tap}
    conditions = pool_conditions(conditions, size, factor)
    _forward(with_replaced(tree, replaced), sample, timestep, conditions)
    return tap.tokens.transpose(1, 2).unflatten(2, features.shape[-2:])


def _forward(
    body: nn.Module, sample: Tensor, timestep: Tensor, conditions: dict[str, object]
) -> Tensor:
    # Dash's hooks (offloading, Morse's own switch) belong to Dash's calls alone.
    body.__dict__.pop("forward", None)
    conditions = _missing(type(body)) | conditions
    run = type(body).forward
    return run(body, sample, timestep=timestep, return_dict=False, **conditions)[0]


def _missing(kind: type) -> dict[str, None]:
    """Give None for each condition that a denoiser's forward method must be given.

    Some pipelines have none for it, as Kandinsky's text; conditions that are None are left out.
    """
    _, _, *parameters = find_signature(kind, "forward").parameters.values()  # self and the sample
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [each for each in parameters if each.kind not in open_ended]
    required = [each.name for each in named if each.default is each.empty]
    return {name: None for name in required if name != "timestep"}


# Features for the inside of a UNet from a ControlNet or T2I-Adapter, at Dash's resolutions.
_FEATURES = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def pool_features(conditions: dict[str, object], factor: int) -> dict[str, object]:
    """Average a ControlNet's or T2I-Adapter's features over squares of `factor` positions.

    Args:
        conditions: Keyword arguments of a UNet's forward method; the others are handed on as given.
        factor: 2^m, how many times fewer rows and columns Dash's layers see inside Dot.
    """

    def pool(features: object) -> object:
        if isinstance(features, Tensor):
            return nn.functional.avg_pool2d(features, factor, ceil_mode=True)
        return [pool(each) for each in features]

    given = [name for name in _FEATURES if conditions.get(name) is not None]
    return conditions | {name: pool(conditions[name]) for name in given}
