"""RUN_DIR/back.json: the checkpoint that a run was sent back to, until it has saved since.

Until then what it has left is still the newest in its folder, and a start that finds no note of this would go on from that.
"""

import json
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.shard import write_atomically
from pretrain.folder import sync
from pretrain.reading import json_mapping

NAME = "back.json"


@dataclass(frozen=True)
class Back:
    """Where a run was sent back to."""

    resume: str
    """The checkpoint's folder (path); where it lies in the run's, relative to that, which may be moved."""
    step: int
    """Its step: what the run's folder has of later ones is no part of the run any more."""
    start: str = field(default_factory=lambda: secrets.token_hex(4))
    """Names the start that was sent back; every checkpoint that it saves has this mark."""


def read(run_dir: Path) -> Back | None:
    """What there is; None, too, where it is no note of ours."""
    with suppress(FileNotFoundError, ValueError, TypeError):
        return Back(**json_mapping((run_dir / NAME).read_bytes()))
    return None


def write(run_dir: Path, back: Back) -> None:
    """Note it, for good until `forget`."""
    write_atomically(run_dir / NAME, json.dumps(asdict(back)).encode() + b"\n")


def forget(run_dir: Path) -> None:
    """The run has saved."""
    (run_dir / NAME).unlink(missing_ok=True)
    sync(run_dir)
