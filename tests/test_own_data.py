"""Anyone's data: every format and compression gives the same documents, and the commands make datasets of them."""

import errno
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_prepare_faults import assert_same_bytes_of_any_size
from test_tokenizer import LLAMA_MODEL

from data_prep.__main__ import main
from data_prep.own_data import HubDataset, TextFiles
from data_prep.readers import Bad
from data_prep.shard import Manifest, TokenDataset
from data_prep.tokenizer import load

TEXTS = [f"Text {n}: naïve </s> {'word ' * (n % 7)}\n" for n in range(60)]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def jsonl(records: list[object]) -> bytes:
    return b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESSIONS[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(jsonl([{"body": {"text": text}} for text in TEXTS])))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress("\n<|end|>\n".join(TEXTS).encode()))
    pq.write_table(pa.table({"body.text": TEXTS}), tmp_path / "c.parquet")
    source = TextFiles([str(tmp_path / "*")], text_key="body.text", separator="<|end|>")
    assert source.units() == [f"a.jsonl{suffix}", f"b.txt{suffix}", "c.parquet"]
    found = {unit: [d.text for d in source.documents(unit) if not d.dropped] for unit in source.units()}
    assert found[f"a.jsonl{suffix}"] == found["c.parquet"] == TEXTS
    assert found[f"b.txt{suffix}"] == [*TEXTS[:-1], TEXTS[-1].rstrip("\n")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_parquet_in_another_compression_is_refused_and_not_read_as_text(tmp_path: Path, suffix: str) -> None:
    for name in ("a.parquet", f"b.parquet{suffix}", f"c.jsonl{suffix}"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"b\.parquet\{suffix} is parquet"):
        TextFiles([str(tmp_path / "*")]).units()


def test_units_subsets_and_bad_lines(tmp_path: Path) -> None:
    for name in ("x/en/a.jsonl", "x/de/b.jsonl", "x/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([{"text": name, "meta": {"kind": "k"}}, "just text", {"other": 1}, 7]))
    (tmp_path / "x/ignored.bin").touch()
    source = TextFiles([f"{tmp_path}/x/**/*.jsonl"])
    assert source.units() == ["c.jsonl", "de/b.jsonl", "en/a.jsonl"]
    found = list(source.documents("en/a.jsonl"))
    assert [(d.subset, d.text, d.dropped) for d in found] == [
        ("en", "x/en/a.jsonl", ""),
        ("en", "just text", ""),
        ("en", "", "missing field"),
        ("en", "", "missing field"),
    ]
    assert found[2].bad == Bad("missing field", "the line has no 'text'")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "x/d.parquet")
    pq.write_table(pa.table({"text": [{"text": "a"}, {"other": "b"}]}), tmp_path / "e.parquet")
    structs = list(TextFiles([f"{tmp_path}/*.parquet"]).documents("e.parquet"))
    assert [found.bad and found.bad.reason for found in structs] == ["not text"] * 2, "whatever the struct holds"
    _, null = TextFiles([f"{tmp_path}/x/*.parquet"]).documents("d.parquet")
    assert null.bad == Bad("not text", "the document is NoneType, not text")
    kinds = TextFiles([f"{tmp_path}/x/**/*.jsonl"], subset_key="meta.kind").documents("c.jsonl")
    assert next(kinds).subset == "k"
    # A file more above or below changes no unit's name: names come from the pattern.
    assert TextFiles([f"{tmp_path}/x/*/*.jsonl"]).units() == ["de/b.jsonl", "en/a.jsonl"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        TextFiles([f"{tmp_path}/*.gz"]).units()
    with pytest.raises(FileNotFoundError, match="no file matches /;"):
        TextFiles(["/"]).units()
    with pytest.raises(ValueError, match="validation split is empty"):
        TextFiles([str(tmp_path)], split="validation")


def documents_of(out: Path) -> list[str]:
    dataset = TokenDataset(out)
    tokens = dataset.sequences([0], dataset.num_tokens - 1)[0].tolist()
    texts, begin, tokenizer = [], 0, load(out / "tokenizer")
    for end in (n for n, token in enumerate(tokens) if token == 2):
        texts.append(tokenizer.decode(tokens[begin:end]))
        begin = end + 1
    return texts


def test_the_text_command_splits_and_joins(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl([{"text": text} for text in TEXTS])))
    texts: list[str] = []
    for split in ("train", "validation"):
        arguments = [
            "--input",
            str(tmp_path / "*.zst"),
            "--tokenizer",
            str(LLAMA_MODEL),
            "--out",
            str(tmp_path / split),
        ]
        assert main(["text", *arguments, "--split", split, "--holdout", "0.3", "--workers", "1"]) == 0
        texts += documents_of(tmp_path / split)
    assert Manifest.load(tmp_path / "train").settings == {"text_key": "text", "holdout": 0.3}
    assert 5 < len(documents_of(tmp_path / "validation")) < 30
    assert sorted(texts) == sorted(TEXTS)


def test_the_text_command_is_an_array_too(tmp_path: Path) -> None:
    for n in range(5):
        (tmp_path / f"{n}.txt").write_text("\n~~\n".join(text.rstrip("\n") for text in TEXTS[n::5]))
    arguments = ["text", "--input", str(tmp_path / "*.txt"), "--separator", "~~", "--tokenizer", str(LLAMA_MODEL)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*arguments, "--workers", "1", "--out", str(whole)]) == 0
    for task in (2, 1):
        assert main([*arguments, "--workers", "1", "--out", str(parts), "--task", f"{task}/2"]) == 0
        done = {path.name for path in parts.glob("units/*.json")}
        assert done == {f"{n}.txt.json" for n in range(5) if task == 1 or n % 2}
        assert not (parts / "manifest.json").exists()
    assert main(["finish", str(parts)]) == 0
    assert_same_bytes_of_any_size(parts, whole)
    assert sorted(documents_of(parts)) == sorted(text.rstrip("\n") for text in TEXTS)


