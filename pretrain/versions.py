"""Versions of what figures and bits hang on."""

import platform
from importlib.metadata import PackageNotFoundError, version

import pretrain

RUN_PACKAGES = ("torch", "lightning")
"""Whose versions a run's log and its checkpoints name."""


def versions(*packages: str) -> dict[str, str]:
    """Name -> version: Cria's, Python's, and those of `packages` that are installed."""
    found = {"cria": pretrain.__version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
