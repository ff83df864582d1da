"""Runs a tree of shells of Dash on Dot's own features, with Dash's own forward method."""

from torch import Tensor, nn

from morse.dot.shell import make_shell
from morse.dot.view import find_ports


class _Provide(nn.Module):
    """Takes a layer's place and returns what was already computed for it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.value


def embed_time(
    tree: nn.Module, timestep: Tensor, sample: Tensor, guidance: Tensor | None = None
) -> Tensor:
    """Embed timesteps with the tree's own layers.

    Args:
        tree: A tree of shells.
        timestep: () or (B,).
        sample: Of which only the batch size B and the precision are looked at.
        guidance: The embedded guidance scale of latent consistency models, `timestep_cond`,
            (B, C), which their time embedding takes too.

    Returns:
        (B, time_embed_dim).
    """
    ports = find_ports(tree)
    timestep = timestep.reshape(-1).expand(sample.shape[0])
    projected = getattr(tree, ports.time_projection)(timestep)
    embedding = getattr(tree, ports.time_embedding)
    projected = projected.to(sample.dtype)  # not the weights', which may be stored in float8
    return embedding(projected) if guidance is None else embedding(projected, guidance)


def run_body(
    tree: nn.Module, features: Tensor, timestep: Tensor, time_embedding: Tensor, **kwargs: object
) -> Tensor:
    """Run the shared layers between entry and exit with Dash's own forward method.

    Args:
        tree: A tree of shells.
        features: In place of what the entry returns, (B, C, h, w).
        timestep: Handed on to the forward method, () or (B,).
        time_embedding: In place of the tree's time embedding, (B, time_embed_dim).
        kwargs: Further conditions that Dash's forward method takes.

    Returns:
        What would go into the exit, (B, C, h, w).
    """
    ports = find_ports(tree)
    body = make_shell(tree)
    # Dash's hooks (offloading, Morse's own switch) belong to Dash's calls alone.
    body.__dict__.pop("forward", None)
    body._modules[ports.entry] = _Provide(features)
    body._modules[ports.time_embedding] = _Provide(time_embedding)
    body._modules[ports.exit] = nn.Identity()
    # The features stand in for the sample, of which the forward method reads only size and dtype.
    return type(body).forward(body, features, timestep, return_dict=False, **kwargs)[0]


# Features for the inside of Dash from a ControlNet or T2I-Adapter, at Dash's resolutions.
_FEATURES = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def pool_features(conditions: dict[str, object], factor: int) -> dict[str, object]:
    """Average a ControlNet's or T2I-Adapter's features over squares of `factor` positions.

    Args:
        conditions: Keyword arguments of Dash's forward method; the others are handed on as given.
        factor: 2^m, how many times fewer rows and columns Dash's layers see inside Dot.
    """

    def pool(features: object) -> object:
        if isinstance(features, Tensor):
            return nn.functional.avg_pool2d(features, factor, ceil_mode=True)
        return [pool(each) for each in features]

    given = [name for name in _FEATURES if conditions.get(name) is not None]
    return conditions | {name: pool(conditions[name]) for name in given}


def check_size(sample: Tensor, multiple: int, num_down_blocks: int) -> None:
    """Raise `ValueError` unless height and width of a sample are multiples of `multiple`."""
    height, width = sample.shape[-2:]
    if height % multiple or width % multiple:
        raise ValueError(
            f"sample is {height}x{width}, but this Dot (num_down_blocks={num_down_blocks}) needs "
            f"multiples of {multiple}: use such a size, or train a Dot with fewer down blocks."
        )
