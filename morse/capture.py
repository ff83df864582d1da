"""What CUDA graphs of a model's calls are made of (`morse.graphs`): arguments, state, capturing.

A graph is a recording of kernels. It reads the memory that it was recorded with, so a call's
tensors are copied to where its recorded arguments lie, and nothing that Python did meanwhile, such
as the look at a flag, is done again.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, is_dataclass
from types import MethodType, NoneType
from typing import Protocol

import torch
from torch import Tensor, nn

_PLAIN = (NoneType, bool, int, float, str, torch.dtype, torch.device)
_WARM_UPS = 3  # libraries choose their algorithms and take their workspaces in the first calls


class Capture(Protocol):
    """Records a call; `device_type` is that of the tensors it can record."""

    device_type: str

    def __call__(
        self, call: Callable[[], object], device: torch.device
    ) -> tuple[Callable[[], object], object]:
        """Give what makes the call again, and its output, where each time the values then lie."""


class CudaCapture:
    """Records calls as CUDA graphs, those of a device in one pool of memory.

    Graphs of a pool may overwrite each other's outputs, so these must be copied after each replay,
    and replays must not overlap. Other threads may go on with what they do meanwhile, but not draw
    from the device's default generator: before torch 2.13 that raises while a call is recorded.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        """Start without a pool; one is made for each device when it is needed."""
        self._places: dict[torch.device, tuple[torch.cuda.Stream, object]] = {}

    def __call__(
        self, call: Callable[[], object], device: torch.device
    ) -> tuple[Callable[[], object], object]:
        """Warm up and record.

        Raises:
            RuntimeError: If the call waits for the device or does something else that a graph
                can't hold, or memory does not suffice.
        """
        with torch.cuda.device(device):
            # Taken out until it went well: a failed capture's pool may be left half open.
            stream, pool = self._places.pop(device, None) or (
                torch.cuda.Stream(),
                torch.cuda.graph_pool_handle(),
            )
            stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            # `torch.cuda.graph` alone would leave its stream the current one where it fails.
            with _mended_generator(), torch.cuda.stream(stream), _uncached_autocast():
                for _ in range(_WARM_UPS):
                    call()
                options = {"stream": stream, "capture_error_mode": "thread_local"}
                with torch.cuda.graph(graph, pool=pool, **options):
                    output = call()
            torch.cuda.current_stream().wait_stream(stream)
            self._places[device] = stream, pool
        return graph.replay, output


@contextmanager
def _mended_generator() -> Iterator[None]:
    """Let the current device's default generator draw on where a capture fails in this context.

    Before torch 2.13 its state would count as being captured, and refuse, for the rest of the
    process. A copy, which goes on where it stopped, does not.
    """
    try:
        yield
    except BaseException:
        with suppress(Exception):  # of a broken device; what broke it is what to raise
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
        raise


def _uncached_autocast() -> object:
    """Keep autocast's copies of weights, which it frees after a while, out of graphs."""
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)


class UnknownKindError(TypeError):
    """Arguments or outputs hold something that a graph can't be told of; says what."""


def describe(value: object, tensors: list[Tensor]) -> Hashable:
    """Describe arguments so that calls with equal descriptions can share a graph.

    Args:
        value: Tensors and plain values in tuples, lists, dictionaries and dataclasses.
        tensors: Those found are appended, in the order of `map_tensors`.

    Raises:
        UnknownKindError: If there is something else in it.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, _PLAIN):
        return type(value), value
    parts = _parts(value)
    return type(value), tuple((name, describe(part, tensors)) for name, part in parts)


def identify(value: object) -> Hashable:
    """Describe such a value and which tensors it has; unequal once it was given something else."""
    tensors: list[Tensor] = []
    try:
        return describe(value, tensors), *map(id, tensors)
    except UnknownKindError as error:
        return error


def describe_modes(device_type: str) -> tuple[object, ...]:
    """Describe what of torch's state a call depends on."""
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    return autocast, torch.is_inference_mode_enabled()


def map_tensors(value: object, function: Callable[[Tensor], Tensor]) -> object:
    """Make such a value anew, in the same containers, with `function` of each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, _PLAIN):
        return value
    parts = {name: map_tensors(part, function) for name, part in _parts(value)}
    if is_dataclass(value):
        return type(value)(**parts)
    return parts if type(value) is dict else type(value)(parts.values())


def _parts(value: object) -> Iterable[tuple[Hashable, object]]:
    if is_dataclass(value):  # before dictionaries: diffusers' outputs are both
        return [(each.name, getattr(value, each.name)) for each in fields(value)]
    if type(value) is dict:
        return value.items()
    if type(value) in (tuple, list):
        return enumerate(value)
    raise UnknownKindError(f"it is given or returns a {type(value).__name__}")


class ModelState:
    """What graphs of some modules were made of; they are of no use once it is another."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        """Take the state of modules with all they contain."""
        self._modules = [module for root in roots for module in root.modules()]
        self._attributes = [vars(module) for module in self._modules]
        self._tables = [table for own in self._attributes for table in _tables(own)]
        self._filled = [table for table in self._tables if table]
        self._settings = self._read_settings()
        # Held: what a graph reads is not freed where a layer gets another tensor, and an address
        # that changes is that of a tensor moved as a whole.
        self._weights = [
            tensor
            for module in self._modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        self._addresses = [*map(_address, self._weights)]

    def has_moved(self) -> bool:
        """Tell whether weights lie elsewhere now, so that a graph may read freed memory."""
        return [*map(_address, self._weights)] != self._addresses

    def has_changed(self) -> bool:
        """Tell whether layers, weights or settings were replaced since, or weights moved.

        That takes about a millisecond for Stable Diffusion's UNet.
        """
        try:
            return self.has_moved() or self._read_settings() != self._settings
        except (RuntimeError, ValueError):  # tensors, which are not compared unless replaced
            return True

    def _read_settings(self) -> tuple[list, ...]:
        values = [tuple(own.values()) for own in self._attributes]
        held = [tuple(t.values() if isinstance(t, dict) else t) for t in self._filled]
        return [*map(type, self._modules)], values, [*map(len, self._tables)], held


def _tables(own: dict[str, object]) -> list[dict | list]:
    """List what of a module's attributes is filled and changed in place, as for its children.

    An attention processor's own attributes are among them.
    """
    tables = [value for value in own.values() if isinstance(value, (dict, list))]
    processor = getattr(own.get("processor"), "__dict__", None)
    return tables if processor is None else [*tables, processor]


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # quantised weights of several tensors have none
        return id(tensor)


def find_hook(roots: Iterable[nn.Module]) -> str | None:
    """Name the class of a module that runs more than its own method, as hooks make it do."""
    for module in (module for root in roots for module in root.modules()):
        forward = vars(module).get("forward")
        own = isinstance(forward, MethodType) and forward.__func__ is type(module).forward
        replaced = forward is not None and not (own and forward.__self__ is module)
        if replaced or module._forward_hooks or module._forward_pre_hooks:
            return type(module).__name__
    return None
