"""One model's call as graphs that are replayed, and as it is where there can be none."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from threading import RLock

import torch
from torch import Tensor, nn

from morse.capture import Capture, ModelState, UnknownKindError, describe, find_hook, map_tensors
from morse.dot import MorseDot
from morse.dot.ports import find_ports
from morse.sampling import JumpPoint


@dataclass
class Shared:
    """What the models of one pipeline share: one of them at a time is captured or replayed."""

    capture: Capture
    lock: object = field(default_factory=RLock)
    is_capturing: bool = False


@dataclass(frozen=True, eq=False)
class _Graph:
    inputs: list[Tensor]
    replay: Callable[[], object]
    output: object

    def run(self, tensors: list[Tensor]) -> object:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        self.replay()
        return map_tensors(self.output, torch.clone)


class GraphedCall:
    """Stands for a model's call and replays graphs of it; see `morse.graphs.enable_cuda_graphs`.

    Attributes:
        module: The model.
        compiled: What its `compile()` left, which is captured instead; None where it did not.
        num_captures: Graphs made.
        num_replays: Calls answered by graphs.
        reasons: Why calls were made without.
    """

    def __init__(
        self,
        module: nn.Module,
        compiled: Callable[..., object] | None,
        shared: Shared,
        max_graphs: int,
    ) -> None:
        """Start without graphs."""
        self.module, self.compiled = module, compiled
        self.num_captures = self.num_replays = 0
        self.reasons: set[str] = set()
        self._shared, self._max_graphs = shared, max_graphs
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._state: ModelState | None = None
        self._failure: str | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the model, with the output in the usual container and in memory of its own."""
        if torch.compiler.is_compiling():
            return self._plain(*args, **kwargs)
        with self._shared.lock:
            answered = self._answer(args, kwargs)
        if isinstance(answered, str):
            self._note(answered)
        if not isinstance(answered, tuple):
            return self._plain(*args, **kwargs)
        return answered[0]

    def _plain(self, *args: object, **kwargs: object) -> object:
        return (self.compiled or self.module._call_impl)(*args, **kwargs)

    def _note(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.add(reason)
            name = type(self.module).__name__
            warnings.warn(f"{name} is called without a CUDA graph: {reason}.", stacklevel=4)

    def _answer(self, args: tuple, kwargs: dict) -> tuple[object] | str | None:
        """Give (output,), or why there is no graph; None inside of another model's capture."""
        if self._shared.is_capturing:
            return None
        if self._failure is not None:
            return self._failure
        if torch.is_grad_enabled():
            return "gradients are enabled; call it under torch.no_grad()"
        problem = _why_never(self.module)
        if problem is not None:
            return problem
        tensors: list[Tensor] = []
        arguments = self._without_earlier((args, kwargs))
        try:
            kind = describe(arguments, tensors)
        except UnknownKindError as error:
            return str(error)
        device_type = self._shared.capture.device_type
        device = next((each.device for each in tensors if each.device.type == device_type), None)
        if device is None:
            return f"it is not given tensors on {device_type}"
        return self._replay((kind, *_modes(device_type)), tensors, arguments, device)

    def _replay(
        self, key: Hashable, tensors: list[Tensor], arguments: tuple, device: torch.device
    ) -> tuple[object] | str:
        graph, state = self._graphs.get(key), self._state
        stale = state is None or state.has_moved()
        if graph is not None and not stale:
            output = graph.run(tensors)
            self._graphs.move_to_end(key)
        replaced = None
        # The rest is looked at while the device works.
        if stale or state.has_changed():
            replaced, graph = self._graphs, None
            self._graphs, self._state = OrderedDict(), None
        if graph is None:
            graph = self._make(tensors, arguments, device)
            if isinstance(graph, str):
                return graph
            self._keep(key, graph)
            output = graph.run(tensors)
        del replaced  # not before, as one of them may have been running: capturing waits for it
        self.num_replays += 1
        return (output,)

    def _make(self, tensors: list[Tensor], arguments: tuple, device: torch.device) -> _Graph | str:
        hooked = find_hook((*_roots(self.module), *getattr(self.module, "_dash", ())))
        if hooked is not None:
            return f"its {hooked} has a hook or another forward method"
        inputs: list[Tensor] = []

        def hold(tensor: Tensor) -> Tensor:
            # Some schedulers' timesteps are on the CPU, which a graph can't copy from.
            inputs.append(torch.empty_like(tensor, device=device).copy_(tensor))
            return inputs[-1]

        args, kwargs = map_tensors(arguments, hold)
        self._shared.is_capturing = True
        try:
            replay, output = self._shared.capture(lambda: self._plain(*args, **kwargs), device)
            describe(output, [])
        except (RuntimeError, UnknownKindError) as error:
            self._failure = f"capturing it failed ({str(error).strip().partition(chr(10))[0]})"
            return self._failure
        finally:
            self._shared.is_capturing = False
        return _Graph(inputs, replay, output)

    def _keep(self, key: Hashable, graph: _Graph) -> None:
        self.num_captures += 1
        self._graphs[key] = graph
        if len(self._graphs) > self._max_graphs:
            self._graphs.popitem(last=False)
        self._state = ModelState(_roots(self.module))

    def _without_earlier(self, arguments: tuple[tuple, dict]) -> tuple[tuple, dict]:
        """Leave out what a MorseDot does not read of a jump point, and need not be copied."""
        if not isinstance(self.module, MorseDot):
            return arguments

        def shorten(value: object) -> object:
            return replace(value, earlier=None) if isinstance(value, JumpPoint) else value

        args, kwargs = arguments
        return tuple(map(shorten, args)), {name: shorten(each) for name, each in kwargs.items()}


def _modes(device_type: str) -> tuple[object, ...]:
    """Give what of torch's state a call depends on."""
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    return autocast, torch.is_inference_mode_enabled()


def _roots(module: nn.Module) -> tuple[nn.Module, ...]:
    """Give a model with the layers of Dash that it runs, which are no part of a Dot."""
    return (module, *module._tree) if isinstance(module, MorseDot) else (module,)


def _why_never(module: nn.Module) -> str | None:
    """Say what a graph would get wrong of a Dot, whatever it is called with; None for nothing."""
    if not isinstance(module, MorseDot):
        return None
    if module.relay:
        return 'with norm="dnr" each call moves a state on'
    if module.conv_settings is not None and module.conv_settings.condition == "time":
        return "its convolutions look at the values of the time"
    if module._dash and find_ports(module._dash[0]).features == "packed":
        return "it reads the picture's size from the values of img_ids"
    return None
