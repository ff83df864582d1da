"""Shells: second objects for Dash's modules, which share all but their tables of children."""

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn

from morse.dot.wrapped import named_layers, unwrap
from morse.sampling import JumpPoint

# A shell's own; what else a module has, its shell gets at every `update_shell`.
_KEPT = ("_modules", "_parameters")
_NOT_SHARED = (*_KEPT, "_compiled_call_impl", "forward")


class Provide(nn.Module):
    """Takes a layer's place and returns what was already computed for it."""

    def __init__(self, value: Tensor) -> None:
        """Keep the value."""
        super().__init__()
        self.value = value

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return it, whatever comes in."""
        return self.value


def make_shell(module: nn.Module) -> nn.Module:
    """Make a shell of one module: shared tensors and settings, a children table of its own."""
    shell = object.__new__(type(module))
    vars(shell)["_modules"] = dict(module._modules)
    vars(shell)["_parameters"] = module._parameters
    update_shell(shell, module)
    return shell


def with_replaced(root: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Make a shell of `root` with other modules under some dotted names; `root` stays as it is."""
    shells = {"": make_shell(root)}
    for path, module in replacements.items():
        *parents, last = path.split(".")
        name, parent = "", shells[""]
        for part in parents:
            name = f"{name}.{part}"
            if name not in shells:
                shells[name] = parent._modules[part] = make_shell(parent._modules[part])
            parent = shells[name]
        parent._modules[last] = module
    return shells[""]


def original_of(module: nn.Module) -> nn.Module:
    """Give the module of Dash that a shell was made of, or the module itself."""
    return vars(module).get("_dot_original", module)


def update_shell(shell: nn.Module, module: nn.Module) -> None:
    """Give a shell the settings that its module has now: attention processor, FreeU, ..."""
    own = vars(shell)
    state = {name: value for name, value in vars(module).items() if name not in _NOT_SHARED}
    state.setdefault("_dot_original", module)  # hooks know their module; a shell of a shell has it
    forward = _forward_for(shell, module)
    if forward is not None:
        state["forward"] = forward
    for name in [name for name in own if name not in state and name not in _KEPT]:
        del own[name]
    own.update(state)


def update_tree(tree: nn.Module, dash: nn.Module) -> None:
    """Do that for a tree of shells, which was made of the modules that Dash has now."""
    done: set[nn.Module] = set()

    def update(shell: nn.Module, module: nn.Module) -> None:
        if module in done:
            return
        done.add(module)
        update_shell(shell, module)
        for name, child in module._modules.items():
            if child is not None:
                update(shell._modules[name], unwrap(child))

    update(tree, dash)


def _forward_for(shell: nn.Module, module: nn.Module) -> Callable[..., object] | None:
    """Give what stands in a shell's `forward`; None for its class's own method.

    Removing a hook leaves the module's own method there. As it stands it would run the module in
    place of its shell, and with it layers that carry no LoRA.
    """
    if _is_hooked(module):
        return partial(_run_shell, shell, original_of(module))
    forward = _uncompiled_forward(module)
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return MethodType(forward.__func__, shell)
    return forward


def _uncompiled_forward(module: nn.Module) -> Callable[..., object] | None:
    """Give the forward method in a module's instance, or that which `torch.compile` made it of.

    What is compiled is bound to the module, and would run it in place of its shell.
    """
    forward = vars(module).get("forward")
    while hasattr(forward, "_torchdynamo_orig_callable"):
        forward = forward._torchdynamo_orig_callable
    return forward


def warn_of_other_forwards(dash: nn.Module, adapters: Collection[str]) -> None:
    """Warn of blocks that Dot runs without its LoRA, as a function stands in for their method.

    A closure around the method runs the block itself, not its shell. That of Dash as a whole takes
    no part in Dot.
    """
    for name, module in named_layers(dash):
        forward = _uncompiled_forward(module)
        bound = isinstance(forward, MethodType) and forward.__self__ is module
        if not name or forward is None or bound or _is_hooked(module):
            continue
        if any(f"{adapter}.".startswith(f"{name}.") for adapter in adapters):
            warnings.warn(
                f"Dash's {name!r} has another forward method, {forward!r}, which Dot runs as it "
                "is: there Dot's LoRA has no part, and its estimates are worse. Put it back while "
                "Morse is attached, or use a forward hook or .compile() instead.",
                stacklevel=2,
            )


def _run_shell(shell: nn.Module, module: nn.Module, *args: object, **kwargs: object) -> object:
    return run_hooked(module, partial(type(shell).forward, shell), *args, **kwargs)


def run_hooked(
    module: nn.Module, function: Callable[..., object], *args: object, **kwargs: object
) -> object:
    """Call `function` between the hooks of `module` that move or cast its weights.

    These are accelerate's and diffusers' (model, sequential and group offloading, layerwise
    casting). Hooks that answer in the module's place (caches) belong to Dash's calls alone. A jump
    point, which no hook knows, follows the first argument.
    """
    hooks = _hooks_of(module)
    for hook in reversed(hooks):
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
    if hooks and any(isinstance(arg, JumpPoint) for arg in args):
        args = tuple(_follow(arg, args[0].device) for arg in args)
    output = function(*args, **kwargs)
    for hook in hooks:
        output = hook.post_forward(module, output)
    return output


def _follow(value: object, device: torch.device) -> object:
    """Move a jump point's tensors; its memory stays the same object, for Dot to write into."""
    if not isinstance(value, JumpPoint):
        return value
    own = {each.name: getattr(value, each.name) for each in fields(value)}
    moved = {name: each.to(device) for name, each in own.items() if isinstance(each, Tensor)}
    return replace(value, **moved, earlier=_follow(value.earlier, device))


def _is_hooked(module: nn.Module) -> bool:
    state = vars(module)
    return "_hf_hook" in state or bool(getattr(state.get("_diffusers_hook"), "hooks", None))


def _hooks_of(module: nn.Module) -> list[object]:
    """List the hooks to run, from the innermost outwards."""
    state = vars(module)
    hooks = [state["_hf_hook"]] if "_hf_hook" in state else []
    registry = state.get("_diffusers_hook")
    if registry is not None:
        hooks += [hook for hook in registry.hooks.values() if not hasattr(hook, "new_forward")]
    return hooks


def _single_hooks(module: nn.Module) -> Iterator[object]:
    for hook in _hooks_of(module):
        yield from getattr(hook, "hooks", (hook,))  # accelerate puts several into one


def moves_weights(model: nn.Module) -> bool:
    """Tell whether hooks move or cast a model's weights while it runs.

    Those that `device_map` puts on every layer move inputs alone: they say that they don't offload.
    """
    hooks = (hook for module in model.modules() for hook in _single_hooks(module))
    return any(getattr(hook, "offload", True) for hook in hooks)


def execution_device(model: nn.Module) -> torch.device | None:
    """Tell where accelerate's hook on a model runs it; None where there is none."""
    devices = (getattr(hook, "execution_device", None) for hook in _single_hooks(model))
    found = next((device for device in devices if device is not None), None)
    return None if found is None else torch.device(found)
