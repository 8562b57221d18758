"""Versions of what figures and bits hang on."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def own_version() -> str:
    """Cria's version and, in a checkout, the commit: what figures are of. A `-dirty` one had changes."""
    here = Path(__file__).parent.parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    inside = (here / ".git").exists()  # else it is the commit of what it was installed into
    return pretrain.__version__ + (f"+g{commit}" if commit and inside else "")
