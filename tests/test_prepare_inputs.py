"""What a rerun does again: new and changed input files, which is said, and other encoders'; what is gone is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_prepare import assert_same_bytes, corpus, options, undisturbed  # noqa: F401  corpus, undisturbed: fixtures
from test_sources import line, write_jsonl
from test_tokenizer import LLAMA_MODEL

from data_prep.__main__ import main
from data_prep.folder import Folder
from data_prep.prepare import FinishOptions, finish, run
from data_prep.shard import Manifest

NEW = "train/chunk1/example_train_00.jsonl.zst"


@pytest.fixture
def mine(corpus: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of the corpus, to change."""
    return shutil.copytree(corpus, tmp_path / "corpus")


def test_input_files_that_are_gone_are_refused(
    mine: Path,
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    (mine / "train/chunk2").rename(tmp_path / "away")
    words = (
        r"3 of the 6 input files that .*out was begun with are gone: train/chunk2/example_train_1\.jsonl\.zst, .*5.*zst\. "
        "Bring them back, or give --allow_other_inputs true to leave them out"
    )
    for task in ("1/1", "2/3"):
        with pytest.raises(ValueError, match=words):
            run(options(mine, out, task=task))
    for name in ("inputs.json", "manifest.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    manifest = run(options(mine, out, allow_other_inputs=True))
    assert manifest is not None
    assert [shard.source_file[:12] for shard in manifest.shards] == ["train/chunk1"] * 3
    assert "input files since it was begun: 3 gone: train/chunk2/example_train_1.jsonl.zst, " in capsys.readouterr().out


def test_fewer_files_at_one_node_of_an_array_are_refused_though_nothing_is_done(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(options(mine, out, task="7/7")) is None
    assert not (out / "units").exists()
    (mine / "train/chunk2").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="3 of the 6 input files"):
        run(options(mine, out, task="1/7"))


def test_new_and_changed_files_are_said_and_done(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    run(options(mine, out))
    write_jsonl(mine / NEW, line("new"))
    write_jsonl(mine / "train/chunk2/example_train_1.jsonl.zst", line("another"))
    capsys.readouterr()
    run(options(mine, out))
    said = f"1 new: {NEW}; 1 of another size: train/chunk2/example_train_1.jsonl.zst\n"
    assert f"{out}: input files since it was begun: {said}" in capsys.readouterr().out
    run(options(mine, tmp_path / "fresh"))
    assert_same_bytes(out, tmp_path / "fresh")
    capsys.readouterr()
    run(options(mine, out))
    assert "since it was begun" not in capsys.readouterr().out


def test_new_files_shift_no_share_of_an_array(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(options(mine, out, task="3/7")) is None
    write_jsonl(mine / "train/chunk2/example_train_1.jsonl.zst", line("of another size, by the same name"))
    assert run(options(mine, out, task="1/7")) is None
    write_jsonl(mine / NEW, line("new"))
    with pytest.raises(
        ValueError, match=r"1 input files are new since .*out was begun with 6: train/chunk1/.*00\.jsonl"
    ):
        run(options(mine, out, task="2/7"))
    for task in range(1, 8):
        assert run(options(mine, out, task=f"{task}/7", allow_other_inputs=True)) is None
    finish(FinishOptions(directory=str(out)))
    run(options(mine, tmp_path / "fresh"))
    assert_same_bytes(out, tmp_path / "fresh")
    assert len(Manifest.load(out).shards) == 7


def test_a_name_that_is_not_utf_8_is_one_line(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    odd = os.fsencode(mine) + b"/train/chunk1/caf\xe9.jsonl.zst"
    os.rename(mine / "train/chunk1/example_train_0.jsonl.zst", odd)
    out = str(tmp_path / "out")
    arguments = ["--input", str(mine), "--split", "train", "--tokenizer", str(LLAMA_MODEL), "--out", out]
    assert main(["slimpajama", *arguments, "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "data-prep: error: the names of 1 input files are not UTF-8: 'train/chunk1/caf\\udce9.jsonl.zst'. Rename them\n"
    )


def test_new_files_before_anything_is_done_are_taken(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(options(mine, out, task="7/7")) is None
    write_jsonl(mine / NEW, line("new"))
    assert run(options(mine, out, task="1/7")) is None


def test_the_reference_does_again_what_gigatoken_encoded_and_is_kept(
    corpus: Path,  # noqa: F811
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    victim = out / Manifest.load(out).shards[0].path
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1  # what gigatoken is to have made otherwise
    victim.write_bytes(data)
    run(options(corpus, out, task="1/2", encoder="reference"))
    assert "3 of 3 input files done now" in capsys.readouterr().out
    for encoder, todo in (("auto", 0), ("reference", 3), ("reference", 0), ("auto", 0)):
        run(options(corpus, out, encoder=encoder))
        assert f"{todo} of 6 input files done now" in capsys.readouterr().out
    assert_same_bytes(out, undisturbed, but="units/")
    assert all(record.engine == "reference" for record in Folder(out).records(Folder(out).inputs()).values())


def test_records_of_before_the_encoder_stood_in_them_count(
    corpus: Path,  # noqa: F811
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    for path in (out / "units").rglob("*.json"):
        record = json.loads(path.read_text())
        assert record.pop("engine") == "gigatoken"
        path.write_text(json.dumps(record))
    run(options(corpus, out))
    assert "0 of 6 input files done now" in capsys.readouterr().out


def _damaged(record: dict, place: str, value: object) -> dict:
    """`record` with `value` at "a.b" or "a"."""
    key, _, rest = place.partition(".")
    return record | {key: _damaged(record[key], rest, value) if rest else value}


PLACES = ("bad_documents", "lost_bytes", "source_bytes", "shard.source_file", "shard.dropped", "bad")
NO_DAMAGE = (("shard.dropped", {}), ("bad", []), ("bad", {}))


@pytest.mark.parametrize(
    ("place", "value"),
    [(p, v) for p in PLACES for v in (None, "3", [], {}, -1, 0.5) if (p, v) not in NO_DAMAGE],
)
def test_a_damaged_record_is_none(
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
    place: str,
    value: object,
) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    folder = Folder(out)
    unit, *others = folder.inputs()
    path = out / f"units/{unit}.json"
    path.write_text(json.dumps(_damaged(json.loads(path.read_text()), place, value)))
    assert list(folder.records(folder.inputs())) == others
    with pytest.raises(ValueError, match=f"1 of 6 input files are not done: {unit}"):
        finish(FinishOptions(directory=str(out)))


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("settings.json", ("[]", "null", "{}", '"x"', "{", "[" * 100_000, '{"tokenizer": []}')),
        ("inputs.json", ("[]", "null", '"x"', "{", "[" * 100_000, '{"a": "x"}', '{"a": -1}', '{"a": null}')),
    ],
)
def test_what_a_folder_was_begun_with_is_not_read_from_a_damaged_file(
    corpus: Path,  # noqa: F811
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
    contents: tuple[str, ...],
) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    for content in contents:
        (out / name).write_text(content)
        for command in (lambda: run(options(corpus, out)), lambda: finish(FinishOptions(directory=str(out)))):
            with pytest.raises(ValueError, match=rf"{out / name} is .*: (copy it from|delete it and run the command)"):
                command()
    (out / name).write_bytes((undisturbed / name).read_bytes())
    settings = json.loads((out / name).read_text())
    for field, value in (("source", []), ("name", 3), ("append_eos", None)) if name == "settings.json" else ():
        (out / name).write_text(json.dumps(settings | {field: value}))
        with pytest.raises(ValueError, match=rf"{out / name} is damaged \(manifest: "):
            run(options(corpus, out))
    (out / name).unlink()
    if name == "inputs.json":  # the remedy
        run(options(corpus, out))
        assert_same_bytes(out, undisturbed)
