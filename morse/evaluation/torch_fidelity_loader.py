"""torch-fidelity and torchmetrics, importable where torchvision is not installed.

torch-fidelity's `__init__` imports data sets and extractors that need torchvision, and torchmetrics
imports a part of torch-fidelity. The parts that measure need neither: Inception-v3, its resize and
the arithmetic of the metrics.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

PACKAGE = "torch_fidelity"
INSTALL = "run `pip install torch-fidelity`"


def fidelity_module(name: str) -> ModuleType:
    """Import a submodule of torch-fidelity, such as "metric_kid".

    Raises:
        ValueError: If torch-fidelity is not installed.
    """
    _prepare()
    full_name = f"{PACKAGE}.{name}"
    if full_name in sys.modules or find_spec("torchvision") is not None:
        return importlib.import_module(full_name)
    with _stand_in_for_utils():
        return importlib.import_module(full_name)


def torchmetrics_module(name: str) -> ModuleType:
    """Import a submodule of torchmetrics, such as "functional.image"."""
    if find_spec(PACKAGE) is not None:  # torchmetrics imports it if it is there
        _prepare()
    return importlib.import_module(f"torchmetrics.{name}")


def _prepare() -> None:
    """Register the package without running its `__init__` if that would fail."""
    if PACKAGE in sys.modules:
        return
    spec = find_spec(PACKAGE)
    if spec is None:
        raise ValueError(f"this measure needs the `torch-fidelity` package; {INSTALL}")
    if find_spec("torchvision") is None:
        package = ModuleType(PACKAGE)
        package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules[PACKAGE] = package


@contextmanager
def _stand_in_for_utils() -> Iterator[None]:
    """Serve the metrics' imports from `torch_fidelity.utils`, which itself imports torchvision.

    Only their functions that read images call what they import; those on features don't.
    """
    name = f"{PACKAGE}.utils"
    stand_in = ModuleType(name)
    stand_in.__getattr__ = _needs_torchvision
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]


def _needs_torchvision(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError(f"torch_fidelity.utils.{name} needs torchvision")

    return refuse
