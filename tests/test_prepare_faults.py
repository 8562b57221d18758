"""Faults of the input: broken documents cost themselves and nothing else, and what is borne hangs on no division of the work."""

import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_prepare import options
from test_sources import line, write_jsonl, write_parquet
from test_tokenizer import LLAMA_MODEL

from data_prep.budget import Budget
from data_prep.encoder import Difference, Encoder
from data_prep.prepare import FinishOptions, StarCoderOptions, finish, run
from data_prep.shard import Manifest, TokenDataset

BAD_LINES = {
    "bad JSON": b'{"text": "cut',
    "bad UTF-8": b'{"text": "\xff", "meta": {"redpajama_set_name": "RedPajamaC4"}}',
    "missing field": b'{"content": "elsewhere"}',
    "not text": line(17),
    "too long": b'{"text": "' + b"x" * 3_000_000,
}
GOOD = [line(f"Document {n}. " + "word " * (n % 50)) for n in range(300)]


def tokens_of(out: Path) -> np.ndarray:
    dataset = TokenDataset(out)
    return dataset.sequences([0], dataset.num_tokens - 1)[0]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the good lines alone."""
    root = tmp_path_factory.mktemp("clean")
    write_jsonl(root / "in/train/chunk1/a.jsonl.zst", *GOOD)
    run(options(root / "in", root / "out"))
    return root / "out"


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_costs_itself(
    clean: Path, tmp_path: Path, reason: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.readers.MAX_RECORD_BYTES", 2_000_000)
    lines = [*GOOD[:100], b"", BAD_LINES[reason], *GOOD[100:]]
    write_jsonl(tmp_path / "in/train/chunk1/a.jsonl.zst", *lines, frames=1)
    with pytest.raises(ValueError, match=r"1 of 301 documents are bad \(0\.3322%\); at most 0\.0100% may be"):
        run(options(tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / "out/manifest.json").exists()
    assert f"skipped train/chunk1/a.jsonl.zst line 102: {reason}: " in capsys.readouterr().err
    manifest = run(options(tmp_path / "in", tmp_path / "out", max_bad_documents=0.004))
    assert manifest is not None
    assert manifest.dropped == {reason: 1}
    assert sum(manifest.dropped.values()) + manifest.documents == 301
    assert [s.checksum for s in manifest.shards] == [s.checksum for s in Manifest.load(clean).shards]
    assert capsys.readouterr().out.count(f"dropped: {reason}") == 1


def test_a_cut_file_gives_what_is_before_the_cut(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "in/train/chunk1/a.jsonl.zst"
    path.parent.mkdir(parents=True)
    frames = [zstandard.compress(b"".join(line + b"\n" for line in GOOD[n : n + 100])) for n in (0, 100, 200)]
    path.write_bytes(b"".join(frames)[:-3])
    with pytest.raises(ValueError, match="1 of 201 documents are bad"):
        run(options(tmp_path / "in", tmp_path / "out"))
    assert "skipped train/chunk1/a.jsonl.zst line 201: unreadable file: can't be read from" in capsys.readouterr().err
    manifest = run(options(tmp_path / "in", tmp_path / "out", max_bad_documents=0.4))  # a third of the bytes
    assert manifest is not None
    assert (manifest.documents, manifest.dropped) == (200, {"unreadable file": 1})
    np.testing.assert_array_equal(tokens_of(tmp_path / "out"), tokens_of(clean)[: manifest.tokens])


def test_parquet_faults_are_borne_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = [f"def f_{n}(): return {n**9}\n" for n in range(300)]

    def prepared(name: str, **changes: object) -> Manifest:
        settings = {"tokenizer": str(LLAMA_MODEL), "workers": 1, "holdout": 1e-9, "split": "train", **changes}
        manifest = run(StarCoderOptions(input=str(tmp_path / "in"), out=str(tmp_path / name), **settings))
        assert manifest is not None
        return manifest

    write_parquet(tmp_path / "in/python/a.parquet", texts)
    first = prepared("clean").shards[0].checksum
    write_parquet(tmp_path / "in/python/a.parquet", [*texts[:50], None, *texts[50:]])
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "in/python/b.parquet")
    (tmp_path / "in/python/c.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(ValueError, match="documents are bad"):
        prepared("out")
    manifest = prepared("out", max_bad_documents=0.05)
    assert manifest.dropped == {"missing column": 2, "not text": 1, "unreadable file": 1}
    assert manifest.subsets["python"].dropped == manifest.dropped
    assert manifest.shards[0].checksum == first
    error = capsys.readouterr().err
    for said in (
        "a.parquet line 51: not text",
        "b.parquet line 1: missing column",
        "c.parquet line 1: unreadable file",
    ):
        assert f"skipped python/{said}: " in error


def test_a_difference_stops_the_work_and_names_the_document(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: Encoder, text: str) -> None:
        if text.startswith("Document 7."):
            raise Difference("gigatoken gives [1] at token 0, sentencepiece gives [2]")

    monkeypatch.setattr(Encoder, "check", check)
    with pytest.raises(ValueError, match=r"train/chunk1/a\.jsonl\.zst line 8: gigatoken gives \[1\] at token 0"):
        run(options(clean.parent / "in", tmp_path / "out", check_every=1))
    assert not (tmp_path / "out/manifest.json").exists()
    assert not list(tmp_path.rglob("*.npy*"))


def test_documents_are_checked_as_often_as_asked(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(Encoder, "check", lambda self, text: checked.append(text))
    run(options(clean.parent / "in", tmp_path / "out", check_every=10))
    assert len(set(checked)) == 30
    run(options(clean.parent / "in", tmp_path / "none", check_every=0))
    assert len(checked) == 30


def test_a_mended_file_of_the_same_size_is_read_again(clean: Path, tmp_path: Path) -> None:
    (tmp_path / "in/train").mkdir(parents=True)
    shutil.copytree(clean.parent / "in/train/chunk1", tmp_path / "in/train/chunk1")
    path = tmp_path / "in/train/chunk1/a.jsonl.zst"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2].ljust(len(good), b"\0"))  # a download whose second half never came
    with pytest.raises(ValueError, match="documents are bad"):
        run(options(tmp_path / "in", tmp_path / "out"))
    path.write_bytes(good)
    run(options(tmp_path / "in", tmp_path / "out"))
    assert_same_bytes_of_any_size(tmp_path / "out", clean)


def assert_same_bytes_of_any_size(got: Path, expected: Path) -> None:
    names = {path.relative_to(got) for path in got.rglob("*") if path.is_file()}
    assert names == {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    assert all((got / name).read_bytes() == (expected / name).read_bytes() for name in names)


def test_a_budget_is_judged_by_what_is_to_come() -> None:
    with pytest.raises(ValueError, match=r"max_bad_documents 2 is not a share"):
        Budget(2, 0)

    class Record:
        bad_documents, lost_bytes, documents_read, source_bytes, bad = 1, 0, 1000, 100, ()

    budget = Budget(0.0005, 1000)  # ten such units: 10,000 documents, 5 of them may be bad
    for _ in range(5):
        budget.add(Record(), say=False)
        assert not budget.is_exceeded(final=False)
    budget.add(Record(), say=False)
    assert budget.is_exceeded(final=False)

    class Empty(Record):
        source_bytes = 0

    budget = Budget(0.0005, 1000)
    budget.add(Empty(), say=False)
    assert not budget.is_exceeded(final=False)
    assert budget.is_exceeded(final=True)


def test_bytes_behind_damage_are_borne_as_far_as_documents_are() -> None:
    """One bad of a million documents, and a hundredth of the bytes that nobody could read."""

    class Record:
        bad_documents, lost_bytes, documents_read, source_bytes, bad = 1, 10_000, 1_000_000, 900_000, ()

    strict, lenient = Budget(0.0099, 1_000_000), Budget(0.01, 1_000_000)
    for budget in (strict, lenient):
        budget.add(Record(), say=False)
    for final in (False, True):
        assert strict.is_exceeded(final)
        assert not lenient.is_exceeded(final)
    with pytest.raises(ValueError, match=r"1 of 1,000,000 documents .* 10,000 of 1,000,000 bytes are lost to damage"):
        strict.enforce(final=True)
    lenient.enforce(final=True)


def test_half_a_file_that_cannot_be_read_is_more_than_one_bad_document(tmp_path: Path) -> None:
    """A download that broke off in a file of its full size: one document counts as bad, and no byte can be relied on."""
    rng = random.Random(0)
    path = write_jsonl(tmp_path / "in/train/a.jsonl.zst", *(line(rng.randbytes(20_000).hex()) for _ in range(40)))
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2].ljust(len(good), b"\0"))
    with pytest.raises(ValueError, match=r"1 of \d\d documents are bad .*, and ([89]\d\d,\d{3}) of \1 bytes"):
        run(options(tmp_path / "in", tmp_path / "out", max_bad_documents=0.2, check_every=0))


def test_how_an_array_is_cut_does_not_decide_what_is_borne(tmp_path: Path) -> None:
    """5 files of 40 documents, of which 1 in 200 may be bad: 1 in a task of 40 is borne, 2 in 2 tasks are not."""
    for n in range(5):
        bad = [BAD_LINES["bad JSON"]] if n == 0 else [line("good")]
        write_jsonl(tmp_path / f"in/train/chunk1/{n}.jsonl.zst", *(line(f"{n * 100 + k:04d}") for k in range(39)), *bad)
    out, share = tmp_path / "out", 0.006
    for task in range(1, 6):
        assert run(options(tmp_path / "in", out, task=f"{task}/5", max_bad_documents=share)) is None
    assert finish(FinishOptions(directory=str(out), max_bad_documents=share)).dropped == {"bad JSON": 1}
    write_jsonl(tmp_path / "in/train/chunk1/1.jsonl.zst", *(line(f"{k:04d}") for k in range(39)), b"{")
    assert run(options(tmp_path / "in", out, task="2/5", max_bad_documents=share)) is None
    with pytest.raises(ValueError, match=r"2 of 200 documents are bad \(1\.0000%\); at most 0\.6000% may be"):
        finish(FinishOptions(directory=str(out), max_bad_documents=share))
    assert not (out / "manifest.json").exists()
    write_jsonl(tmp_path / "in/train/chunk1/1.jsonl.zst", *(line(f"{k:04d}") for k in range(37)), b"{", b"[", b"[[")
    with pytest.raises(ValueError, match=r"3 of 40 documents are bad"):
        run(options(tmp_path / "in", out, task="2/5", max_bad_documents=share))
