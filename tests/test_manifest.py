"""Manifests: a fingerprint names the tokens, what is damaged or leads out is named, and opening one costs little."""

import copy
import json
import os
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from test_shard import DIGEST, TOKENIZER, change, make_dataset, parts, read_all  # noqa: F401  parts: a fixture

from data_prep.shard import Manifest, Shard, SubsetTotals, TokenDataset, TokenizerInfo


def test_a_fingerprint_names_the_token_stream(tmp_path: Path, parts: list[np.ndarray]) -> None:  # noqa: F811
    first = make_dataset(tmp_path / "a", parts)
    assert make_dataset(tmp_path / "elsewhere", parts).fingerprint == first.fingerprint
    others = [
        make_dataset(tmp_path / "b", parts[::-1]),
        make_dataset(tmp_path / "c", [*parts[:-1], parts[-1] + 1]),
        Manifest("slimpajama", "train", TOKENIZER, False, False, first.shards),
        Manifest("slimpajama", "train", TOKENIZER, True, True, first.shards),
        Manifest("slimpajama", "train", TokenizerInfo("sha256:" + "1" * 64, TOKENIZER.kind, 32000, 1, 2), True, False,
                 first.shards),
    ]  # fmt: skip
    assert len({first.fingerprint, *(m.fingerprint for m in others)}) == 1 + len(others)


def test_truncation_is_noticed_before_and_while_reading(tmp_path: Path, parts: list[np.ndarray]) -> None:  # noqa: F811
    manifest = make_dataset(tmp_path, parts)
    dataset = TokenDataset(tmp_path)
    victim = tmp_path / manifest.shards[5].path
    os.truncate(victim, 5000)
    with pytest.raises(OSError, match=r"00005\.npy was cut short"):
        read_all(dataset, 16)
    with pytest.raises(ValueError, match=r"00005\.npy has 5,000 bytes, its 2,500 tokens need 5,128"):
        TokenDataset(tmp_path)
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=r"00005\.npy"):
        TokenDataset(tmp_path)


def test_names_that_lead_out_are_refused(tmp_path: Path, parts: list[np.ndarray]) -> None:  # noqa: F811
    root = tmp_path / "data"
    make_dataset(root, parts)
    raw = json.loads((root / "manifest.json").read_text())
    for path in ("/etc/passwd", "../out.npy", "shards/../../out.npy", "", "a\0b"):
        broken = copy.deepcopy(raw["shards"])
        broken[0]["path"] = path
        change(root, shards=broken)
        with pytest.raises(ValueError, match="leads out of the dataset"):
            Manifest.load(root)
    change(root, shards=raw["shards"])
    assert Manifest.load(root)
    (root / "shards/00000.npy").rename(tmp_path / "out.npy")
    (root / "shards/00000.npy").symlink_to(tmp_path / "out.npy")
    with pytest.raises(ValueError, match="not a regular file"):
        Manifest.load(root)
    (root / "shards").rename(tmp_path / "outside")
    (root / "shards").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="leads out of the dataset"):
        Manifest.load(root)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version 2, this code reads version 1"),
        ({"format": "other"}, "not a dataset of ours"),
        ({"append_eos": False}, "fingerprint"),
        ({"totals": {"documents": 1, "tokens": 1, "dropped": {}}}, "not the sums over its shards"),
        ({"surprise": 1}, "surprise"),
        ({"tokenizer": None}, "not a manifest that this version can read"),
        ({"tokenizer": vars(TOKENIZER) | {"eos_id": 32000}}, "eos_id 32000 is not an id"),
        ({"shards": []}, "not the sums over its shards"),
        ({"subsets": {"Book": {"documents": 8, "tokens": 1, "dropped": {}}}}, "subsets have 1 tokens"),
        ({"subsets": {"Book": {"documents": 8, "tokens": 1, "dropped": []}}}, "mapping"),
        ({"tokenizer": vars(TOKENIZER) | {"kind": 3}}, "kind 3 is neither sentencepiece nor huggingface"),
        ({"name": 3}, "name is 3, not of type str"),
        ({"split": None}, "split is None, not of type str"),
        ({"prepend_bos": "no"}, "prepend_bos is 'no', not of type bool"),
        ({"settings": [["holdout", 0.1]]}, r"settings is \[\['holdout', 0\.1\]\], not of type dict"),
        ({"settings": None}, "settings is None, not of type dict"),
    ],
)
def test_a_damaged_manifest_is_one_clear_error(
    tmp_path: Path,
    parts: list[np.ndarray],  # noqa: F811
    fields: dict[str, object],
    message: str,
) -> None:
    make_dataset(tmp_path, parts)
    change(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.load(tmp_path)
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["source_file", "dropped"])
@pytest.mark.parametrize("value", [None, 3, ["a"], []])
def test_a_damaged_shard_of_a_manifest_is_one_clear_error(tmp_path: Path, field: str, value: object) -> None:
    make_dataset(tmp_path, [np.arange(9)])
    (shard,) = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    change(tmp_path, shards=[shard | {field: value}])
    with pytest.raises(
        ValueError, match=rf"manifest\.json: shard shards/00000\.npy: .*{field} {re.escape(repr(value))} "
    ):
        Manifest.load(tmp_path)


