"""Imported files: the tokens of others, read where they lie; what contradicts itself is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import write_dataset
from test_tokenizer import LLAMA_MODEL

from data_prep import documents, scan
from data_prep.__main__ import main
from data_prep.foreign import ImportOptions, run
from data_prep.shard import Manifest, TokenDataset

RNG = np.random.default_rng(0)
PARTS = [RNG.integers(3, 32000, n) for n in (1000, 1, 777)]
for part in PARTS:
    part[-1] = 2  # EOS


def litpkds(path: Path, ids: np.ndarray, dtype: str = "<u2") -> None:
    code = {"<u2": 8, "<i4": 4}[dtype]
    path.write_bytes(struct.pack("<7sQBQ", b"LITPKDS", 1, code, len(ids)) + ids.astype(dtype).tobytes())


def megatron(path: Path, documents: list[np.ndarray], dtype: str = "<u2") -> None:
    code = {"<u2": 8, "<i4": 4}[dtype]
    lengths = np.array([len(document) for document in documents], "<i4")
    places = ((np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize).astype("<i8")
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(documents), len(documents) + 1)
    index = head + lengths.tobytes() + places.tobytes() + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    path.with_suffix(".idx").write_bytes(index)
    path.write_bytes(np.concatenate(documents).astype(dtype).tobytes())


def options(folder: Path, **changes: object) -> ImportOptions:
    defaults = {"tokenizer": str(LLAMA_MODEL), "append_eos": True, "prepend_bos": False}
    return ImportOptions(directory=str(folder), **(defaults | changes))


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
@pytest.mark.parametrize("kind", ["litpkds", "megatron", "raw"])
def test_the_tokens_are_read_where_they_lie(tmp_path: Path, kind: str, dtype: str) -> None:
    for n, ids in enumerate(PARTS):
        path = tmp_path / f"train_{n}.bin"
        if kind == "litpkds":
            litpkds(path, ids, dtype)
        elif kind == "megatron":
            megatron(path, [ids[:400], ids[400:]] if len(ids) > 400 else [ids], dtype)
        else:
            path.write_bytes(ids.astype(dtype).tobytes())
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
    run(options(tmp_path, dtype={"<u2": "uint16", "<i4": "int32"}[dtype]))
    run(options(tmp_path, dtype={"<u2": "uint16", "<i4": "int32"}[dtype]))  # again is no error
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in before} == before
    expected = np.concatenate(PARTS)
    dataset = TokenDataset(tmp_path)
    np.testing.assert_array_equal(dataset.sequences([0], len(expected) - 1)[0], expected)
    np.testing.assert_array_equal(dataset.sequences([1], 800)[0], expected[800:1601])
    assert dataset.manifest.documents == np.count_nonzero(expected == 2) >= 3
    assert (dataset.manifest.name, dataset.manifest.tokenizer.vocab_size) == (f"import {kind}", 32000)
    assert main(["verify", str(tmp_path)]) == 0
    assert main(["inspect", str(tmp_path), "--sequence", "3", "--seq_len", "300"]) == 0


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("append_eos", [False, True])
def test_documents_are_told_by_their_ends_or_their_beginnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, append_eos: bool, prepend_bos: bool
) -> None:
    """By EOS where it is put, else by BOS; without either a file is one document. The last may have been cut by its packer."""
    monkeypatch.setattr(documents, "_BLOCK", 16)
    lengths, expected = ([3, 1, 40, 16, 7], [1, 1, 100]), []
    for n, ours in enumerate(lengths):
        parts = []
        for document, length in enumerate(ours):
            cut = n == 1 and document == len(ours) - 1
            ids = [1] * prepend_bos + RNG.integers(3, 32000, length).tolist() + [2] * (append_eos and not cut)
            parts.append(ids)
            number, place = (document, 0) if append_eos or prepend_bos else (0, sum(map(len, parts[:-1])))
            expected += [(f"{n}.bin", number, place + k) for k in range(len(ids))]
        litpkds(tmp_path / f"{n}.bin", np.array([token for ids in parts for token in ids]))
    manifest = run(options(tmp_path, append_eos=append_eos, prepend_bos=prepend_bos))
    counted = {(True, True): [5, 2], (True, False): [5, 2], (False, True): [5, 3], (False, False): [0, 0]}
    assert [shard.documents for shard in manifest.shards] == counted[append_eos, prepend_bos]
    dataset = TokenDataset(tmp_path)
    for length in (5, 33, len(expected)):
        found = []
        for start in range(0, len(expected), length):
            for part in dataset.documents(start, min(length, len(expected) - start)):
                found += [(part.source_file, part.document, part.first + k) for k in range(part.tokens)]
                assert part.line is None
                of_it = [place for file, number, place in expected if (file, number) == found[-1][:2]]
                assert part.document_tokens == len(of_it)
        assert found == expected


def test_a_token_that_begins_documents_and_ends_them_is_two_of_each(tmp_path: Path) -> None:
    """As GPT-2's; the last document may have been cut by its packer."""
    tokenizer = write_dataset(tmp_path / "another", 100, 0) / "tokenizer"
    (tokenizer / "tokenizer_config.json").write_text('{"bos_token": "2", "eos_token": "2"}')
    told = {"tokenizer": str(tokenizer), "append_eos": True, "prepend_bos": True}
    litpkds(tmp_path / "0.bin", np.array([2, 7, 8, 2, 2, 9, 2]))
    litpkds(tmp_path / "1.bin", np.array([2, 7, 2, 2, 9, 9]))
    manifest = run(options(tmp_path, **told))
    assert [shard.documents for shard in manifest.shards] == [2, 1]
    found = [
        (part.source_file, part.document, part.document_tokens) for part in TokenDataset(tmp_path).documents(0, 13)
    ]
    assert found == [("0.bin", 0, 4), ("0.bin", 1, 3), ("1.bin", 0, 3), ("1.bin", 1, 3)]


