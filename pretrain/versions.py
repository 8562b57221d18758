"""The versions that measured figures and a run's exact bits depend on."""

import hashlib
import os
import platform
import subprocess
from functools import cache
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


def run_versions() -> dict[str, str]:
    """What a run's log and its checkpoints name, which rank 0 writes: there it asks git for the commit, too."""
    found = versions(*RUN_PACKAGES)
    return {**found, "cria": own_version()} if os.environ.get("RANK", "0") == "0" else found


@cache
def own_version() -> str:
    """Cria's version and, in a checkout, the commit: what figures are of. A `-dirty` one had changes."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():  # it is installed, maybe into another checkout
        return pretrain.__version__
    git = ["git", "-c", f"safe.directory={here}", "-C", str(here)]  # another user's checkout, too
    asked = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"])
    try:
        commit, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=30).stdout
            for words in asked
        )
    except (OSError, subprocess.SubprocessError):
        return pretrain.__version__
    return f"{pretrain.__version__}+g{commit.strip()}{'-dirty' if changes else ''}"


def source_hash() -> str:
    """The first twelve digits of a sha256 of both packages' files: two checkouts that differ are told apart."""
    digest = hashlib.sha256()
    for package in ("pretrain", "data_prep"):
        for path in sorted((Path(__file__).parent.parent / package).glob("*.py")):
            if not path.name.startswith("."):  # an editor's lock
                digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
