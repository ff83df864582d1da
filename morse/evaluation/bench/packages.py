"""Versions of packages that are no dependencies of ours, but that figures were made with."""

import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version

PACKAGES = {"deepcache": "DeepCache", "tomesd": "tomesd", "cache-dit": "cache-dit"}  # of peers


def package_versions(kinds: Collection[str]) -> dict[str, str]:
    """Return the versions of what peers of these kinds run, and of transformers, if loaded.

    A run that goes on from another machine's figures may lack some, which are left out.
    """
    names = [name for kind, name in PACKAGES.items() if kind in kinds]
    names += ["transformers"] * ("transformers" in sys.modules)
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
