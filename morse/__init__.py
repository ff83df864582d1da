"""Morse: faster sampling for pretrained diffusion models with a frozen Dash and a fast Dot."""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "MorsePlan": "morse.plan",
    "morse_sample": "morse.sampling",
    "dot_loss": "morse.sampling",
    "MorseDot": "morse.dot",
    "enable_morse": "morse.attach",
    "disable_morse": "morse.attach",
    "MorsePipeline": "morse.pipeline",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Import public names on first use, so that `import morse` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'morse' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
