"""What the largest documents take: less than a gigabyte, whatever the tokenizer."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from test_sources import line, write_jsonl, write_parquet
from test_tokenizer import LLAMA_MODEL

from data_prep.encoder import WHOLE_BYTES, WHOLE_CHARACTERS, Encoder, Uncuttable
from data_prep.shard import Manifest
from data_prep.tokenizer import load

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