def test_ids_beyond_the_vocabulary_are_found_in_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_BLOCK_BYTES", 64)
    for place in (0, 500, 999):
        for wrong, message in ((32000, "ids from 2 to 32000"), (-1, "ids from -1 to 3")):
            ids = PARTS[0].copy()
            ids[place], ids[(place + 100) % 1000] = wrong, 2
            litpkds(tmp_path / "a.bin", ids, "<i4")
            with pytest.raises(ValueError, match=message):
                run(options(tmp_path))
    litpkds(tmp_path / "a.bin", PARTS[0], "<i4")
    assert run(options(tmp_path)).documents == np.count_nonzero(PARTS[0] == 2)


def spoil(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (7, b"\2", "is of version 2; only 1 is known"),
        (15, b"\5", "type code 5; only 8"),
        (16, b"\xff\xff", "header says 65,535 tokens, which need 131,094"),
        (24, b"\xff\xff", "ids from 2 to 65535, the tokenizer 32000 pieces"),
    ],
)
def test_a_contradiction_is_refused(tmp_path: Path, at: int, data: bytes, message: str) -> None:
    litpkds(tmp_path / "a.bin", PARTS[0])
    spoil(tmp_path / "a.bin", at, data)
    with pytest.raises(ValueError, match=message):
        run(options(tmp_path))
    assert not (tmp_path / "manifest.json").exists()


def test_megatron_files_that_do_not_belong_together(tmp_path: Path) -> None:
    megatron(tmp_path / "a.bin", PARTS)
    good = (tmp_path / "a.idx").read_bytes()
    for change, message in [
        (good[:-9], "too short for 3 sequences and 4 documents"),
        (b"x" + good[1:], "not an index of Megatron's"),
        (good[:38] + b"\7" + good[39:], "do not lie one behind the other"),
    ]:
        (tmp_path / "a.idx").write_bytes(change)
        with pytest.raises(ValueError, match=message):
            run(options(tmp_path))
    (tmp_path / "a.idx").write_bytes(good)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="they don't belong together"):
        run(options(tmp_path))


def test_files_that_do_not_lie_in_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a.bin").write_bytes(b"\3\0" * 10)
    for pattern, message in (
        (f"{tmp_path}/*.bin", r"/\*\.bin' is absolute: files lie in .*in, give"),
        ("../*.bin", "leads out"),
    ):
        with pytest.raises(ValueError, match=message):
            run(options(tmp_path / "in", pattern=pattern, append_eos=False))
    assert not list((tmp_path / "in").iterdir())


def test_files_that_have_changed_are_imported_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for n, ids in enumerate(PARTS):
        litpkds(tmp_path / f"{n}.bin", ids)
    run(options(tmp_path))
    spoil(tmp_path / "0.bin", 24, b"\7")
    assert main(["verify", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.endswith("these files were imported: restore them from where they came from, then import again\n"), said
    assert "delete" not in said
    (tmp_path / "0.bin").unlink()
    litpkds(tmp_path / "2.bin", PARTS[2][:500])
    manifest = run(options(tmp_path))
    assert [shard.tokens for shard in manifest.shards] == [1, 500]
    assert main(["verify", str(tmp_path)]) == 0


def test_files_without_a_token_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    with pytest.raises(ValueError, match=r"there is not one token in the 1 files of .* that match \*\.bin"):
        run(options(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_dataset_of_ours_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\3\0" * 10)
    manifest = run(options(tmp_path, append_eos=False))
    Manifest("slimpajama", "train", manifest.tokenizer, False, False, manifest.shards).save(tmp_path)
    with pytest.raises(ValueError, match="is a dataset of data-prep already"):
        run(options(tmp_path))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "a.bin").write_bytes(b"\3\0\1")
    with pytest.raises(ValueError, match="no whole tokens of 2 bytes"):
        run(options(tmp_path))
