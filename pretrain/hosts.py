"""How this host is called, and which host is to blame: for messages, and for launch/slurm.sbatch, which can leave it out."""

import os
import socket
from contextlib import suppress
from pathlib import Path


def this_host() -> str:
    """As SLURM calls it where SLURM started this process, for sbatch --exclude knows no other name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_first_here() -> bool:
    """Whether this is the first rank of its host, or the only one: what all of a host see alike is its to look at."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def suspect(host: str) -> None:
    """Name the host whose machine seems to have ended this start, to the launch script (its EXCLUDE_BAD)."""
    if path := os.environ.get("CRIA_SUSPECT"):
        with suppress(OSError):
            Path(path).write_text(f"{host}\n")
