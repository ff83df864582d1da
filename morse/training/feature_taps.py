"""Features of Dash and of Dot, read while they run with hooks that are gone afterwards.

Dot runs shells of Dash's layers (`morse.dot.view`), which share their modules' hooks: a hook on a
layer of Dash reads Dot's feature there while Dot runs. Where features are read:

- `last`: what goes into Dash's last layer. In a UNet it has passed the final norm and activation,
  so that its scale hardly changes with the timestep. Dot's counterpart is `trunk`, what comes out
  of the shared layers and goes into Dot's own, at 2^m times fewer rows and columns.
- `fine`: the output of Dot's last block, at the resolution of `last`.
- `mid`: the output of the last but one stage, as in ScaleKD: a UNet's last but one up block, or a
  transformer's block before the last two.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from morse.dot import MorseDot
from morse.dot.grid import find_grid
from morse.dot.ports import find_ports

_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
_REMAINING = 2  # blocks after a transformer's `mid`


class BlockCall(NamedTuple):
    """How Dash called one of its blocks, without the tokens."""

    block: nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


class TeacherFeatures(NamedTuple):
    """Dash's features.

    Attributes:
        last: (B, C, H, W).
        final: The last block's output, (B, C, H, W); None of a UNet.
        calls: Of a transformer's blocks after `mid`.
    """

    last: Tensor
    final: Tensor | None
    calls: tuple[BlockCall, ...]


class StudentFeatures(NamedTuple):
    """Dot's features; H and W are those of `TeacherFeatures.last`, h and w of `trunk`.

    Attributes:
        mid: (B, C, h', w'), or tokens (B, h * w, C).
        trunk: (B, C, h, w).
        fine: (B, C, H, W).
        expanded: Of NORM's transform, (B, N * C, h, w); None without one.
    """

    mid: Tensor
    trunk: Tensor
    fine: Tensor
    expanded: Tensor | None


@contextmanager
def hooks(*registered: RemovableHandle) -> Iterator[None]:
    """Remove hooks at the end, however it comes."""
    with ExitStack() as stack:
        for handle in registered:
            stack.enter_context(handle)
        yield


def _keep_output(layer: nn.Module, found: dict[str, Tensor], name: str) -> RemovableHandle:
    def keep(_: nn.Module, args: tuple[object, ...], output: object) -> None:
        # Transformers with two streams return text and picture, some UNets' blocks picture and
        # skip connection.
        several = isinstance(output, tuple)
        tokens = several and isinstance(output[-1], Tensor) and output[-1].ndim == 3
        found[name] = output[-1 if tokens else 0] if several else output

    return layer.register_forward_hook(keep)


def _keep_input(layer: nn.Module, found: dict[str, Tensor], name: str) -> RemovableHandle:
    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = args[0]

    return layer.register_forward_pre_hook(keep)


def _keep_call(block: nn.Module, calls: list[BlockCall]) -> RemovableHandle:
    def keep(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(BlockCall(block, args[1:], others))

    return block.register_forward_pre_hook(keep, with_kwargs=True)


def _blocks_of(dash: nn.Module) -> list[nn.Module]:
    """List the blocks of a transformer, in order; none of a UNet."""
    if find_ports(dash).features == "picture":
        return []
    return [block for name in _BLOCKS for block in getattr(dash, name, None) or ()]


def _middle(dash: nn.Module) -> nn.Module:
    blocks = _blocks_of(dash)
    if blocks:
        return blocks[max(0, len(blocks) - 1 - _REMAINING)]
    return dash.up_blocks[-2] if len(dash.up_blocks) > 1 else dash.mid_block


@torch.no_grad()
def read_teacher(
    dash: nn.Module, dot: MorseDot, sample: Tensor, timestep: Tensor, conditions: dict[str, object]
) -> TeacherFeatures:
    """Evaluate Dash, as its forward method is called, and give its features.

    Args:
        dash: The frozen denoiser.
        dot: Its Dot, which knows how samples are cut into patches.
        sample: (B, C, H, W).
        timestep: (B,).
        conditions: Further arguments of the forward method.
    """
    ports, blocks = find_ports(dash), _blocks_of(dash)
    found: dict[str, Tensor] = {}
    calls: list[BlockCall] = []
    after = blocks[max(1, len(blocks) - _REMAINING) :]
    registered = [_keep_input(dash.get_submodule(ports.exit), found, "last")]
    registered += [_keep_output(block, found, "final") for block in blocks[-1:]]
    registered += [_keep_call(block, calls) for block in after]
    with hooks(*registered):
        dash(sample, timestep=timestep, return_dict=False, **conditions)
    grid = find_grid(ports, sample, conditions.get("img_ids"), dot.config)
    size = [side // dot.config.patch_size for side in (grid.height, grid.width)]
    maps = {
        name: value if value.ndim == 4 else value.transpose(1, 2).unflatten(2, size)
        for name, value in found.items()
    }
    return TeacherFeatures(maps["last"].float(), maps.get("final"), tuple(calls))


def read_student(
    dash: nn.Module, dot: MorseDot, run: Callable[[], Tensor], expanded: list[Tensor]
) -> tuple[Tensor, StudentFeatures]:
    """Run Dot and give its result and features.

    Args:
        dash: The one that it is bound to.
        dot: The network.
        run: Evaluates it.
        expanded: Gets what NORM's transform makes meanwhile, if there is one.
    """
    found: dict[str, Tensor] = {}
    with hooks(
        _keep_output(_middle(dash), found, "mid"),
        _keep_input(dot.up_blocks[0], found, "trunk"),
        _keep_output(dot.up_blocks[-1], found, "fine"),
    ):
        residual = run()
    return residual, StudentFeatures(**found, expanded=expanded[-1] if expanded else None)
