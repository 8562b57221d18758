"""Faults: broken documents cost themselves and nothing else, kills cost time and nothing else, a full disk says so."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from test_prepare import assert_same_bytes, corpus, options, undisturbed  # noqa: F401  corpus, undisturbed: fixtures
from test_sources import line, write_jsonl, write_parquet
from test_tokenizer import LLAMA_MODEL

from data_prep.budget import Budget
from data_prep.encoder import WHOLE_BYTES, WHOLE_CHARACTERS, Difference, Encoder, Uncuttable
from data_prep.folder import UnitRecord
from data_prep.lock import locked, only_run
from data_prep.prepare import FinishOptions, StarCoderOptions, finish, run
from data_prep.shard import Manifest, TokenDataset
from data_prep.tokenizer import load
from data_prep.workers import prepare_units

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


MEMORY = """
import sys
from data_prep.__main__ import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


@pytest.mark.parametrize(("command", "wide"), [("slimpajama", False), ("slimpajama", True), ("starcoder", True)])
def test_a_document_of_100_mb_takes_less_than_a_gigabyte(tmp_path: Path, command: str, wide: bool) -> None:
    word = "naïve 😀 word, " if wide else "naive word, "  # with one emoji every character takes four bytes
    text = word * (100_000_000 // len(word.encode()))
    texts = ["before", text, text, "after"]
    if wide:  # when it comes, gigatoken remembers as many words as it may
        noise = random.Random(0).randbytes(19_300_000).hex()
        words = [noise[n : n + 16] for n in range(0, len(noise), 16)]
        texts = [*(" ".join(words[n : n + 50_000]) for n in range(0, len(words), 50_000)), text, "after"]
    if command == "slimpajama":
        write_jsonl(tmp_path / "in/train/a.jsonl.zst", *map(line, texts))
    else:
        write_parquet(tmp_path / "in/python/a.parquet", texts)
    arguments = [command, "--input", tmp_path / "in", "--split", "train", "--tokenizer", LLAMA_MODEL]
    run_it = [sys.executable, "-c", MEMORY, *arguments, "--out", tmp_path / "out", "--workers", "1"]
    done = subprocess.run(run_it, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *_, kibibytes, unit = done.stdout.split()
    assert unit == "kB"
    assert int(kibibytes) * 1024 < 1e9
    assert Manifest.load(tmp_path / "out").documents == len(texts)


def test_what_a_tokenizer_must_take_whole_is_bounded(tmp_path: Path) -> None:
    """Nobody knows where a tokenizer.json may be cut: a document is taken whole, or named and skipped."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["naïve 😀 word, 12 words"] * 9, trainer)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    word = "naïve 😀 word, "
    longest = word * (WHOLE_BYTES // len(word.encode()))
    lines = [line("before"), line(longest), line(longest + word), line(longest * 3), line("after")]
    write_jsonl(tmp_path / "in/train/a.jsonl.zst", *lines)
    arguments = ["slimpajama", "--input", tmp_path / "in", "--split", "train", "--tokenizer", tmp_path / "tokenizer"]
    arguments += ["--out", tmp_path / "out", "--workers", "1", "--max_bad_documents", "0.4"]
    done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "encoding with gigatoken" in done.stdout
    assert int(done.stdout.split()[-2]) * 1024 < 1e9
    assert done.stderr.count("bytes or more; with a tokenizer.json it can be 33,554,432") == 2
    assert "line 3: too long: 33,554," in done.stderr
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.documents, manifest.dropped) == (3, {"too long": 2})
    reference = Encoder(load(tmp_path / "tokenizer"), "reference")
    assert reference.long_characters == WHOLE_CHARACTERS
    reference.refuse_uncuttable("😀" * WHOLE_CHARACTERS)
    with pytest.raises(Uncuttable, match="1,048,577 characters; encoded by tokenizers it can be 1,048,576"):
        reference.refuse_uncuttable("😀" * WHOLE_CHARACTERS + "a")


# --- kills -----------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            if int(stat.rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry))
    return found


def test_kills_at_random_moments_change_nothing(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:  # noqa: F811
    """The long form is benchmarks/data_prep_kills.py; this one kills the group, the command or a worker some six times."""
    rng, out = random.Random(7), tmp_path / "out"
    command = [sys.executable, "-m", "data_prep", "slimpajama", "--input", str(corpus), "--split", "train"]
    command += ["--tokenizer", str(LLAMA_MODEL), "--out", str(out), "--check_every", "1", "--encoder", "reference"]
    kills = 0
    for n, victim in enumerate(["group", "worker", "command", "worker", "group", "command"]):
        tail = ["--workers", "2"] if victim == "worker" else ["--workers", "1"]
        process = subprocess.Popen(
            [*command, *tail], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        deadline = time.monotonic() + 60
        started = out / ("units" if n else "settings.json")
        while process.poll() is None and not started.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1 if n else 0)
        below = children(process.pid) if victim == "worker" else []
        workers = below + [worker for server in below for worker in children(server)]
        alive = process.poll() is None
        if victim == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif victim == "worker" and workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
        else:
            process.kill()
        process.communicate(timeout=60)
        kills += alive
        shards = list((out / "shards").rglob("*.npy")) if (out / "shards").exists() else []
        if n == 0 and shards:
            shards[0].unlink()  # at least this one must be made again
    assert kills >= 3
    (out / "manifest.json").unlink(missing_ok=True)
    records = sorted((out / "units").rglob("*.json")) if (out / "units").exists() else []
    if len(records) == 6:
        records[0].unlink()
    subprocess.run([*command, "--workers", "2"], check=True, capture_output=True, timeout=120)
    assert_same_bytes(out, undisturbed, but="units/")  # they say what encoded them


# --- tasks, locks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [2, 7])
def test_any_number_of_tasks_joins_to_the_same(
    corpus: Path,  # noqa: F811
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
    tasks: int,
) -> None:
    out = tmp_path / "out"
    order = random.Random(tasks).sample(range(1, tasks + 1), tasks)
    for task in order[:-1]:
        assert run(options(corpus, out, task=f"{task}/{tasks}", encoder="reference")) is None
    if order[-1] <= 6:
        with pytest.raises(ValueError, match=r"of 6 input files are not done: train/chunk[12]/example_train_\d"):
            finish(FinishOptions(directory=str(out)))
    run(options(corpus, out, task=f"{order[-1]}/{tasks}"))
    finish(FinishOptions(directory=str(out)))
    assert_same_bytes(out, undisturbed, but="units/")  # they say what encoded them
    for task in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(ValueError, match="is not K/N with 1 <= K <= N"):
            run(options(corpus, out, task=task))


def test_no_worker_outlives_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the work between two files lets the workers end before another run may begin."""
    out, held = tmp_path / "out", []
    write_jsonl(tmp_path / "in/train/chunk1/a.jsonl.zst", BAD_LINES["bad JSON"])
    write_jsonl(tmp_path / "in/train/chunk1/b.jsonl.zst", line("good"))

    def watched(*args: object) -> Iterator[UnitRecord]:
        try:
            yield from prepare_units(*args)
        finally:
            try:
                with only_run(out, 1, 1):
                    held.append(False)
            except ValueError:
                held.append(True)

    monkeypatch.setattr("data_prep.prepare.prepare_units", watched)
    with pytest.raises(ValueError, match="1 of 1 documents are bad") as error:
        run(options(tmp_path / "in", out))
    assert held == [True], error


def test_two_runs_in_one_folder_are_refused(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    with only_run(out, 1, 2):
        for task in ("1/1", "1/2", "1/3", "2/3"):
            with pytest.raises(ValueError, match="another data-prep is at work in"):
                run(options(corpus, out, task=task))
        with only_run(out, 2, 2):
            pass
        with pytest.raises(ValueError, match="another data-prep is at work"), only_run(out, 1, 1):
            pass
    with only_run(out, 1, 1), pytest.raises(ValueError, match="another data-prep"), only_run(out, 1, 2):
        pass
    with locked(out / "lock"):
        pass
