r"""Token files that others packed, taken as they are. The command `data-prep import`.

    DIR/*.bin --> which format? --> where its tokens lie --> scanned once: checksum, ids, documents --> DIR/manifest.json

No token is copied or changed: a shard of ours is "a token array at an offset", and so are these. All little-endian.

    LITPKDS (TinyLlama, litgpt)  "LITPKDS", u64 version 1, u8 type (8 uint16, 4 int32), u64 tokens; the tokens at 24
    Megatron-LM                  .bin: the tokens; .idx: "MMIDIDX\0\0", u64 version 1, u8 type (as above), u64 sequences,
                                 u64 documents + 1, then i32 length and i64 place of each sequence
    raw (nanoGPT)                nothing but tokens, uint16 unless --dtype says otherwise
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.scan import Scan, Stretch, scan_all
from data_prep.shard import DTYPES, MANIFEST_NAME, TOKENIZER_DIR, Manifest, Shard, TokenizerInfo
from data_prep.sources import Split
from data_prep.tokenizer import load

LITPKDS, MEGATRON = b"LITPKDS", b"MMIDIDX\0\0"
_LITPKDS_HEADER = struct.Struct("<7sQBQ")
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {8: "uint16", 4: "int32"}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Put a manifest over token files that others packed (LITPKDS, Megatron, raw), in their folder, without copying."""

    directory: str = field(metadata={"positional": True, "help": "Folder with the *.bin files; it gets the manifest"})
    tokenizer: str
    """The tokenizer that made the ids: tokenizer.model, tokenizer.json, or a folder with one."""
    append_eos: bool
    """Whether each document ends with EOS, which counts the documents."""
    prepend_bos: bool
    """Whether each document begins with BOS."""
    split: Split = "train"
    """Which part of its source this is."""
    pattern: str = "*.bin"
    """Which files, in sorted order; ** reaches into folders."""
    dtype: str = "uint16"
    """Type of the tokens in raw files: uint16, uint32 or int32."""


def run(options: ImportOptions) -> Manifest:
    """Write DIR/manifest.json. Raises ValueError for a file of no known format or with ids beyond the vocabulary, and for
    files without a token.
    """
    root = Path(options.directory)
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype {options.dtype!r} is none of {', '.join(DTYPES)}")
    is_dataset = (root / MANIFEST_NAME).is_file()
    if is_dataset and not Manifest.load(root, check_files=False).name.startswith("import"):
        raise ValueError(f"{root} is a dataset of data-prep already: it has a {MANIFEST_NAME} that was not imported")
    if Path(options.pattern).is_absolute():
        raise ValueError(
            f"pattern {options.pattern!r} is absolute: files lie in {root}, give a pattern within it, *.bin"
        )
    files = sorted(path for path in root.glob(options.pattern) if path.is_file())
    if not files:
        raise FileNotFoundError(f"no file in {root} matches {options.pattern}")
    tokenizer = load(options.tokenizer)
    found = [locate(path, options.dtype) for path in files]
    scans = scan_all((stretch for _, stretch in found), tokenizer.info)
    shards = [
        _shard(root, stretch, scan, tokenizer.info, options) for (_, stretch), scan in zip(found, scans, strict=True)
    ]
    kinds = sorted({kind for kind, _ in found})
    head = (f"import {' '.join(kinds)}", options.split, tokenizer.info, options.append_eos, options.prepend_bos)
    manifest = Manifest(*head, shards=tuple(shards))
    if manifest.tokens == 0:
        raise ValueError(f"there is not one token in the {len(shards):,} files of {root} that match {options.pattern}")
    tokenizer.save(root / TOKENIZER_DIR, options.prepend_bos)
    manifest.save(root)
    print(
        f"{root}: {manifest.tokens:,} tokens in {len(shards):,} {' and '.join(kinds)} files, "
        f"{manifest.documents:,} documents by their {'EOS' if options.append_eos else 'BOS'}; nothing was copied"
    )
    return manifest


