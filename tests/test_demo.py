"""The demonstration corpus: real text in the publishers' layouts, the same each time."""

import io
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.demo import DemoOptions, run

MINIATURE = 0.03


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpus"
    run(DemoOptions(str(out), scale=MINIATURE))
    return out


def lines(path: Path) -> list[dict]:
    data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())).read()
    return [orjson.loads(line) for line in data.splitlines()]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_prose_lies_as_in_slimpajama(corpus: Path) -> None:
    files = sorted(str(path.relative_to(corpus)) for path in (corpus / "slimpajama").rglob("*.*"))
    assert files == [
        *(f"slimpajama/train/chunk1/example_train_{n}.jsonl.zst" for n in range(4)),
        "slimpajama/validation/chunk1/example_holdout_0.jsonl.zst",
    ]
    records = {file: lines(corpus / file) for file in files}
    assert all(
        set(r) == {"text", "meta"} and set(r["meta"]) == {"redpajama_set_name"} for f in files for r in records[f]
    )
    subsets = {r["meta"]["redpajama_set_name"] for f in files for r in records[f]}
    assert {"RedPajamaGithub", "RedPajamaStackExchange"} <= subsets
    texts = [r["text"] for f in files for r in records[f]]
    assert len(texts) > 10
    assert all(texts)
    train, validation = (
        {r["text"] for f in files if part in f for r in records[f]} for part in ("train", "validation")
    )
    assert validation
    assert not train & validation


def test_code_lies_as_in_starcoderdata(corpus: Path) -> None:
    files = sorted((corpus / "starcoderdata/python").iterdir())
    assert [file.name for file in files] == [f"train-{n:05d}-of-00004.parquet" for n in range(4)]
    texts = [text for file in files for text in pq.read_table(file)["content"].to_pylist()]
    assert len(texts) == len(set(texts)) > 20
    for text in texts:
        compile(text, "a module of the standard library", "exec", dont_inherit=True)


def test_the_same_python_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """In any process: texts hash differently in each."""
    command = [sys.executable, "-m", "data_prep", "demo", "--scale", str(MINIATURE), "--out"]
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([*command, tmp_path / seed], env=environment, check=True, capture_output=True, timeout=600)
        assert content(tmp_path / seed) == content(corpus)


def test_an_earlier_demonstration_is_replaced_and_real_data_is_not(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(DemoOptions(str(out), scale=2 * MINIATURE, max_code_mb=0.2))
    assert content(out) != content(corpus)
    run(DemoOptions(str(out), scale=MINIATURE))
    assert content(out) == content(corpus)
    real = tmp_path / "real/slimpajama/train/chunk1/example_train_0.jsonl.zst"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"59,166 files")
    with pytest.raises(ValueError, match="was not made by data-prep demo"):
        run(DemoOptions(str(tmp_path / "real"), scale=MINIATURE))
    assert real.read_bytes() == b"59,166 files"


def test_code_is_limited(tmp_path: Path) -> None:
    run(DemoOptions(str(tmp_path), scale=0.2, max_code_mb=0.3))
    files = (tmp_path / "starcoderdata").rglob("*.parquet")
    size = sum(len(text.encode()) for file in files for text in pq.read_table(file)["content"].to_pylist())
    assert 0.1e6 < size <= 0.3e6
    with pytest.raises(ValueError, match=r"max_code_mb -1 is not above 0"):
        run(DemoOptions(str(tmp_path), max_code_mb=-1))
