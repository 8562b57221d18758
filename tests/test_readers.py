"""Readers: what is good comes out as it is, what is broken is named by its line, and nothing grows without bound."""

import errno
import gzip
import itertools
import random
import resource
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import readers
from data_prep.readers import Bad, Position, read_jsonl, read_parquet, read_text

LINES = [b'{"n": %d, "text": "%s"}' % (n, b"abc " * (n % 40)) for n in range(5000)]
BODY = b"\n".join(LINES) + b"\n"
MANY = [b'{"n": %d, "text": "%x"}' % (n, n**9) for n in range(60_000)]


def compress(codec: str, data: bytes, members: int = 1) -> bytes:
    parts = [data[n * len(data) // members : (n + 1) * len(data) // members] for n in range(members)]
    one = {"zst": zstandard.ZstdCompressor(write_checksum=True).compress, "gz": gzip.compress, "jsonl": bytes}[codec]
    return b"".join(map(one, parts))


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("codec", ["zst", "gz", "jsonl"])
def test_all_compressions_give_the_same(tmp_path: Path, codec: str, members: int) -> None:
    path = tmp_path / f"a.{codec}"
    path.write_bytes(compress(codec, BODY, members))
    position = Position()
    assert [value["n"] for _, value in read_jsonl(path, position)] == list(range(5000))
    assert position.bytes == path.stat().st_size


@pytest.mark.parametrize("codec", ["zst", "gz"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.77, 0.999])
def test_a_cut_file_gives_all_that_is_whole_and_then_says_so(tmp_path: Path, codec: str, keep: float) -> None:
    path = tmp_path / f"a.{codec}"
    data = compress(codec, b"\n".join(MANY))
    path.write_bytes(data[: int(keep * len(data))])
    *good, (row, bad) = read_jsonl(path)
    assert isinstance(bad, Bad)
    assert bad.reason == readers.UNREADABLE
    assert row == len(good)
    assert f"from line {row + 1} on" in bad.detail
    assert [value for _, value in good] == [orjson.loads(line) for line in MANY[: len(good)]]
    if keep == 0.77:  # a decompressor that throws its last block away would lose a tenth more
        assert 0.7 < len(good) / len(MANY) < 0.8


def test_damage_in_the_middle_costs_what_is_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    data = bytearray(compress("zst", b"\n".join(MANY), members=2))
    data[len(data) * 3 // 4] ^= 255
    path.write_bytes(data)
    *good, (_, bad) = read_jsonl(path)
    assert 25_000 < len(good) < 60_000
    assert isinstance(bad, Bad)
    assert bad.reason == readers.UNREADABLE


@pytest.mark.timeout(300)
def test_a_damaged_file_that_is_replaced_while_it_is_read_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a whole and shorter one, before what lies before the damage is read again; once endless."""
    path, opened = tmp_path / "a.zst", []
    path.write_bytes(compress("zst", b"\n".join(MANY))[:-20])
    make = readers._stream.__init__

    def replaced(self: object, path: Path, codec: str) -> None:
        opened.append(path)
        if len(opened) == 2:
            path.write_bytes(compress("zst", b"{}\n"))
        make(self, path, codec)

    monkeypatch.setattr(readers._stream, "__init__", replaced)
    *_, (_, bad) = read_jsonl(path)
    assert len(opened) == 2
    assert isinstance(bad, Bad)
    assert bad.reason == readers.UNREADABLE


@pytest.mark.parametrize("codec", ["zst", "gz"])
def test_bytes_whose_checksum_is_not_met_are_lost(tmp_path: Path, codec: str) -> None:
    """Nobody can know how many documents a file lost that broke off, kept its size, or was altered; but how many bytes."""
    path = tmp_path / f"a.jsonl.{codec}"
    frame, more = compress(codec, b"\n".join(MANY)), compress(codec, b"\n".join(MANY[:9000]))
    half = frame[: len(frame) // 2]
    altered = bytearray(frame)
    altered[len(frame) // 2] ^= 1
    for damaged in (half, half.ljust(len(frame), b"\0"), bytes(altered)):
        for before in (b"", more, more + more):
            path.write_bytes(before + damaged)
            records = [record for record in read_jsonl(path) if isinstance(record[1], Bad)]
            assert records[-1][1].reason == readers.UNREADABLE
            assert records[-1][1].lost_bytes == len(damaged)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_an_empty_compressed_file_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    ((row, bad),) = read_parquet(tmp_path / name, "content") if "parquet" in name else read_jsonl(tmp_path / name)
    assert isinstance(bad, Bad)
    assert (row, bad.reason) == (0, readers.UNREADABLE)
    assert "0 bytes" in bad.detail


def test_nothing_compressed_and_an_empty_plain_file_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b""))
    assert [*read_jsonl(tmp_path / "a.jsonl"), *read_jsonl(tmp_path / "a.jsonl.zst")] == []


def test_too_long_a_line_is_skipped_in_passing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 3 << 20)
    for size, codec in itertools.product(((3 << 20) - 2, (3 << 20) - 1, 9 << 20), ("zst", "jsonl")):
        path = tmp_path / f"a.{codec}"
        path.write_bytes(compress(codec, b'"1"\n"' + b"x" * (size - 2) + b'"x\n"3"\n'.replace(b'"x', b'"')))
        values = dict(read_jsonl(path))
        assert (values[0], values[2]) == ("1", "3")
        if size <= 3 << 20:
            assert values[1] == "x" * (size - 2)
        else:
            assert values[1].reason == "too long"


def test_a_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "FREE_EXPANSION_BYTES", 4 << 20)
    path = tmp_path / "a.zst"
    path.write_bytes(zstandard.compress(b'{"text": "a"}\n' * 1_500_000))
    *good, (row, bad) = read_jsonl(path)
    limit = 500 * path.stat().st_size + (4 << 20)
    assert limit < 14 * 1_500_000
    assert limit - (1 << 20) < 14 * len(good) <= limit
    assert isinstance(bad, Bad)
    assert (row, bad.reason) == (len(good), readers.UNREADABLE)
    assert "500 times its size" in bad.detail
    behind = zstandard.compress(random.Random(0).randbytes(200_000))  # whose checksums are met, as the bomb's are
    path.write_bytes(zstandard.compress(b'{"text": "%s"}\n' % (b"a" * 100_000) * 1700) + behind)
    *_, (_, bad) = read_jsonl(path)
    assert isinstance(bad, Bad)
    assert bad.lost_bytes > 0.5 * len(behind)


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        (None, [(0, "one\n\n  two\n<|end|>\nthree<|end|>\n<|end|>\nfour")]),
        ("<|end|>", [(0, "one\n\n  two"), (4, "three<|end|>"), (6, "four")]),
    ],
)
def test_plain_text(tmp_path: Path, separator: str | None, expected: list) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\n  two\n<|end|>\nthree<|end|>\n<|end|>\nfour\n")
    assert list(read_text(tmp_path / "a.txt", separator)) == expected
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"good\n<|end|>\nb\xffd\n<|end|>\ngood again"))
    found = list(read_text(tmp_path / "b.txt.gz", "<|end|>"))
    assert [row for row, _ in found] == [0, 2, 4]
    assert (found[0][1], found[2][1]) == ("good", "good again")
    assert isinstance(found[1][1], Bad)
    assert found[1][1].reason == "bad UTF-8"


def test_a_broken_row_group_costs_its_rows_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{n} " + str(n**n) for n in range(300)]
    pq.write_table(pa.table({"id": list(range(300)), "content": texts}), path, row_group_size=100, compression="zstd")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(data)
    records = list(read_parquet(path, "content"))
    assert [value for _, value in records if isinstance(value, str)] == texts[:100] + texts[200:]
    ((row, bad),) = [(row, value) for row, value in records if isinstance(value, Bad)]
    assert (row, bad.reason, bad.documents) == (100, "broken row group", 100)
    path.write_bytes(data[:-50])
    ((row, bad),) = read_parquet(path, "content")
    assert (row, bad.reason, bad.lost_bytes) == (0, readers.UNREADABLE, len(data) - 50)


def test_a_broken_page_costs_the_rows_from_there_to_the_end_of_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_BATCH_BYTES", 2000)
    path, rng = tmp_path / "a.parquet", random.Random(0)
    texts = [rng.randbytes(50).hex() for _ in range(600)]
    layout = {"row_group_size": 300, "data_page_size": 5000, "write_batch_size": 10, "use_dictionary": False}
    pq.write_table(pa.table({"content": texts}), path, compression="zstd", **layout)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.data_page_offset + chunk.total_compressed_size * 2 // 3
    data[start : start + 50] = bytes(50)
    path.write_bytes(data)
    records = list(read_parquet(path, "content"))
    ((row, bad),) = [(row, value) for row, value in records if isinstance(value, Bad)]
    assert 100 < row < 210, "within the second third"
    assert (bad.reason, bad.documents) == ("broken row group", 300 - row)
    assert f"rows from {row + 1} to 300 can't be read" in bad.detail
    assert records == [*enumerate(texts[:row]), (row, bad), *enumerate(texts[300:], 300)]


@pytest.mark.parametrize("column", ["content", "body.text"])
def test_a_row_group_that_is_a_bomb_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    monkeypatch.setattr(readers, "FREE_EXPANSION_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    bomb = [f"{n}" + "a" * 100_000 for n in range(20)]
    pq.write_table(pa.table({column: ["good", *bomb]}), path, row_group_size=1 + len(bomb), compression="zstd")
    ((row, bad),) = read_parquet(path, column)
    assert (row, bad.reason, bad.documents) == (0, readers.BROKEN_GROUP, 21)
    assert "500 times its size: no text does that" in bad.detail


def test_a_batch_has_a_few_megabytes_whatever_the_columns_are_called(tmp_path: Path) -> None:
    """Of a column with a dot in its name, of one that is nested, and not by the size of the other columns."""
    rows = [f"{n} " * 20_000 for n in range(100)]
    table = pa.table({"body.text": rows, "other": ["x"] * 100, "meta": [{"text": row} for row in rows]})
    pq.write_table(table, tmp_path / "a.parquet")
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    many = readers._MAX_BATCH_ROWS
    counts = [readers._check_size(group, column) for column in ("body.text", "meta", "other")]
    size = sum(map(len, rows)) / 100
    assert [count * size < 2 * readers._BATCH_BYTES for count in counts] == [True, True, False]
    assert counts[2] == many


def test_bad_utf8_in_a_row_costs_that_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = pa.array([b"one", b"tw\xff", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"content": values}), path)
    found = [value for _, value in read_parquet(path, "content")]
    assert (found[0], found[2]) == ("one", "three")
    assert isinstance(found[1], Bad)
    assert found[1].reason == "bad UTF-8"


MACHINE = "/proc/self/mem"
"""A file that opens and whose first page fails with EIO: a real error of the machine."""


@pytest.mark.parametrize("name", ["a.zst", "a.gz", "a.jsonl", "a.parquet"])
def test_what_the_machine_cannot_read_is_no_fault_of_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    read = {"parquet": lambda path: read_parquet(path, "content")}.get(path.suffix[1:], read_jsonl)
    with pytest.raises(FileNotFoundError, match=name):
        list(read(path))
    path.write_bytes(b"x")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    list(read(path))  # so that all is imported
    with path.open("rb") as file:
        lowest = file.fileno()  # the next one to be had
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(OSError, match=name) as many:
            list(read(path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert many.value.errno == errno.EMFILE
    if path.suffix != ".jsonl":
        return
    path.unlink()
    path.symlink_to(MACHINE)
    with pytest.raises(OSError, match=name) as failing:
        list(read(path))
    assert failing.value.errno == errno.EIO


def test_a_disk_that_fails_within_a_file_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second block, and the second row group, fail with EIO; also while what lies before damage is read again."""
    pq.write_table(pa.table({"content": [f"{n}" for n in range(300)]}), tmp_path / "a.parquet", row_group_size=100)
    (tmp_path / "a.zst").write_bytes(compress("zst", b"\n".join(MANY)))
    (tmp_path / "cut.zst").write_bytes(compress("zst", b"\n".join(MANY))[:-20])
    failing = OSError(errno.EIO, "Input/output error")

    class Failing:
        def __init__(self, stream: object, reads: int) -> None:
            self.stream, self.left = stream, reads

        def read(self, size: int) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise failing
            return self.stream.read(size)

    enter, left = readers._stream.__enter__, []
    monkeypatch.setattr(readers._stream, "__enter__", lambda self: (self._raw, Failing(enter(self)[1], left.pop())))
    for name, reads in (("a.zst", [1]), ("cut.zst", [1]), ("cut.zst", [1, 99])):
        left[:] = reads
        with pytest.raises(OSError, match=name) as raised:
            list(read_jsonl(tmp_path / name))
        assert (raised.value.errno, left) == (errno.EIO, [])
    monkeypatch.setattr(readers, "_check_size", lambda meta, column: (_ for _ in ()).throw(failing))
    with pytest.raises(OSError, match=r"a\.parquet") as raised:
        list(read_parquet(tmp_path / "a.parquet", "content"))
    assert raised.value.errno == errno.EIO
