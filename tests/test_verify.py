"""Looking into a dataset: verify finds every single change, inspect names file and line, stats adds up."""

import io
import os
import re
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2
from test_prepare import options as prepare_options
from test_sources import line, write_jsonl
from test_tokenizer import LLAMA_MODEL

from data_prep import scan, stats
from data_prep.__main__ import main
from data_prep.prepare import run as prepare
from data_prep.shard import Manifest, TokenDataset
from data_prep.tokenizer import load

TEXTS = {(unit, n): f"Document {n} of file {unit}. " + "word " * (37 * n % 101) for unit in range(3) for n in range(40)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    for unit in range(3):
        lines = [line(TEXTS[unit, n], "RedPajamaGithub" if n % 7 == 3 else "RedPajamaC4") for n in range(40)]
        lines.insert(5, b"")
        write_jsonl(root / f"in/train/chunk1/example_train_{unit}.jsonl.zst", *lines)
    prepare(prepare_options(root / "in", root / "out"))
    return root / "out"


def test_what_was_made_is_verified(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(dataset)]) == 0
    manifest = Manifest.load(dataset)
    assert f"{manifest.tokens:,} tokens of {manifest.documents:,} documents in 3 shards" in capsys.readouterr().out


def tampered(path: Path, at: int, change: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= change
    path.write_bytes(data)


def test_every_change_of_a_byte_is_found(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    victim = Manifest.load(dataset).shards[1].path
    size = (dataset / victim).stat().st_size
    rng = np.random.default_rng(0)
    for n, at in enumerate([128, size - 1, *rng.integers(128, size, 20)]):
        copy = shutil.copytree(dataset, tmp_path / str(n))
        tampered(copy / victim, int(at), 1 << int(rng.integers(8)))
        assert main(["verify", str(copy)]) == 2
        output = capsys.readouterr()
        assert f"{victim}: its tokens have the checksum" in output.out
        assert "1 problems in 3 shards" in output.err or "2 problems" in output.err


@pytest.mark.parametrize("block_bytes", [64, 8 << 20])
def test_each_other_fault_has_its_words(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """What is wrong lies in the first block of many, or in the only one."""
    monkeypatch.setattr(scan, "_BLOCK_BYTES", block_bytes)
    shard = Manifest.load(dataset).shards[0]
    index = f"documents/{shard.source_file}.npy"

    def found(change: str) -> str:
        copy = shutil.copytree(dataset, tmp_path / change)
        ids = np.load(copy / shard.path)
        rows = np.load(copy / index)
        if change == "header":
            tampered(copy / shard.path, 61, 1)
        elif change == "id":
            ids[5] = 40000
            np.save(copy / shard.path, ids)
        elif change == "eos":
            ids[5] = 2
            np.save(copy / shard.path, ids)
        elif change == "list":
            rows[1] += 1
            np.save(copy / index, rows)
        elif change == "order":
            rows[4] = 0
            np.save(copy / index, rows)
        assert main(["verify", str(copy)]) == 2
        return capsys.readouterr().out

    assert re.search("header says|not a readable .npy file", found("header"))
    assert "ids from 2 to 40000 are not all in a vocabulary of 32000" in found("id")
    assert f"{shard.documents + 1} EOS for {shard.documents} documents" in found("eos")
    assert f"{index} has documents of {shard.tokens + 1:,} tokens in all, the manifest {shard.tokens:,};" in found(
        "list"
    )
    assert "not in order" in found("order")


def test_a_missing_list_of_documents_is_a_problem_where_data_was_prepared(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    shard = Manifest.load(copy).shards[1]
    name = f"documents/{shard.source_file}.npy"
    (copy / name).unlink()
    assert main(["verify", str(copy)]) == 2
    assert f"{shard.path}: its list of documents, {name}, is missing\n" in capsys.readouterr().out
    prepare(prepare_options(dataset.parent / "in", copy))  # the remedy
    assert main(["verify", str(copy)]) == 0
    assert "without lists" not in capsys.readouterr().out
    shutil.rmtree(copy / "documents")
    (copy / "settings.json").unlink()
    assert main(["verify", str(copy)]) == 0
    assert "are what the manifest says, without lists of documents (" in capsys.readouterr().out


def _saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


DAMAGED_LISTS = {
    "zero lengths": lambda pairs, data: _saved(pairs * (np.arange(len(pairs)) % 2 == 0).astype(np.uint32)),
    "negative": lambda pairs, data: _saved(-pairs.astype(np.int64)),
    "floats": lambda pairs, data: _saved(pairs.astype(np.float64)),
    "texts": lambda pairs, data: _saved(pairs.astype(str)),
    "objects": lambda pairs, data: _saved(pairs.astype(object)),
    "too few": lambda pairs, data: _saved(pairs[:-2]),
    "odd": lambda pairs, data: _saved(pairs[:-1]),
    "cut short": lambda pairs, data: data[:-8],
    "empty": lambda pairs, data: b"",
    "zip": lambda pairs, data: b"PK" + data[2:],
    "zip of nothing": lambda pairs, data: b"PK\x05\x06" + bytes(18),
    "header of brackets": lambda pairs, data: data[:10] + b"(" * 118 + data[128:],
    "header of no Python": lambda pairs, data: data[:10] + b"'" * 3 + b"\n" * 115 + data[128:],
}


@pytest.mark.parametrize("damage", DAMAGED_LISTS)
def test_a_damaged_list_of_documents_is_named_by_all_who_read_it(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage: str
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    index = copy / f"documents/{Manifest.load(copy).shards[0].source_file}.npy"
    index.write_bytes(DAMAGED_LISTS[damage](np.load(index), index.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(index))):
        TokenDataset(copy).documents(0, 10)
    for command in (["verify"], ["stats"], ["inspect", "--sequence", "0", "--seq_len", "60"]):
        assert main([command[0], str(copy), *command[1:]]) == 2
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1].startswith("data-prep: error: ")
        assert str(index) in (captured.out if command == ["verify"] else captured.err)
        assert "pickle" not in captured.out + captured.err
    index.unlink()  # the remedy
    prepare(prepare_options(dataset.parent / "in", copy))
    assert main(["verify", str(copy)]) == 0


@pytest.mark.parametrize("damage", [b"PK", b"", b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118])
def test_a_damaged_header_of_a_shard_is_a_problem(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage: bytes
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    shard = copy / Manifest.load(copy).shards[0].path
    shard.write_bytes(damage.ljust(128, b"\0") + shard.read_bytes()[128:])
    assert main(["verify", str(copy)]) == 2
    assert "not a readable .npy file: its header is damaged\n" in capsys.readouterr().out


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of as many pieces as the dataset's, two of them in each other's place, in a SentencePiece model too."""
    folder = tmp_path_factory.mktemp("other")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(LLAMA_MODEL.read_bytes())
    pieces = {piece.piece: piece for piece in model.pieces}
    pieces["▁word"].piece, pieces["▁file"].piece = "▁file", "▁word"
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    load(folder / "tokenizer.model").save(folder, prepend_bos=False)
    return folder


DAMAGED_TOKENIZERS = {
    "no folder": lambda folder, other: shutil.rmtree(folder),
    "no model": lambda folder, other: (folder / "tokenizer.model").unlink(),
    "no json": lambda folder, other: (folder / "tokenizer.json").unlink(),
    "no config": lambda folder, other: (folder / "tokenizer_config.json").unlink(),
    "short model": lambda folder, other: os.truncate(folder / "tokenizer.model", 500),
    "short json": lambda folder, other: os.truncate(folder / "tokenizer.json", 500),
    "json of brackets": lambda folder, other: (folder / "tokenizer.json").write_text("[" * 100_000),
    "json of nothing": lambda folder, other: (folder / "tokenizer.json").write_text("{}"),
    "config a list": lambda folder, other: (folder / "tokenizer_config.json").write_text("[]"),
    "other EOS": lambda folder, other: (folder / "tokenizer_config.json").write_text('{"eos_token": "<s>"}'),
    "another's": lambda folder, other: shutil.copytree(other, folder, dirs_exist_ok=True),
    "another's json": lambda folder, other: shutil.copy(other / "tokenizer.json", folder),
}


@pytest.mark.parametrize("damage", DAMAGED_TOKENIZERS)
def test_a_tokenizer_that_did_not_make_the_ids_is_named_and_made_anew(
    dataset: Path, other_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage: str
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    DAMAGED_TOKENIZERS[damage](copy / "tokenizer", other_tokenizer)
    words = f"{copy / 'tokenizer'} is not the tokenizer that made the ids: "
    assert main(["verify", str(copy)]) == 2
    assert re.fullmatch(f"{re.escape(words)}.*; run the data-prep command .*\n", capsys.readouterr().out)
    assert main(["inspect", str(copy), "--sequence", "0", "--seq_len", "60"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert words in captured.err
    # The remedy; the workers' reference is the folder's tokenizer, and all is done again by it.
    prepare(prepare_options(dataset.parent / "in", copy, workers=2, encoder="reference"))
    assert main(["verify", str(copy)]) == 0
    assert Manifest.load(copy) == Manifest.load(dataset)


@pytest.mark.parametrize("seq_len", [16, 100, 2000])
def test_inspect_names_the_file_and_line_of_every_token(dataset: Path, seq_len: int) -> None:
    tokens = TokenDataset(dataset)
    tokenizer = load(LLAMA_MODEL)
    kept = {
        (f"train/chunk1/example_train_{unit}.jsonl.zst", n + 1 + (n >= 5)): [
            *tokenizer.encode_batch([text])[0].tolist(),
            2,
        ]
        for (unit, n), text in TEXTS.items()
        if n % 7 != 3
    }
    seen = 0
    for i in range(tokens.num_sequences(seq_len)):
        ids, at = tokens.sequences([i], seq_len)[0].tolist(), 0
        for part in tokens.documents(i * seq_len, seq_len + 1):
            document = kept[part.source_file, part.line]
            assert ids[at : at + part.tokens] == document[part.first : part.first + part.tokens]
            assert part.document_tokens == len(document)
            at, seen = at + part.tokens, seen + 1
        assert at == seq_len + 1
    assert seen > tokens.num_sequences(seq_len) > 0


def test_the_inspect_command(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(dataset), "--sequence", "0", "--seq_len", "60"]) == 0
    output = capsys.readouterr().out
    assert (
        "--- train/chunk1/example_train_0.jsonl.zst line 1, tokens 0 to 9 of its 10 ---\nDocument 0 of file 0."
        in output
    )
    assert "train_0.jsonl.zst line 2," in output
    assert main(["inspect", str(dataset), "--sequence", "100000"]) == 2
    assert "which has" in capsys.readouterr().err
    for length in ("-5", "0"):
        assert main(["inspect", str(dataset), "--sequence", "0", "--seq_len", length]) == 2
        assert capsys.readouterr().err == f"data-prep: error: seq_len is {length}; it must be at least 1 token\n"


def test_stats_add_up(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    manifest = Manifest.load(dataset)
    lengths = stats.document_lengths(dataset, manifest)
    assert lengths is not None
    assert lengths.histogram.sum() == manifest.documents
    kept = [text for (_, n), text in TEXTS.items() if n % 7 != 3]
    expected = [len(ids) + 1 for ids in load(LLAMA_MODEL).encode_batch(kept)]
    assert (lengths.longest, lengths.percentiles[50]) == (max(expected), np.median(expected))
    picture = tmp_path / "stats.png"
    other = shutil.copytree(dataset, tmp_path / "other")
    arguments = [str(dataset), str(other), "--weight", "7", "3", "--train_tokens", "1e6", "--picture", str(picture)]
    assert main(["stats", *arguments]) == 0
    output = capsys.readouterr().out
    assert f"{manifest.tokens:,}" in output
    assert f"{0.7e6 / manifest.tokens:.2f}" in output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert stats.epochs([100, 300], [7, 3], 1000) == [7.0, 1.0]
    assert main(["stats", str(dataset), "--weight", "7", "3"]) == 2
    assert "2 weights for 1 datasets" in capsys.readouterr().err
    assert main(["stats", str(dataset), str(dataset)]) == 2
    assert "is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("short", [1, 50, 1 << 20])
def test_lengths_counted_file_by_file_are_those_of_all_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    monkeypatch.setattr(stats, "_SHORT", short)
    rng = np.random.default_rng(short)
    parts = [rng.geometric(0.01, n).astype(np.uint32) for n in (1, 500, 0, 33, 1000)]
    parts[3][7] = 2**21 + 5
    shards = []
    for n, lengths in enumerate(parts):
        (tmp_path / "documents").mkdir(exist_ok=True)
        np.save(
            tmp_path / f"documents/{n}.npy", np.stack((np.arange(len(lengths), dtype=np.uint32), lengths), 1).ravel()
        )
        shards.append(SimpleNamespace(source_file=str(n), documents=len(lengths), tokens=int(lengths.sum())))
    found = stats.document_lengths(tmp_path, SimpleNamespace(shards=shards))
    every = np.concatenate(parts)
    assert found is not None
    assert found.percentiles == {p: pytest.approx(np.percentile(every, p), abs=0, rel=1e-12) for p in (1, 50, 99)}
    assert found.longest == 2**21 + 5
    np.testing.assert_array_equal(found.histogram, np.histogram(every, stats._BINS)[0])


def test_stats_of_many_documents_take_no_memory_for_each(tmp_path: Path) -> None:
    """10 files of a million documents, whose lists are 80 MB, take no more memory than two of them."""
    (tmp_path / "documents").mkdir()
    pairs = np.arange(2 << 20, dtype=np.uint32) % 5000
    tokens = int(pairs[1::2].sum(dtype=np.int64))
    shards = [SimpleNamespace(source_file=str(n), documents=1 << 20, tokens=tokens) for n in range(10)]
    for n in range(10):
        np.save(tmp_path / f"documents/{n}.npy", pairs)
    peaks = []
    for count in (2, 10):
        tracemalloc.start()
        assert stats.document_lengths(tmp_path, SimpleNamespace(shards=shards[:count])) is not None
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20)
    assert peaks[1] < 10 * (8 << 20)


def test_half_a_mixture_is_refused(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for given, missing in ((["--weight", "1"], "--train_tokens"), (["--train_tokens", "1e9"], "--weight")):
        assert main(["stats", str(dataset), *given]) == 2
        assert f"{given[0]} without {missing} gives no epochs" in capsys.readouterr().err
    Manifest("import raw", "train", Manifest.load(dataset).tokenizer, True, False, ()).save(tmp_path)
    assert main(["stats", str(dataset), str(tmp_path), "--weight", "7", "3", "--train_tokens", "1e9"]) == 2
    assert f"{tmp_path} has no tokens" in capsys.readouterr().err
    assert main(["stats", str(dataset), "--weight", "1", "--train_tokens", "-5"]) == 2
    assert "train_tokens -5 must not be below 0" in capsys.readouterr().err