def locate(path: Path, raw_dtype: str) -> tuple[str, Stretch]:
    """The format of a file and where its tokens lie. Raises ValueError when the file contradicts itself."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_LITPKDS_HEADER.size)
    if head.startswith(LITPKDS):
        return "litpkds", _litpkds(path, head, size)
    if path.with_suffix(".idx").is_file():
        return "megatron", _megatron(path, path.with_suffix(".idx"), size)
    itemsize = DTYPES[raw_dtype].itemsize
    if size % itemsize:
        raise ValueError(f"{path} has {size:,} bytes, which are no whole tokens of {itemsize} bytes: give its --dtype")
    return "raw", Stretch(path, raw_dtype, 0, size // itemsize)


def _litpkds(path: Path, head: bytes, size: int) -> Stretch:
    if len(head) < _LITPKDS_HEADER.size:
        raise ValueError(f"{path} ends within its header: it was cut short")
    _, version, code, tokens = _LITPKDS_HEADER.unpack(head)
    stretch = Stretch(path, _type(path, version, code), len(head), tokens)
    need = len(head) + tokens * DTYPES[stretch.dtype].itemsize
    if size < need:
        raise ValueError(
            f"{path} has {size:,} bytes, its header says {tokens:,} tokens, which need {need:,}: cut short?"
        )
    return stretch


def _megatron(path: Path, index: Path, size: int) -> Stretch:
    data = index.read_bytes()
    if len(data) < _MEGATRON_HEADER.size or not data.startswith(MEGATRON):
        raise ValueError(f"{index} is not an index of Megatron's: it does not begin with MMIDIDX")
    _, version, code, sequences, documents = _MEGATRON_HEADER.unpack_from(data)
    dtype = _type(index, version, code)
    at, itemsize = _MEGATRON_HEADER.size, DTYPES[dtype].itemsize
    if len(data) < at + 12 * sequences + 8 * documents:
        raise ValueError(f"{index} is too short for {sequences:,} sequences and {documents:,} documents: cut short?")
    lengths = np.frombuffer(data, "<i4", sequences, at).astype(np.int64)
    places = np.frombuffer(data, "<i8", sequences, at + 4 * sequences)
    if not np.array_equal(places, (np.cumsum(lengths) - lengths) * itemsize):
        raise ValueError(
            f"{index}: the sequences do not lie one behind the other; only whole, ordered files can be taken"
        )
    tokens = int(lengths.sum())
    if size != tokens * itemsize:
        raise ValueError(
            f"{path} has {size:,} bytes, {index.name} describes {tokens * itemsize:,}: they don't belong together"
        )
    return Stretch(path, dtype, 0, tokens)


def _type(path: Path, version: int, code: int) -> str:
    if version != 1:
        raise ValueError(f"{path} is of version {version}; only 1 is known")
    if code not in _TYPES:
        raise ValueError(f"{path} has tokens of type code {code}; only 8 (uint16) and 4 (int32) hold token ids")
    return _TYPES[code]


def _shard(root: Path, stretch: Stretch, scan: Scan, tokenizer: TokenizerInfo, options: ImportOptions) -> Shard:
    if scan.smallest < 0 or scan.largest >= tokenizer.vocab_size:
        raise ValueError(
            f"{stretch.path} has ids from {scan.smallest} to {scan.largest}, the tokenizer {tokenizer.vocab_size} pieces: "
            "another tokenizer made them, or they are of another --dtype"
        )
    name = stretch.path.relative_to(root).as_posix()
    marks = scan.eos if options.append_eos else scan.bos if options.prepend_bos else 0
    documents = marks // tokenizer.marks_a_document(options.append_eos, options.prepend_bos)
    return Shard(name, stretch.dtype, stretch.offset, stretch.tokens, scan.checksum, name, documents)