def test_no_manifest_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="prepare it with data-prep"):
        TokenDataset(tmp_path)
    for content in ('{"format": "cria', "[" * 100_000, '{"a":' * 100_000):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=r"manifest\.json is not JSON \(.*\): the file is damaged"):
            TokenDataset(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json is not an object of JSON but list: the file is damaged"):
        TokenDataset(tmp_path)


def test_subsets_and_settings_survive(tmp_path: Path) -> None:
    shard = Shard("a.npy", "uint16", 128, 0, DIGEST, "a", 3, {"code": 2, "empty": 1})
    subsets = {"Github": SubsetTotals(0, 0, {"code": 2}), "Book": SubsetTotals(3, 0, {"empty": 1})}
    manifest = Manifest("slimpajama", "train", TOKENIZER, True, False, (shard,), subsets, {"holdout": 0.01})
    (tmp_path / "a.npy").write_bytes(b"\0" * 128)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    with pytest.raises(ValueError, match="disagree on the dropped"):
        Manifest("slimpajama", "train", TOKENIZER, True, False, (shard,), {"Book": SubsetTotals(3, 0, {"code": 3})})


def calls_to_open(root: Path, count: int) -> Counter[str]:
    """Every function called, by name, while a dataset of `count` shards is opened."""
    (root / "chunk1").mkdir(parents=True)
    names = [f"chunk1/example_train_{n}.jsonl.zst.npy" for n in range(count)]
    shards = tuple(Shard(name, "uint16", 128, 5, DIGEST, name[:-4], 5000, {"code": 99}) for name in names)
    (root / names[0]).write_bytes(bytes(128 + 10))
    for name in names[1:]:
        os.link(root / names[0], root / name)
    Manifest("slimpajama", "train", TOKENIZER, True, False, shards).save(root)
    calls: list[str] = []  # append is one step, whichever thread

    def follow(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call":
            calls.append(function.__name__)
        elif event == "call":
            calls.append(frame.f_code.co_qualname)

    threading.setprofile(follow)  # for the threads to come
    sys.setprofile(follow)
    try:
        dataset = TokenDataset(root)
        dataset.signature(of_these_files=True)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert dataset.num_tokens == 5 * count
    return Counter(calls)


def test_opening_a_manifest_costs_one_look_a_shard_and_opens_none(tmp_path: Path) -> None:
    """What it takes in seconds with 60,000 shards is in benchmarks/results/data_prep_scale.json."""
    one, two = calls_to_open(tmp_path / "one", 1000), calls_to_open(tmp_path / "two", 2000)
    assert two["lstat"] - one["lstat"] == 1000
    assert one["open"] == two["open"] == 1, "the manifest"
    assert [one[name] for name in ("stat", "listdir", "scandir")] == [
        two[name] for name in ("stat", "listdir", "scandir")
    ]
    assert two.total() < 2.05 * one.total()
