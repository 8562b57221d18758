"""Files to records: jsonl, parquet and plain text, plain or compressed, with whatever is broken in them named.

    bytes on disk --> decompressed blocks of 1 MiB --> lines, of bounded length --> (line number, JSON value)
    parquet       --> row groups --> batches of a few MB --------------------------> (row number, value of one column)
    text          --> documents between separator lines ---------------------------> (line number, text)

A record that can't be read is not an exception but a `Bad` in its place, with the reason; the reader goes on behind it.
So whoever counts decides how much is too much. What the machine can't do now (a failing disk, a stale handle, too many
open files) says nothing about the record: it is an OSError with its errno. Everything streams: memory is that of the
largest record, and both a record and a decompressed file have a largest size.

pyarrow is imported where it is used: the command that starts the workers reads nothing itself.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_RECORD_BYTES = 256 << 20
"""A longer line or document is bad. One of 100 MB is fine."""
MAX_EXPANSION = 500
"""A file that decompresses to more than this times its size, beyond the first GiB, is a bomb rather than text."""
FREE_EXPANSION_BYTES = 1 << 30
LARGE_BYTES = 16 << 20

_BLOCK_BYTES = 1 << 20
_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 4096
CODECS = {".zst": "zstd", ".zstd": "zstd", ".gz": "gzip"}
"""How a compressed file is read, by its suffix."""


class Bad(NamedTuple):
    """One record, or all the rest of a file, that can't be read."""

    reason: str
    """What kind of fault, in two or three words; documents are counted by it."""
    detail: str
    """What exactly was wrong."""
    documents: int = 1
    """Documents lost by it; 1 for the rest of a file, where nobody can know."""
    lost_bytes: int = 0
    """Bytes of the file on disk that were not read because of it, or whose checksum was not met."""


@dataclass
class Position:
    """How far a reader is in its file, for whoever shows the progress; and whom it tells what is coming."""

    bytes: int = 0
    """Bytes of the file on disk that have been read."""
    make_room: Callable[[], None] = lambda: None
    """Called before a record of LARGE_BYTES or more is parsed, which can take five times its size."""


Record = tuple[int, Any]
"""Line or row number, from 0, and the value or a `Bad`."""


def read_jsonl(path: Path, position: Position | None = None) -> Iterator[Record]:
    """The line number and the JSON value of each line; blank lines are none. Compressed by its suffix: .zst, .gz."""
    position = position or Position()
    for row, line in _lines(path, position):
        if isinstance(line, Bad):
            yield row, line
        elif line and not line.isspace():
            if len(line) >= LARGE_BYTES:
                position.make_room()
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                value = _bad_json(line, error)
            line.clear()  # with a document of 100 MB it matters, here and below
            yield row, value
            value = None


def _bad_json(line: bytearray, error: orjson.JSONDecodeError) -> Bad:
    try:
        line.decode()
    except UnicodeDecodeError as fault:
        return Bad("bad UTF-8", str(fault))
    return Bad("bad JSON", str(error))


def read_text(path: Path, separator: str | None, position: Position | None = None) -> Iterator[Record]:
    """The number of the first line and the text of each document. Compressed by its suffix: .zst, .gz.

    A line that is `separator` and nothing else ends a document; without one the whole file is one document.
    """
    mark = None if separator is None else separator.encode()
    position = position or Position()
    document, first, row, too_long = bytearray(), 0, -1, False
    for row, line in _lines(path, position):
        if isinstance(line, Bad) and line.reason == UNREADABLE:
            yield row, line
            return
        if isinstance(line, bytearray) and mark is not None and line.rstrip(b"\r") == mark:
            yield first, _as_text(document, too_long, position)
            document, first, too_long = bytearray(), row + 1, False
        elif isinstance(line, Bad) or len(document) + len(line) > MAX_RECORD_BYTES:
            too_long = True
            document.clear()
        elif not too_long:
            if row > first:
                document += b"\n"
            document += line
    if document or too_long:
        yield first, _as_text(document, too_long, position)


