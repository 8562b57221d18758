"""A sequence of a dataset as text, with the documents that it comes from. The command `data-prep inspect`.

sequence i --> tokens [i*T, i*T + T] --> shard and place --> documents/UNIT.npy: rows and lengths --> file and line
--> without it (imported data): EOS, counted
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data_prep.shard import TOKENIZER_DIR, TokenDataset, check_tokenizer
from data_prep.tokenizer import load


@dataclass(frozen=True)
class InspectOptions:
    """Show a sequence as text, with file and line of each document in it."""

    sequence: int
    """Number of the sequence, from 0, as the order of the data and its reports give it."""
    directory: str = field(metadata={"positional": True, "help": "Folder of the dataset"})
    seq_len: int = 2048
    """Tokens a sequence."""


def run(options: InspectOptions) -> None:
    """Print the sequence. Raises as TokenDataset.sequences does, ValueError for an index out of range and another tokenizer."""
    dataset = TokenDataset(options.directory)
    check_tokenizer(options.directory, dataset.manifest.tokenizer)
    try:
        ids = dataset.sequences([options.sequence], options.seq_len)[0]
    except IndexError as error:
        raise ValueError(str(error)) from None
    tokenizer = load(Path(options.directory) / TOKENIZER_DIR)
    start = options.sequence * options.seq_len
    print(f"sequence {options.sequence:,} of {options.directory}: tokens {start:,} to {start + options.seq_len:,}")
    at = 0
    for part in dataset.documents(start, len(ids)):
        where = f"line {part.line:,}" if part.line is not None else f"document {part.document + 1:,}"
        print(
            f"\n--- {part.source_file} {where}, tokens {part.first:,} to {part.first + part.tokens - 1:,} "
            f"of its {part.document_tokens:,} ---"
        )
        print(tokenizer.decode(ids[at : at + part.tokens]))
        at += part.tokens
    assert at == len(ids)
