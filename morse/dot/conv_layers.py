"""Dynamic convolutions as Dot's extra blocks hold them, and how they hear the time."""

import threading
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from morse.dot.conv_settings import ConvSettings
from morse.modules.kernel_warehouse import Warehouse
from morse.modules.kernel_warehouse_layers import KWConv2d
from morse.modules.odconv import ODConv2d


class _Heard(threading.local):
    """The time that convolutions hear, in each thread its own.

    A ContextVar would break the graphs of torch.compile, whose tracer would take a default in this
    class for the time.
    """

    def __init__(self) -> None:
        self.time: Tensor | None = None


_HEARD = _Heard()


class _InDot:
    """Mixed into a dynamic layer: its temperature is not saved, and its block tells it the time.

    It is a number and no buffer: what a file does not hold may get no memory when diffusers loads
    it.
    """

    _load_from_state_dict = nn.Module._load_from_state_dict

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature; ValueError if the layer cannot take it."""
        self.temperature = self.checked_temperature(temperature)

    _begin_at = set_temperature

    def _read_temperature(self) -> float:
        return self.temperature

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, with the kernel of the time heard last if the layer listens to it."""
        time = None if self.cond_dim is None else _HEARD.time
        # An expanded row is known to be one for all, without a look at its values.
        return super().forward(x, time[:1] if time is not None and time.stride(0) == 0 else time)


class DotODConv2d(_InDot, ODConv2d):
    """`ODConv2d` inside Dot."""


class DotKWConv2d(_InDot, KWConv2d):
    """`KWConv2d` inside Dot."""


class DotWarehouse(Warehouse):
    """`Warehouse` inside Dot; whether Dot's warehouses save parameters is judged together."""

    def conv2d(self, *sizes: object, **options: object) -> DotKWConv2d:
        """Create a layer of this warehouse."""
        return self._register(DotKWConv2d(*sizes, **options))

    def _warn_unless_saving(self) -> None:
        """Leave it to `warn_unless_saving`."""


def tell_time(layers: Collection[nn.Module], time_embedding: Tensor | None) -> None:
    """Let a block's convolutions hear the time (B, C) if any listen, until told None."""
    if layers:
        _HEARD.time = time_embedding


def share_time(
    settings: ConvSettings | None, embedding: Tensor, sources: Iterable[Tensor | None]
) -> Tensor:
    """Give a time embedding as one repeated row if all that it is made of is equal for all samples.

    Then one kernel serves the whole batch. Where no convolution listens to the time, nothing is
    looked at; a look waits for the device, and none is possible while a CUDA graph is captured.

    Args:
        settings: Those of the convolutions.
        embedding: (B, C).
        sources: Timesteps and scales that it is made of, each () or (B or 1, ...), or None. They
            decide, not its own rows: half precision rounds those of close times to almost the same
            values, and a matrix product may round those of equal times differently.
    """
    if settings is None or settings.condition != "time" or len(embedding) <= 1:
        return embedding
    if embedding.is_cuda and torch.cuda.is_current_stream_capturing():
        return embedding
    alike = all(_is_shared(source) for source in sources if source is not None)
    return embedding[:1].expand_as(embedding) if alike else embedding


def _is_shared(source: Tensor) -> bool:
    """Say whether all rows are equal, looking at values only where the layout leaves it open."""
    if source.dim() == 0 or len(source) <= 1 or source.stride(0) == 0:
        return True
    return bool((source[1:] == source[:1]).all())