def _as_text(document: bytearray, too_long: bool, position: Position) -> str | Bad:
    if too_long:
        return _too_long()
    if len(document) >= LARGE_BYTES:
        position.make_room()
    try:
        return document.decode()
    except UnicodeDecodeError as fault:
        return Bad("bad UTF-8", str(fault))


UNREADABLE = "unreadable file"
"""The reason of a `Bad` that stands for all the rest of a file."""
BROKEN_GROUP = "broken row group"
"""The reason of a `Bad` that stands for the rest of a row group."""


def _raise_machines(error: Exception, path: Path) -> None:
    """Raise what has an errno, with the file's name: it is the machine's fault. pyarrow gives damage none."""
    if isinstance(error, OSError) and error.errno is not None:
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def _too_long() -> Bad:
    return Bad("too long", f"longer than {MAX_RECORD_BYTES:,} bytes, the most that a document may have")


class _Bomb(OSError):
    """What no text decompresses to, whether its checksums are met or not."""


def _lines(path: Path, position: Position) -> Iterator[tuple[int, bytearray | Bad]]:
    """Lines without their line end, in a buffer that is theirs; a line beyond MAX_RECORD_BYTES is skipped in passing.

    Raises OSError, naming the file, for what is the machine's fault.
    """
    row, line, too_long = 0, bytearray(), False
    try:
        for block in _blocks(path, position):
            head, *tail = block.split(b"\n")
            for part in tail:
                yield row, _too_long() if too_long else line + head
                row, line, head, too_long = row + 1, bytearray(), part, False
            if too_long or len(line) + len(head) > MAX_RECORD_BYTES:
                line, too_long = bytearray(), True
            else:
                line += head
    except OSError as error:
        _raise_machines(error, path)
        damaged = path.suffix in CODECS and not isinstance(error, _Bomb)
        lost = max(0, path.stat().st_size - (_whole_frames(path) if damaged else position.bytes))
        yield row, Bad(UNREADABLE, f"can't be read from line {row + 1} on: {error}", lost_bytes=lost)
        return
    if line or too_long:
        yield row, _too_long() if too_long else line


def _blocks(path: Path, position: Position) -> Iterator[bytes]:
    """The decompressed content in blocks. Raises OSError for a cut or damaged stream, after all that was good in it."""
    codec = CODECS.get(path.suffix)
    packed = path.stat().st_size
    if codec and not packed:
        raise OSError("it has 0 bytes; even nothing, compressed, has more")
    size, limit = 0, MAX_EXPANSION * packed + FREE_EXPANSION_BYTES
    try:
        with _stream(path, codec) as (raw, stream):
            while block := stream.read(_BLOCK_BYTES):
                size += len(block)
                if size > limit:
                    raise _Bomb(f"it decompresses to more than {MAX_EXPANSION} times its size: no text does that")
                position.bytes = raw.tell()
                yield block
    except OSError as error:
        if codec is None or isinstance(error, _Bomb) or error.errno is not None:
            raise
        yield from _last_bytes(path, codec, size, position)
        raise


def _last_bytes(path: Path, codec: str, start: int, position: Position) -> Iterator[bytes]:
    """What lies between `start` and the damage: a block that meets the damage is lost whole, single bytes are not."""
    tail = bytearray()
    try:
        with _stream(path, codec) as (raw, stream):
            while start and (block := stream.read(min(start, _BLOCK_BYTES))):
                start -= len(block)  # no block: a shorter file has taken this one's place
            while byte := stream.read(1):
                tail += byte
                position.bytes = raw.tell()
    except OSError as error:
        _raise_machines(error, path)
        yield bytes(tail)


