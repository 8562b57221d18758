"""How many bad documents are borne: a share of all, given by --max_bad_documents.

A web-scale corpus has some broken lines, and days of work must not end at one of them; a broken download must not pass
either. Damage that hides the rest of a file has no documents to count: the bytes from the start of the first bad
compressed frame are held against the same share of all bytes.
"""

from __future__ import annotations

import sys

from data_prep.folder import UnitRecord


def check_share(share: float) -> None:
    """Raise ValueError for a share outside [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"max_bad_documents {share} is not a share in [0, 1]; 0.0001 bears one in 10,000")


class Budget:
    """Counts bad documents over the units of a run."""

    def __init__(self, share: float, total_bytes: int) -> None:
        """`share` of the documents, and of `total_bytes` of input, may be bad. Raises as check_share does."""
        check_share(share)
        self._share, self._total_bytes = share, total_bytes
        self._bad = self._read = self._bytes = self._lost = 0

    def add(self, record: UnitRecord, say: bool = True) -> None:
        """Count a unit that is done, and name each of its bad documents on stderr."""
        self._bad += record.bad_documents
        self._lost += record.lost_bytes
        self._read += record.documents_read
        self._bytes += record.source_bytes
        if say:
            for line in describe(record):
                print(f"data-prep: skipped {line}", file=sys.stderr, flush=True)

    def is_exceeded(self, final: bool) -> bool:
        """Whether it is too much; before the end, whether it would be if all the rest were good.

        While no bytes have been read (the sizes are not known, or the first files are empty) only the end can tell.
        """
        if not final and not self._bytes:
            return False
        expected = self._read if final else self._read * self._total_bytes / self._bytes
        return self._bad > self._share * max(expected, self._read) or self._lost > self._share * self._total_bytes

    def enforce(self, final: bool) -> None:
        """Raise ValueError when it is too much."""
        if self.is_exceeded(final):
            lost = f", and {self._lost:,} of {self._total_bytes:,} bytes are lost to damage" if self._lost else ""
            raise ValueError(
                f"{self._bad:,} of {self._read:,} documents are bad ({self._bad / max(1, self._read):.4%}){lost}; "
                f"at most {self._share:.4%} may be (--max_bad_documents). Mend or replace the files named above, or raise "
                "that share; finished files are kept"
            )


def describe(record: UnitRecord) -> list[str]:
    """One line for each bad document of a unit: file, line and what is wrong."""
    lines = [f"{record.shard.source_file} line {bad.line}: {bad.reason}: {bad.detail}" for bad in record.bad]
    listed = sum(bad.count for bad in record.bad)
    if listed < record.bad_documents:
        lines.append(f"{record.shard.source_file}: {record.bad_documents - listed:,} more bad documents")
    return lines
