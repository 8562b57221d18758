"""Preparing: the tokens of a plain loop, every document accounted for, the same bytes however often it was stopped."""

import filecmp
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from test_sources import line, write_jsonl, write_parquet
from test_tokenizer import LLAMA_MODEL

from data_prep import encoder, workers
from data_prep.__main__ import COMMANDS, main
from data_prep.encoder import Encoder
from data_prep.prepare import SlimPajamaOptions, StarCoderOptions, run
from data_prep.scan import cores
from data_prep.shard import Manifest, TokenDataset
from data_prep.staging import staged_path
from data_prep.tokenizer import load

BOS, EOS = 1, 2
UNITS = 6


def text_of(unit: int, document: int) -> str:
    return f"  Document {document} of file {unit}:\n\tnaïve </s> text, {unit**document}\n" * (1 + document % 3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SlimPajama's layout: six files of 50 documents, every fifth one code, one file with nothing to keep."""
    root = tmp_path_factory.mktemp("slimpajama")
    for unit in range(UNITS):
        subsets = ["RedPajamaGithub" if n % 5 == 0 or unit == 3 else f"RedPajama{'BC'[n % 2]}" for n in range(50)]
        lines = (line(text_of(unit, n), subset) for n, subset in enumerate(subsets))
        write_jsonl(root / "train" / f"chunk{1 + unit % 2}" / f"example_train_{unit}.jsonl.zst", *lines)
    write_jsonl(root / "validation/chunk1/example_holdout_0.jsonl.zst", line("one document"))
    return root


def options(corpus: Path, out: Path, **changes: object) -> SlimPajamaOptions:
    defaults = {"split": "train", "tokenizer": str(LLAMA_MODEL), "workers": 1}
    return SlimPajamaOptions(input=str(corpus), out=str(out), **(defaults | changes))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset as one worker makes it in one go."""
    out = tmp_path_factory.mktemp("prepared") / "train"
    run(options(corpus, out))
    return out


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def assert_same_bytes(got: Path, expected: Path, but: str = " ") -> None:
    """Of files whose names begin with `but` there must only be the same ones."""
    assert tree(got) == tree(expected)
    assert len(tree(got)) > 2 * UNITS
    names = [name for name in tree(got) if not name.startswith(but)]
    assert len(names) > UNITS
    assert filecmp.cmpfiles(got, expected, names, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("append_eos", [False, True])
def test_tokens_are_those_of_a_plain_loop(corpus: Path, tmp_path: Path, prepend_bos: bool, append_eos: bool) -> None:
    run(options(corpus, tmp_path / "out", prepend_bos=prepend_bos, append_eos=append_eos))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA_MODEL))
    expected: list[int] = []
    for unit in (0, 2, 4, 1, 3, 5):  # chunk1 before chunk2
        for n in range(50):
            if n % 5 and unit != 3:
                expected += [BOS] * prepend_bos + processor.encode(text_of(unit, n)) + [EOS] * append_eos
    dataset = TokenDataset(tmp_path / "out")
    np.testing.assert_array_equal(dataset.sequences([0], len(expected) - 1)[0], expected)
    manifest = dataset.manifest
    assert manifest.documents == 200
    assert (expected.count(EOS), expected.count(BOS)) == (200 * append_eos, 200 * prepend_bos)
    assert (manifest.append_eos, manifest.prepend_bos) == (append_eos, prepend_bos)
    assert manifest.tokenizer == load(LLAMA_MODEL).info == load(tmp_path / "out/tokenizer").info


def test_documents_that_are_encoded_in_pieces_keep_their_place_and_their_controls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between documents that are gathered into batches, which must not come behind them."""
    monkeypatch.setattr(encoder, "LONG_CHARACTERS", 100)
    cut, encode_long = [], Encoder.encode_long
    monkeypatch.setattr(Encoder, "encode_long", lambda self, text: cut.append(text) or encode_long(self, text))
    texts = ["one", "two", "a long text, " * 30, "three", "another long one. " * 40, "and more of it. " * 50, "four"]
    write_jsonl(tmp_path / "in/train/chunk1/a.jsonl.zst", *map(line, texts))
    run(options(tmp_path / "in", tmp_path / "out", prepend_bos=True, append_eos=True, check_every=0))
    assert cut == [text for text in texts if len(text) > 100]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA_MODEL))
    expected = [token for text in texts for token in (BOS, *processor.encode(text), EOS)]
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.sequences([0], dataset.num_tokens - 1)[0].tolist() == expected
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_every_document_is_accounted_for(undisturbed: Path) -> None:
    manifest = Manifest.load(undisturbed)
    assert manifest.documents + sum(manifest.dropped.values()) == UNITS * 50
    assert manifest.dropped == {"excluded subset": 100}
    assert manifest.subsets["RedPajamaGithub"].documents == 0
    assert manifest.subsets["RedPajamaGithub"].dropped == {"excluded subset": 100}
    assert manifest.subsets["RedPajamaB"].documents + manifest.subsets["RedPajamaC"].documents == 200
    assert len(manifest.shards) == UNITS
    (empty,) = (shard for shard in manifest.shards if "example_train_3" in shard.source_file)
    assert (empty.tokens, empty.documents, empty.dropped) == (0, 0, {"excluded subset": 50})