def _whole_frames(path: Path) -> int:
    """Bytes on disk of the frames whose checksums are met, up to the first that is damaged or cut.

    A checksum stands at the end of what it is of: of the frame that meets the damage, text may have been read that is not what
    was written.
    """
    import zstandard

    zstd = CODECS[path.suffix] == "zstd"
    whole, data = 0, b""
    with suppress(zlib.error, zstandard.ZstdError), open(path, "rb", buffering=0) as file:
        frame: Any = None
        while data or (data := file.read(4096)):  # of which even a bomb makes no more than 128 MB
            frame = frame or (zstandard.ZstdDecompressor().decompressobj() if zstd else zlib.decompressobj(31))
            frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                whole, frame = file.tell() - len(data), None
    return whole


class _stream:
    """The raw file and the stream of its decompressed bytes."""

    # pyarrow's stream notices a cut frame; python-zstandard's ends as if the file were complete.
    def __init__(self, path: Path, codec: str | None) -> None:
        import pyarrow as pa

        self._raw = pa.OSFile(os.fspath(path))
        self._stream = pa.CompressedInputStream(self._raw, codec) if codec else self._raw

    def __enter__(self) -> tuple[Any, Any]:
        return self._raw, self._stream

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._raw.close()


# --- parquet ---------------------------------------------------------------------------------------------------------


def read_parquet(path: Path, column: str, position: Position | None = None) -> Iterator[Record]:
    """The row number and the value of `column` of each row. What is damaged in a row group costs its rows from there.

    Raises OSError, naming the file, for what is the machine's fault.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    position, size = position or Position(), path.stat().st_size
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK_BYTES, memory_map=False)
    except (pa.ArrowInvalid, OSError) as error:
        _raise_machines(error, path)
        yield 0, Bad(UNREADABLE, f"not a readable parquet file: {error}", lost_bytes=size)
        return
    with file:
        rows = file.metadata.num_rows
        if column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            if rows:
                yield 0, Bad("missing column", f"there is no column {column!r}, only {names}", documents=rows)
            return
        start = 0
        for group in range(file.num_row_groups):
            yield from _row_group(file, path, group, column, start, position)
            start += file.metadata.row_group(group).num_rows
            position.bytes = size * start // max(1, rows)


def _row_group(
    file: pq.ParquetFile, path: Path, group: int, column: str, start: int, position: Position
) -> Iterator[Record]:
    """The rows of one group, the first of which has the number `start`."""
    import pyarrow as pa

    meta = file.metadata.row_group(group)
    row, end = start, start + meta.num_rows
    try:
        rows_a_batch = _check_size(meta, column)
        for batch in file.iter_batches(rows_a_batch, row_groups=[group], columns=[column], use_threads=False):
            values = batch.column(0)
            large = batch.nbytes >= LARGE_BYTES
            del batch
            if large:
                position.make_room()
            try:
                texts = values.to_pylist()
            except UnicodeDecodeError:
                texts = [_one(value) for value in values]
            del values
            if large:  # Arrow would keep the memory for the next one
                pa.default_memory_pool().release_unused()
            texts.reverse()
            while texts:  # each is let go as soon as it is handed on
                yield row, texts.pop()
                row += 1
    except (pa.ArrowException, OSError) as error:
        _raise_machines(error, path)
        yield row, Bad(BROKEN_GROUP, f"rows from {row + 1} to {end} can't be read: {error}", documents=end - row)


def _one(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as fault:
        return Bad("bad UTF-8", str(fault))


def _check_size(meta: pq.RowGroupMetaData, column: str) -> int:
    """How many rows of the group make a batch of about _BATCH_BYTES. Raises OSError for a column chunk that is a bomb."""
    chunks = [meta.column(n) for n in range(meta.num_columns)]
    # A nested column's chunks have its name and more, and a column's own name may have dots.
    mine = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]
    packed, size = sum(c.total_compressed_size for c in mine), sum(c.total_uncompressed_size for c in mine)
    if size > MAX_EXPANSION * packed + FREE_EXPANSION_BYTES:
        raise OSError(f"it decompresses to {size:,} bytes, {MAX_EXPANSION} times its size: no text does that")
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * meta.num_rows // max(1, size)))
