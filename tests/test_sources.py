"""Sources: every record of the publishers' layouts is seen once, in order; what can't be read is named."""

from collections import Counter
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.readers import Bad, read_jsonl
from data_prep.sources import Document, SlimPajama, StarCoder


def write_jsonl(path: Path, *lines: bytes, frames: int = 1) -> Path:
    """A jsonl.zst file of the lines as they are, in one or several zstd frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cuts = [lines[n::frames] for n in range(frames)] if frames > 1 else [lines]
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(b"".join(compress(b"".join(line + b"\n" for line in part)) for part in cuts))
    return path


def line(text: object, subset: str = "RedPajamaC4") -> bytes:
    """A line as SlimPajama has it."""
    return orjson.dumps({"text": text, "meta": {"redpajama_set_name": subset}})


def write_parquet(path: Path, contents: list[object]) -> Path:
    """A file as StarCoderData has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "id": [str(n) for n in range(len(contents))],
        "content": contents,
        "max_stars_count": [None] * len(contents),
    }
    pq.write_table(pa.table(table), path, row_group_size=100)
    return path


def everything(source: SlimPajama | StarCoder) -> list[tuple[str, Document]]:
    return [(unit, document) for unit in source.units() for document in source.documents(unit)]


def test_slimpajama_is_read_in_sorted_order_and_github_dropped(tmp_path: Path) -> None:
    for name in (
        "chunk2/example_train_0",
        "chunk10/example_train_1",
        "chunk1/example_train_1",
        "chunk1/example_train_0",
    ):
        write_jsonl(tmp_path / f"train/{name}.jsonl.zst", line(name), line("code", "RedPajamaGithub"), b"", line(""))
    write_jsonl(tmp_path / "validation/chunk1/example_holdout_0.jsonl.zst", line("held out"))
    source = SlimPajama(tmp_path, "train")
    assert source.units() == [
        f"train/{name}.jsonl.zst"
        for name in (
            "chunk1/example_train_0",
            "chunk1/example_train_1",
            "chunk10/example_train_1",
            "chunk2/example_train_0",
        )
    ]
    documents = everything(source)
    assert [d.text for _, d in documents if not d.dropped] == [u[6:-10] for u in source.units()]
    assert Counter((d.subset, d.dropped) for _, d in documents) == {
        ("RedPajamaC4", ""): 4,
        ("RedPajamaGithub", "excluded subset"): 4,
        ("RedPajamaC4", "empty"): 4,
    }
    assert [d.row for _, d in documents[:3]] == [0, 1, 3]  # line 2 is blank
    assert [d.text for _, d in everything(SlimPajama(tmp_path, "validation"))] == ["held out"]


def test_linked_folders_are_read_once_and_links_in_a_circle_end(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "disk2/chunk2/b.jsonl.zst", line("b"))
    write_jsonl(tmp_path / "in/train/chunk1/a.jsonl.zst", line("a"))
    (tmp_path / "in/train/chunk2").symlink_to(tmp_path / "disk2/chunk2")
    (tmp_path / "in/train/chunk2/circle").symlink_to(tmp_path / "in/train")
    (tmp_path / "in/train/twice").symlink_to(tmp_path / "disk2/chunk2")
    source = SlimPajama(tmp_path / "in", "train")
    assert source.units() == ["train/chunk1/a.jsonl.zst", "train/chunk2/b.jsonl.zst"]
    assert [d.text for _, d in everything(source)] == ["a", "b"]
    (tmp_path / "in/train/chunk1/c.jsonl.zst").symlink_to(tmp_path / "disk3/c.jsonl.zst")  # a disk that is not mounted
    with pytest.raises(FileNotFoundError, match=r"c\.jsonl\.zst"):
        source.source_bytes(source.units()[1])


def test_jsonl_of_several_frames_and_a_long_line(tmp_path: Path) -> None:
    texts = ["x" * 5_000_000, "é\u2028\x85\\n", "third", "\ud7ff\U0010ffff"]
    path = write_jsonl(tmp_path / "a.jsonl.zst", *(line(text) for text in texts), frames=4)
    assert [record["text"] for _, record in read_jsonl(path)] == texts


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        (b'{"text": "cut', "bad JSON", "unexpected end of data"),
        (b'{"text": "\xff", "meta": {}}', "bad UTF-8", "0xff in position 10"),
        (b'{"text": "\\ud800", "meta": {}}', "bad JSON", "surrogate"),
        (b'{"text": "no meta"}', "missing field", '"meta.redpajama_set_name"'),
        (b'{"text": "", "meta": {"redpajama_set_name": null}}', "missing field", "is not a name"),
        (b'{"meta": {"redpajama_set_name": "RedPajamaC4"}}', "missing field", '"text"'),
        (b'["text"]', "missing field", '"text"'),
        (line(None), "not text", "the document is NoneType, not text"),
        (line(17), "not text", "the document is int, not text"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, bad: bytes, reason: str, detail: str) -> None:
    write_jsonl(tmp_path / "train/a.jsonl.zst", line("1"), b"", line("2"), bad, line("4"))
    documents = [d for _, d in everything(SlimPajama(tmp_path, "train"))]
    assert [(d.row, d.text) for d in documents] == [(0, "1"), (2, "2"), (3, ""), (4, "4")]
    assert [d.dropped for d in documents] == ["", "", reason, ""]
    fault = documents[2].bad
    assert fault is not None
    assert (fault.reason, fault.documents) == (reason, 1)
    assert detail in fault.detail


