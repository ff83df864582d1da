"""One model's call as graphs that are replayed, and as it is where there can be none."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from threading import RLock
from weakref import WeakSet

import torch
from torch import Tensor, nn

from morse.capture import (
    Capture,
    ModelState,
    UnknownKindError,
    describe,
    describe_modes,
    find_hook,
    identify,
    map_tensors,
)
from morse.dot import MorseDot
from morse.dot.ports import find_ports
from morse.sampling import JumpPoint

_MAX_FAILURES = 8  # kinds of calls that can't be captured, before no other is tried


@dataclass
class Shared:
    """What the models of one pipeline share: one of them at a time is captured or replayed."""

    capture: Capture
    lock: object = field(default_factory=RLock)
    is_capturing: bool = False
    modules: WeakSet[nn.Module] = field(default_factory=WeakSet)  # their graphs share memory


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


@dataclass(frozen=True)
class _Without:
    """Why a call has no graph, and its kind where capturing failed and is not to be tried again."""

    reason: str
    failed: Hashable = None


class _StatefulError(Exception):
    pass


class GraphedCall:
    """Stands for a model's call and replays graphs of it; see `morse.graphs.enable_cuda_graphs`.

    Attributes:
        module: The model.
        compiled: What its `compile()` left, which is captured instead; None where it did not.
        shared: What it has in common with the other models of the pipeline.
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
        self.shared, self._max_graphs = shared, max_graphs
        shared.modules.add(module)
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._state: ModelState | None = None
        self._failures: dict[Hashable, str] = {}
        self._never: str | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the model, with the output in the usual container and in memory of its own."""
        if torch.compiler.is_compiling():
            return self._plain(*args, **kwargs)
        with self.shared.lock:
            answered = self._answer(args, kwargs)
        if isinstance(answered, tuple):
            return answered[0]
        output = self._plain(*args, **kwargs)
        # Not before: a caller's own mistake is raised, and says nothing of later calls.
        if answered is not None:
            self._note(answered)
        return output

    def forget(self) -> None:
        """Free the graphs and let go of the weights that they were made of."""
        with self.shared.lock:
            self._graphs, self._state = OrderedDict(), None

    def _plain(self, *args: object, **kwargs: object) -> object:
        return (self.compiled or self.module._call_impl)(*args, **kwargs)

    def _note(self, without: _Without) -> None:
        if without.failed is not None:
            self._failures[without.failed] = without.reason
        if without.reason not in self.reasons:
            self.reasons.add(without.reason)
            name = type(self.module).__name__
            warnings.warn(f"{name} is called without a CUDA graph: {without.reason}.", stacklevel=4)

    def _answer(self, args: tuple, kwargs: dict) -> tuple[object] | _Without | None:
        """Give (output,), or why there is no graph; None inside of another model's capture."""
        if self.shared.is_capturing:
            return None
        if torch.is_grad_enabled():
            return _Without("gradients are enabled; call it under torch.no_grad()")
        problem = self._never or _why_never(self.module)
        if problem is not None:
            return _Without(problem)
        tensors: list[Tensor] = []
        arguments = self._without_earlier((args, kwargs))
        try:
            kind = describe(arguments, tensors)
        except UnknownKindError as error:
            return _Without(str(error))
        device_type = self.shared.capture.device_type
        device = next((each.device for each in tensors if each.device.type == device_type), None)
        if device is None:
            if self._state is not None and self._state.has_changed():  # to have the memory
                self.forget()
            return _Without(f"it is not given tensors on {device_type}")
        key = (kind, *describe_modes(device_type))
        if key in self._failures:
            return _Without(self._failures[key])
        return self._replay(key, tensors, arguments, device)

    def _replay(
        self, key: Hashable, tensors: list[Tensor], arguments: tuple, device: torch.device
    ) -> tuple[object] | _Without:
        graph, state = self._graphs.get(key), self._state
        stale = state is None or state.has_moved()
        if graph is not None and not stale:
            output = graph.run(tensors)
            self._graphs.move_to_end(key)
        replaced = None
        # The rest is looked at while the device works.
        if stale or state.has_changed():
            replaced, graph = self._graphs, None
            self.forget()
        if graph is None:
            graph = self._make(key, arguments, device)
            if isinstance(graph, _Without):
                return graph
            self._keep(key, graph)
            output = graph.run(tensors)
        del replaced  # not before, as one of them may have been running: capturing waits for it
        self.num_replays += 1
        return (output,)

    def _make(self, key: Hashable, arguments: tuple, device: torch.device) -> _Graph | _Without:
        hooked = find_hook((*_roots(self.module), *getattr(self.module, "_dash", ())))
        if hooked is not None:
            return _Without(f"its {hooked} has a hook or another forward method")
        if len(self._failures) >= _MAX_FAILURES:
            return _Without("capturing others of its calls failed")
        inputs: list[Tensor] = []

        def hold(tensor: Tensor) -> Tensor:
            # Some schedulers' timesteps are on the CPU, which a graph can't copy from.
            inputs.append(torch.empty_like(tensor, device=device).copy_(tensor))
            return inputs[-1]

        held = map_tensors(arguments, hold)
        self.shared.is_capturing = True
        try:
            replay, output = self.shared.capture(lambda: self._call_held(held), device)
            describe(output, [])
        except _StatefulError:
            self._never = "it writes to its jump point's memory"
            return _Without(self._never)
        except (RuntimeError, UnknownKindError) as error:
            told = str(error).strip().partition("\n")[0]
            return _Without(f"capturing it failed ({told})", failed=key)
        finally:
            self.shared.is_capturing = False
        return _Graph(inputs, replay, output)

    def _call_held(self, held: tuple[tuple, dict]) -> object:
        # In new containers each time: diffusers' UNet empties its list of an adapter's features.
        args, kwargs = map_tensors(held, lambda tensor: tensor)
        given = (*args, *kwargs.values())
        memories = [each.memory for each in given if isinstance(each, JumpPoint)]
        before = identify(memories)
        output = self._plain(*args, **kwargs)
        if identify(memories) != before:
            raise _StatefulError
        return output

    def _keep(self, key: Hashable, graph: _Graph) -> None:
        self.num_captures += 1
        if self._state is not None and self._state.has_changed():
            self._graphs.clear()  # they were made of what it was before this capture
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


def _roots(module: nn.Module) -> tuple[nn.Module, ...]:
    """Give a model with the layers of Dash that it runs, which are no part of a Dot."""
    return (module, *module._tree) if isinstance(module, MorseDot) else (module,)


def _why_never(module: nn.Module) -> str | None:
    """Say what a graph would get wrong of a Dot, whatever it is called with; None for nothing."""
    if not isinstance(module, MorseDot):
        return None
    if module.conv_settings is not None and module.conv_settings.condition == "time":
        return "its convolutions look at the values of the time"
    if module._dash and find_ports(module._dash[0]).features == "packed":
        return "it reads the picture's size from the values of img_ids"
    return None
