"""Re-read a dataset and check everything that its manifest says. The command `data-prep verify`.

manifest.json --> Manifest.load: itself consistent, all files there and long enough
--> every shard: header, checksum, ids below the vocabulary size, as many EOS (BOS) as documents
--> tokenizer/: the one that made the ids
--> every documents file: as many rows as documents, their lengths the shard's tokens. What data-prep has prepared must
    have them all; imported data has none, which is said.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.documents import index_path, listed, npy_header
from data_prep.folder import SETTINGS_NAME
from data_prep.progress import Display
from data_prep.scan import Scan, Stretch, scan_all
from data_prep.shard import DTYPES, Manifest, Shard, check_tokenizer


@dataclass(frozen=True)
class VerifyOptions:
    """Read all of a dataset and check it against its manifest."""

    directory: str = field(metadata={"positional": True, "help": "Folder of the dataset"})


def run(options: VerifyOptions) -> None:
    """Check everything and say so. Raises ValueError, after naming all that is wrong on stdout, when something is."""
    start = time.monotonic()
    root = Path(options.directory)
    manifest = Manifest.load(root)
    stretches = [Stretch(root / s.path, s.dtype, s.offset, s.tokens) for s in manifest.shards]
    total = sum(s.tokens * DTYPES[s.dtype].itemsize for s in manifest.shards)
    problems, read, tokens = list(_tokenizer_problems(root, manifest)), 0, 0
    with Display(f"verify {root}", len(stretches), total) as display:
        for shard, found in zip(manifest.shards, scan_all(stretches, manifest.tokenizer), strict=True):
            problems += [f"{shard.path}: {problem}" for problem in _problems(root, manifest, shard, found)]
            read, tokens = read + found.tokens * DTYPES[shard.dtype].itemsize, tokens + found.tokens
            display.file_done()
            display.tick(read, tokens)
    for problem in problems:
        print(problem)
    lists = (
        ""
        if any((root / index_path(s.source_file)).is_file() for s in manifest.shards)
        else ", without lists of documents"
    )
    seconds = max(time.monotonic() - start, 1e-9)
    speed = f"{read / 1e9:.2f} GB in {seconds:.1f} s, {read / seconds / 1e6:,.0f} MB/s"
    if problems:
        prepared = (
            "delete the shards that are named and run the command that made the dataset again, it makes these anew"
        )
        imported = "these files were imported: restore them from where they came from, then import again"
        remedy = prepared if (root / SETTINGS_NAME).is_file() else imported
        raise ValueError(f"{root}: {len(problems):,} problems in {len(stretches):,} shards ({speed}): {remedy}")
    print(
        f"{root}: {manifest.tokens:,} tokens of {manifest.documents:,} documents in {len(stretches):,} shards are what "
        f"the manifest says{lists} ({speed})"
    )


def _tokenizer_problems(root: Path, manifest: Manifest) -> Iterator[str]:
    try:
        check_tokenizer(root, manifest.tokenizer)
    except ValueError as error:
        yield str(error)


def _problems(root: Path, manifest: Manifest, shard: Shard, found: Scan) -> Iterator[str]:
    """What is wrong with a shard."""
    if found.tokens != shard.tokens:
        yield f"{found.tokens:,} tokens instead of {shard.tokens:,}"
    elif found.checksum != shard.checksum:
        yield f"its tokens have the checksum {found.checksum}, the manifest says {shard.checksum}: the file is damaged"
    if found.smallest < 0 or found.largest >= manifest.tokenizer.vocab_size:
        ids = f"{found.smallest} to {found.largest}"
        yield f"ids from {ids} are not all in a vocabulary of {manifest.tokenizer.vocab_size}"
    a_document = manifest.tokenizer.marks_a_document(manifest.append_eos, manifest.prepend_bos)
    for wanted, name, count in ((manifest.append_eos, "EOS", found.eos), (manifest.prepend_bos, "BOS", found.bos)):
        if wanted and count != a_document * shard.documents:
            yield f"{count:,} {name} for {shard.documents:,} documents"
    if shard.path.endswith(".npy"):
        yield from _header_problems(root, shard)
    yield from _index_problems(root, shard)


def _header_problems(root: Path, shard: Shard) -> Iterator[str]:
    with open(root / shard.path, "rb") as file:
        header = npy_header(file)
    if header is None:
        yield "not a readable .npy file: its header is damaged"
    elif header != ((shard.tokens,), DTYPES[shard.dtype]):
        yield f"its header says {header[0]} of {header[1]}, the manifest {shard.tokens:,} of {shard.dtype}"


def _index_problems(root: Path, shard: Shard) -> Iterator[str]:
    try:
        found = listed(root, shard)
    except ValueError as error:
        yield str(error)
        return
    if found is not None:
        if (np.diff(found[0].astype(np.int64)) <= 0).any():
            yield "the lines of its documents are not in order"
    elif (root / SETTINGS_NAME).is_file():
        yield f"its list of documents, {index_path(shard.source_file)}, is missing"
