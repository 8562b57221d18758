"""Train a tokenizer of Llama's kind: SentencePiece BPE with byte fallback.

    files and folders --> documents, a bounded sample spread over the files --> lines --> SentencePiece --> OUT/

OUT becomes a complete Hugging Face tokenizer folder with the tokenizer.model in it. The same input gives the same model.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece

from data_prep.readers import Bad, read_jsonl, read_parquet
from data_prep.shard import write_atomically
from data_prep.tokenizer import MODEL_NAME, load

_MAX_FILES_AN_INPUT = 256
_MAX_LINE_BYTES = 4192


@dataclass(frozen=True)
class TokenizerOptions:
    """Train a SentencePiece BPE tokenizer with byte fallback, Llama's kind, over a sample of documents."""

    input: list[str] = field(
        metadata={
            "nargs": "+",
            "help": "Files or folders with them: *.jsonl.zst, of which the key text is read, and *.parquet, of which the column "
            "content is; each gives the same number of bytes, if it has them",
        }
    )
    out: str
    """Folder for tokenizer.model, tokenizer.json and tokenizer_config.json."""
    vocab_size: int = 32000
    """Number of pieces, the 256 bytes and 3 control tokens among them."""
    max_mb: float = 200.0
    """Text to train on at most, in megabytes over all inputs."""


def run(options: TokenizerOptions) -> None:
    """Train, write and reload the tokenizer. Raises ValueError for too large a vocabulary, or one below 300."""
    if options.vocab_size < 300:
        raise ValueError(f"vocab_size {options.vocab_size} is below 300: 256 bytes and 3 control tokens must fit in")
    if options.max_mb <= 0:
        raise ValueError(f"max_mb {options.max_mb} is not above 0 megabytes; the default is 200")
    budget = int(options.max_mb * 1e6 / len(options.input))
    groups = [_files(Path(path)) for path in options.input]
    lines = (line for files in groups for text in sample(files, budget) for line in text.split("\n"))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / MODEL_NAME, train(lines, options.vocab_size))
    tokenizer = load(out / MODEL_NAME)
    tokenizer.save(out, prepend_bos=False)
    print(f"{out}: {tokenizer.info.vocab_size:,} pieces, {tokenizer.info.fingerprint}")


def train(lines: Iterator[str], vocab_size: int) -> bytes:
    """The bytes of a tokenizer.model trained on `lines`, which have no line breaks: as in Llama's, these stay bytes.

    Settings as in Llama's model: text taken as it is, each digit a piece, runs of spaces may be pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.99995,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=_MAX_LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece can't make {vocab_size:,} pieces of this text: {str(error).strip()}. "
            "Give it more text or a smaller --vocab_size"
        ) from None
    return model.getvalue()


def sample(files: list[Path], budget: int) -> Iterator[str]:
    """Documents from the start of each file, about `budget` bytes in all; what a short file leaves goes to the next."""
    for n, file in enumerate(files):
        share = budget // (len(files) - n)
        for text in _texts(file):
            if share <= 0:
                break
            yield text
            size = len(text.encode())
            share, budget = share - size, budget - size


def _files(path: Path) -> list[Path]:
    """The data files at `path`, at most _MAX_FILES_AN_INPUT, spread evenly over all of them in sorted order."""
    found = [path] if path.is_file() else sorted([*path.rglob("*.jsonl.zst"), *path.rglob("*.parquet")], key=os.fspath)
    if not found:
        raise FileNotFoundError(f"{path} is no *.jsonl.zst or *.parquet file, nor a folder with one")
    count = min(len(found), _MAX_FILES_AN_INPUT)
    return [found[n * len(found) // count] for n in range(count)]


def _texts(file: Path) -> Iterator[str]:
    """The documents of a file that are text; a tokenizer is none the worse for those that are not. Raises ValueError."""
    if file.suffix == ".parquet":
        records = read_parquet(file, "content")
    else:
        records = ((row, value.get("text") if isinstance(value, dict) else value) for row, value in read_jsonl(file))
    for row, text in records:
        if isinstance(text, Bad):
            raise ValueError(f"{file} line {row + 1}: {text.reason}: {text.detail}")
        if isinstance(text, str) and text:
            yield text
