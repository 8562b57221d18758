"""Is there room on the disk? Estimated before the work and again while it goes on.

Each input file becomes three: shard, list of documents, record; many file systems have room for so many files only.
Shards take 2 bytes a token (4 beyond 65,536 pieces). Before anything is known, a byte of compressed text is taken for 2
bytes of shard, a byte of plain text for 0.65; afterwards what the finished units took.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from data_prep.folder import UnitRecord
from data_prep.readers import CODECS

_PLAIN = 0.65
_COMPRESSED = 2.0
_FILES_A_UNIT = 3
_KNOWN_BYTES = 64 << 20
_RESERVE_BYTES = 256 << 20
_COMPRESSED_SUFFIXES = (*CODECS, ".parquet")


def require_space(out: Path, todo: dict[str, int], done: Iterable[UnitRecord], bytes_a_token: int) -> None:
    """Raise OSError when the shards of the units `todo` (unit to bytes of input) will not fit beside `out`, or are too many."""
    need = int(estimate(todo, done, bytes_a_token))
    free = shutil.disk_usage(out).free
    if free < need + _RESERVE_BYTES:
        raise OSError(
            f"{out} has {free / 1e9:,.1f} GB free, the {len(todo):,} input files to do need about {need / 1e9:,.1f} GB and "
            f"{_RESERVE_BYTES / 1e9:.1f} GB must stay: make room or give another --out (--check_space false if you know "
            "better); finished files are kept"
        )
    room, files = os.statvfs(out), _FILES_A_UNIT * len(todo)
    if room.f_files and room.f_favail < files:  # 0 where the file system does not count them
        raise OSError(
            f"{out} has room for {room.f_favail:,} more files (inodes; see df -i), the {len(todo):,} input files to do become "
            f"{files:,}: have more of them allowed or give another --out (--check_space false if you know better); finished "
            "files are kept"
        )


def estimate(todo: dict[str, int], done: Iterable[UnitRecord], bytes_a_token: int) -> float:
    """Bytes that the shards of the units `todo` will take."""
    records = list(done)
    read = sum(record.source_bytes for record in records)
    if read >= _KNOWN_BYTES:
        written = sum(record.shard.tokens * bytes_a_token + 8 * record.shard.documents for record in records)
        return sum(todo.values()) * written / read
    packed = sum(size for unit, size in todo.items() if unit.endswith(_COMPRESSED_SUFFIXES))
    return (_PLAIN * (sum(todo.values()) - packed) + _COMPRESSED * packed) * bytes_a_token / 2