def test_starcoder_splits_are_disjoint_and_everything(tmp_path: Path) -> None:
    special = ["jupyter-scripts-dedup-filtered", "github-issues-filtered-structured", "git-commits-cleaned"]
    for language in ("python", "c-sharp", *special):
        for n in range(2):
            contents = [f"{language} {n} {row}" for row in range(1000)]
            write_parquet(tmp_path / f"{language}/train-{n:05d}-of-00002.parquet", contents)
    train, validation = (everything(StarCoder(tmp_path, split, 0.1)) for split in ("train", "validation"))
    assert len(train) == len(validation) == 10_000
    kept = [{d.text for _, d in split if not d.dropped} for split in (train, validation)]
    assert not kept[0] & kept[1]
    assert kept[0] | kept[1] == {d.text for _, d in train}
    assert 900 < len(kept[1]) < 1100
    assert {d.dropped for _, d in train} == {"", "other split"}
    assert {d.subset for _, d in train} == {"python", "c-sharp", *special}
    assert all(d.text == f"{d.subset} {int(unit.split('train-')[1][:5])} {d.row}" for unit, d in train)
    assert [u for u, _ in train] == sorted(u for u, _ in train)
    (tmp_path / "moved").mkdir()
    for language in ("python", "c-sharp", *special):
        (tmp_path / language).rename(tmp_path / "moved" / language)
    assert everything(StarCoder(tmp_path / "moved", "train", 0.1)) == train


@pytest.mark.parametrize("input_folder", ["corpus", "corpus/starcoderdata/python"])
def test_starcoder_is_not_read_from_above_or_below_its_folder(tmp_path: Path, input_folder: str) -> None:
    for language in ("python", "java"):
        write_parquet(tmp_path / f"corpus/starcoderdata/{language}/train-00000-of-00001.parquet", ["a", "b"])
    assert len(StarCoder(tmp_path / "corpus/starcoderdata", "train", 0.1).units()) == 2
    words = f"below --input {tmp_path / input_folder}: give the folder that holds the languages"
    with pytest.raises(ValueError, match=words):
        StarCoder(tmp_path / input_folder, "train", 0.1).units()


def test_a_parquet_column_that_is_missing_or_holds_no_text(tmp_path: Path) -> None:
    (tmp_path / "python").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"], "id": [1, 2]}), tmp_path / "python/a.parquet")
    ((_, missing),) = everything(StarCoder(tmp_path, "train", 0.1))
    assert missing.bad == Bad("missing column", "there is no column 'content', only text, id", documents=2)
    write_parquet(tmp_path / "python/a.parquet", ["a", None, "c"])
    found = [(d.row, d.text, d.dropped) for _, d in everything(StarCoder(tmp_path, "train", 1e-9))]
    assert found == [(0, "a", ""), (1, "", "not text"), (2, "c", "")]


def test_special_folders_are_read_by_their_content_alone(tmp_path: Path) -> None:
    """Commits, notebooks and issues have other columns than the languages, and the text in the same one.

    The columns of commits and of structured notebooks are those that the publisher's own notebooks write
    (bigcode-dataset, preprocessing/filtering_git_commits.ipynb and jupyter-structured.ipynb); the one of issues is what
    the steps behind them, the publisher's and others', read. Their marks of structure are text like any other.
    """
    others: dict[str, dict[str, object]] = {
        "python": {"max_stars_repo_path": "a.py", "max_stars_repo_name": "a/b", "max_stars_count": 3, "id": "0"},
        "jupyter-scripts-dedup-filtered": {"max_stars_repo_path": "a.ipynb", "max_stars_count": None, "id": "0"},
        "jupyter-structured-clean-dedup": {
            "license": ["mit"],
            "path": "a.ipynb",
            "repo_name": "a/b",
            "chain_length": 2,
        },
        "github-issues-filtered-structured": {
            "repo": "a/b",
            "issue_id": 2,
            "events": [{"author": "c", "text": "never"}],
        },
        "git-commits-cleaned": {"commit": "0a1b", "repos": "a/b", "old_file": "never.py", "new_file": "never.py"},
    }
    texts = {
        "jupyter-structured-clean-dedup": "<jupyter_start><jupyter_text>A<jupyter_code>1<jupyter_output>1",
        "github-issues-filtered-structured": "<issue_start>username_0: broken<issue_comment>username_1: mended",
        "git-commits-cleaned": "<commit_before>a = 1\n<commit_msg>Two<commit_after>a = 2\n",
    }
    for folder, columns in others.items():
        (tmp_path / folder).mkdir()
        row = {**columns, "content": texts.get(folder, f"text of {folder}")}
        table = pa.table({name: [value] for name, value in row.items()})
        pq.write_table(table, tmp_path / folder / "train-00000-of-00001.parquet")
    documents = [d for _, d in everything(StarCoder(tmp_path, "train", 1e-9))]
    assert [(d.subset, d.text) for d in documents] == [(f, texts.get(f, f"text of {f}")) for f in sorted(others)]


def test_where_there_is_nothing_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        SlimPajama(tmp_path / "absent", "train")
    with pytest.raises(FileNotFoundError, match=r"no \*\.jsonl\.zst file in .*validation"):
        SlimPajama(tmp_path, "validation").units()
    for holdout in (0, 1, -0.1, 10):
        with pytest.raises(ValueError, match=f"holdout {holdout} is not a share"):
            StarCoder(tmp_path, "train", holdout)