@pytest.fixture(scope="module")
def local_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "words"
    folder.mkdir()
    for n in range(3):
        part = datasets.Dataset.from_dict({"id": list(range(20)), "words": TEXTS[n * 20 : n * 20 + 20]})
        part.to_parquet(folder / f"train-{n:05d}-of-00003.parquet")
    return folder


def test_a_dataset_of_the_hub_streams_file_by_file(local_dataset: Path) -> None:
    source = HubDataset(str(local_dataset), "train", text_key="words")
    assert source.units() == [f"shard-{n:05d}-of-00003" for n in range(3)]
    found = [document for unit in source.units() for document in source.documents(unit)]
    assert [d.text for d in found] == TEXTS
    assert [d.row for d in found] == list(range(20)) * 3
    for changes, message in [
        ({"text_key": "text"}, "has no column 'text', only id, words"),
        ({"split": "test"}, "can't load the dataset"),
        ({"dataset": str(local_dataset / "nothing")}, "can't load the dataset"),
        ({"dataset": ""}, "--dataset is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            HubDataset(**{"dataset": str(local_dataset), "split": "train", "text_key": "words", **changes})


def test_a_disk_that_fails_under_a_dataset_of_the_hub_is_waited_for(
    local_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What has an errno is the machine's; what `datasets` raises for other reasons stops the work at once."""
    arguments = ["hf", "--dataset", str(local_dataset), "--split", "train", "--text_key", "words", "--workers", "1"]
    arguments += ["--tokenizer", str(LLAMA_MODEL), "--out", str(tmp_path / "out")]
    pauses: list[float] = []
    monkeypatch.setattr("data_prep.unit.time.sleep", pauses.append)
    real = datasets.IterableDataset.__iter__
    faults: list[Exception] = [RuntimeError("no such thing"), *[OSError(errno.EIO, "Input/output error")] * 2]

    def failing(self: datasets.IterableDataset) -> Iterator[dict]:
        for n, record in enumerate(real(self)):
            if n == 7 and faults:
                raise faults.pop(0)
            yield record

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", failing)
    assert main(arguments) == 2
    assert "shard-00000-of-00003 can't be read: no such thing; run the same" in capsys.readouterr().err
    assert (len(faults), pauses) == (2, [])
    assert main(arguments) == 0
    assert (faults, pauses) == ([], [1, 2])
    said = capsys.readouterr().err
    assert said.count("Input/output error: ") == said.count("shard-00000-of-00003' on ") == 1, said
    assert documents_of(tmp_path / "out") == TEXTS


def test_the_hf_command_makes_a_dataset(local_dataset: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", str(local_dataset), "--split", "train", "--text_key", "words", "--workers", "2"]
    assert main(["hf", *arguments, "--tokenizer", str(LLAMA_MODEL), "--out", str(tmp_path / "out")]) == 0
    assert documents_of(tmp_path / "out") == TEXTS
    assert Manifest.load(tmp_path / "out").name == "hf"


def test_bad_documents_are_held_against_all_where_sizes_are_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The first file has one bad document in 20, all have one in 60; too many are named again by each run."""
    (tmp_path / "in").mkdir()
    for n in range(3):
        texts = [None if n == k == 0 else f"text {k}" for k in range(20)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"in/train-{n:05d}-of-00003.parquet")
    arguments = ["hf", "--dataset", str(tmp_path / "in"), "--split", "train", "--workers", "1"]
    arguments += ["--tokenizer", str(LLAMA_MODEL), "--out", str(tmp_path / "out"), "--max_bad_documents"]
    for _ in range(3):
        assert main([*arguments, "0.01"]) == 2
        captured = capsys.readouterr()
        assert "skipped shard-00000-of-00003 line 1: not text" in captured.err
        assert "1 of 60 documents are bad" in captured.err
    assert main([*arguments, "0.02"]) == 0
    assert Manifest.load(tmp_path / "out").dropped == {"not text": 1}