def test_workers_make_no_difference(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    before = dict(os.environ)
    run(options(corpus, tmp_path / "out", workers=3))
    assert_same_bytes(tmp_path / "out", undisturbed)
    assert os.environ == before, "what is set for the workers is theirs alone"


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([0] * 40, 40),  # a dataset of the Hub, whose files' sizes nobody knows
        ([100_000] * 40, 14),  # a small corpus
        ([1 << 30, *[1000] * 128], 3),  # one large file and many small ones
        ([1 << 20] * 6400, 400),  # a large corpus
    ],
)
def test_there_are_groups_enough_for_all_workers(sizes: list[int], groups: int) -> None:
    """Several for each of 4 workers, where the files allow it; and no more of a large corpus than there need be."""
    inputs = {str(n): size for n, size in enumerate(sizes[1:] + sizes[:1])}
    found = list(workers._groups(inputs, 4))
    assert len(found) == groups
    assert [inputs[unit] for group in found for unit in group] == sorted(sizes, reverse=True), (
        "the largest is not begun first"
    )
    assert sorted(unit for group in found for unit in group) == sorted(inputs)


def test_a_system_that_tells_neither_cores_nor_memory(
    corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What macOS has not got of Linux."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(encoder, "Path", lambda name: Path(name.replace("/proc", "/no-proc")))
    assert (cores(), encoder._resident_bytes()) == (os.cpu_count(), 0)
    run(options(corpus, tmp_path / "out", workers=0))
    assert_same_bytes(tmp_path / "out", undisturbed)


SERVER = """
import os
from multiprocessing import forkserver, get_context
from data_prep import workers
if __name__ == "__main__":
    workers.start_server()
    process = get_context("forkserver").Process(target=os.getpid)
    process.start()  # when the server has imported everything
    process.join()
    print(len(os.listdir(f"/proc/{forkserver._forkserver._forkserver_pid}/task")))
"""


def test_what_workers_are_forked_from_has_one_thread(tmp_path: Path) -> None:
    """A fork copies the locks that other threads hold, and no thread that would release them."""
    (tmp_path / "server.py").write_text(SERVER)
    command = [sys.executable, str(tmp_path / "server.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.stdout == "1\n", done.stdout + done.stderr


def test_a_rerun_does_what_is_unfinished_and_nothing_else(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    shards = [out / shard.path for shard in Manifest.load(out).shards]
    records = [out / "units" / f"{shard.source_file}.json" for shard in Manifest.load(out).shards]
    records[0].unlink()  # killed between shard and record
    shards[1].unlink()
    os.truncate(shards[2], 200)  # torn by a power failure
    records[3].write_text('{"source_by')
    staged_path(shards[0]).write_bytes(b"half a shard")
    (out / "manifest.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in shards[4:]}
    run(options(corpus, out))
    assert_same_bytes(out, undisturbed)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    run(options(corpus, out))  # and once more with nothing to do
    assert_same_bytes(out, undisturbed)


def test_a_changed_input_file_is_done_again(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(corpus, tmp_path / "corpus")
    out = shutil.copytree(undisturbed, tmp_path / "out")
    write_jsonl(corpus / "train/chunk1/example_train_0.jsonl.zst", line("longer than it was"), frames=1)
    run(options(corpus, out))
    run(options(corpus, tmp_path / "fresh"))
    assert_same_bytes(out, tmp_path / "fresh")


def test_killed_and_run_again_it_is_the_same(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_prep", "slimpajama", "--input", corpus, "--split", "train"]
    command += ["--tokenizer", LLAMA_MODEL, "--out", out, "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(out.rglob("units/**/*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)  # ends only when the workers have closed the pipe too: none is left behind
    killed_midway = not (out / "manifest.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert_same_bytes(out, undisturbed)
    assert killed_midway or "0 of 6 input files" in done.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_unit_fails_the_command_and_keeps_the_others(
    corpus: Path, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    broken = shutil.copytree(corpus, tmp_path / "corpus")
    victim = broken / "train/chunk2/example_train_1.jsonl.zst"
    good = victim.read_bytes()
    victim.write_bytes(good[:-40])
    with pytest.raises(ValueError, match=r"1 of \d+ documents are bad .* at most 0\.0100% may be"):
        run(options(broken, tmp_path / "out", workers=workers))
    assert not (tmp_path / "out/manifest.json").exists()
    assert len(list((tmp_path / "out").rglob("units/**/*.json"))) >= 3
    victim.write_bytes(good)
    run(options(broken, tmp_path / "out", workers=workers))
    assert_same_bytes(tmp_path / "out", undisturbed)


def test_other_settings_are_refused_and_change_nothing(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    model = tmp_path / "other.model"
    model.write_bytes(LLAMA_MODEL.read_bytes() + b"\x52\x02hi")  # an unknown field: the same pieces, another file
    for changes, message in [
        ({"append_eos": False}, "append_eos was True, now False"),
        ({"tokenizer": str(model)}, "tokenizer fingerprint was 'sha256"),
        ({"split": "validation"}, "split was 'train', now 'validation'"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(options(corpus, out, **changes))
    assert_same_bytes(out, undisturbed)
    with pytest.raises(ValueError, match="is not empty and was not begun by data-prep"):
        run(options(corpus, corpus))


def test_starcoder_splits_hold_everything_once(tmp_path: Path) -> None:
    texts = [f"def f_{n}():\n    return {n}\n" for n in range(400)]
    write_parquet(tmp_path / "in/python/train-00000-of-00002.parquet", texts[:200])
    write_parquet(tmp_path / "in/go/train-00000-of-00001.parquet", texts[200:])
    seen: list[str] = []
    tokenizer = load(LLAMA_MODEL)
    for split in ("train", "validation"):
        out = tmp_path / split
        settings = {"input": str(tmp_path / "in"), "tokenizer": str(LLAMA_MODEL), "workers": 1, "holdout": 0.2}
        manifest = run(StarCoderOptions(split=split, out=str(out), **settings))
        assert manifest.settings == {"holdout": 0.2}
        assert set(manifest.subsets) == {"python", "go"}
        tokens = TokenDataset(out).sequences([0], manifest.tokens - 1)[0]
        documents = [tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == EOS) + 1)]
        assert documents.pop() == ""
        assert len(documents) == manifest.documents
        seen += documents
    assert sorted(seen) == sorted(texts)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_prepares_and_ends_with_a_table(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--input", str(corpus), "--split", "validation", "--tokenizer", str(LLAMA_MODEL)]
    assert main(["slimpajama", *arguments, "--out", str(tmp_path / "out"), "--append_eos", "false"]) == 0
    output = capsys.readouterr().out
    assert "RedPajamaC4" in output
    assert "1 of 1 input files" in output
    assert Manifest.load(tmp_path / "out").append_eos is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "there is no command 'prepare'; there are demo, tokenizer, slimpajama, starcoder, text"),
        (["slimpajama"], "required: tokenizer, out, input, split"),
        (["slimpajama", "--input", "{corpus}", "--split", "test", "--tokenizer", "x", "--out", "{out}"], '"split"'),
        (
            ["slimpajama", "--input", "{out}", "--split", "train", "--tokenizer", "x", "--out", "{out}"],
            "is not a folder",
        ),
        (
            ["slimpajama", "--input", "{corpus}", "--split", "train", "--tokenizer", "x", "--out", "{out}"],
            "no tokenizer",
        ),
        (
            ["starcoder", "--input", "{corpus}", "--split", "train", "--tokenizer", "{llama}", "--out", "{out}"],
            "no *.parquet",
        ),
        (["slimpajama", "--input", "{corpus}", "--frobnicate", "1"], "frobnicate"),
        (["tokenizer", "--input", "{corpus}", "--vocab_size", "10", "--out", "{out}"], "vocab_size 10 is below 300"),
        (["demo", "--out", "{out}", "--scale", "2"], "scale 2.0 is not in (0, 1]"),
    ],
)
def test_bad_input_is_one_clear_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    places = {"corpus": corpus, "out": tmp_path / "out", "llama": LLAMA_MODEL}
    assert main([argument.format(**places) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("data-prep: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def test_help_explains_every_option(capsys: pytest.CaptureFixture) -> None:
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        options = [field.name for field in fields(getattr(import_module(command.module), command.options))]
        assert options
        for option in options:
            assert re.search(rf"(--|\b){option} (?:(?! --).){{20,}}?type: ", text), (
                f"{name} --{option} is not explained"
            )
    assert main([]) == 2
    assert main(["--help"]) == 0


def test_policy_without_the_token_is_refused_before_any_work(corpus: Path, tmp_path: Path) -> None:
    load(LLAMA_MODEL).save(tmp_path, prepend_bos=False)
    (tmp_path / "tokenizer_config.json").unlink()
    bare = str(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="append_eos is set, but the tokenizer has no EOS token"):
        run(options(corpus, tmp_path / "out", tokenizer=bare))
    assert not (tmp_path / "out").exists()
    manifest = run(options(corpus, tmp_path / "out", tokenizer=bare, append_eos=False))
    assert manifest.tokenizer == load(tmp_path / "out/tokenizer").info
    assert json.loads((tmp_path / "out/settings.json").read_text())["tokenizer"]["eos_id"] is None
