"""How many bytes of text the tokens of a dataset stand for: what a loss a byte, which all tokenizers share, is made from.

    tokenizer.json ─> of: each token's bytes, and those of the space before each text ─> Lengths.count(tokens) ─> bytes

The standard library and numpy, nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

_SPACE = "▁"
"""What stands for a space in SentencePiece's kind of vocabulary (U+2581)."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Lengths:
    """What a tokenizer's tokens stand for, in UTF-8, as the tokenizer has normalized it."""

    bytes_of: np.ndarray
    """Bytes of each token, (V,) int64; 0 for marks such as BOS and EOS."""
    prefix: int
    """Bytes that tokens have before each text and that are not in it: the space that many tokenizers put there."""

    def count(self, tokens: np.ndarray, begins_after: int | None) -> int:
        """Bytes of text of `tokens[1:]`, (n,) integers; `begins_after`: the mark before each document's text, None: no mark."""
        of_tokens = self.bytes_of[tokens]
        begins = (
            np.count_nonzero((tokens[:-1] == begins_after) & (of_tokens[1:] > 0)) if begins_after is not None else 0
        )
        return int(of_tokens[1:].sum()) - self.prefix * int(begins)


@lru_cache(maxsize=4)
def of(tokenizer_json: Path, vocab_size: int) -> Lengths | None:
    """The lengths of a tokenizer of SentencePiece's kind or of byte-level BPE, of at least `vocab_size` ids.

    None for another kind, or one that cannot be read.
    """
    try:
        raw = json.loads(tokenizer_json.read_bytes())
        model, decoders = raw["model"], {part["type"] for part in _parts(raw.get("decoder"))}
        words: dict[str, int] = {word: i for i, word in _words(model)}
        if "ByteLevel" in decoders:
            found = {i: len(word) for word, i in words.items()}  # each character stands for a byte
        elif decoders & {"Metaspace", "ByteFallback"}:
            fallback = model.get("byte_fallback", False)
            found = {i: 1 if fallback and _BYTE.fullmatch(word) else _bytes(word) for word, i in words.items()}
        else:
            return None
        plain = (lambda text: len(text.encode())) if "ByteLevel" in decoders else _bytes
        for added in raw.get("added_tokens") or []:
            found[added["id"]] = 0 if added["special"] else plain(added["content"])
        bytes_of = np.zeros(max(vocab_size, 1 + max(found, default=0)), dtype=np.int64)
        bytes_of[list(found)] = list(found.values())
        return Lengths(bytes_of, int(_puts_a_space_before(raw)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _words(model: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(id, word) of a vocabulary; Unigram's is a list of words and scores."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        yield from ((i, word) for word, i in vocab.items())
    else:
        yield from ((i, word) for i, (word, _) in enumerate(vocab))


def _bytes(word: str) -> int:
    return len(word.replace(_SPACE, " ").encode())


def _puts_a_space_before(raw: dict[str, Any]) -> bool:
    for part in _parts(raw.get("normalizer")):
        if part["type"] == "Prepend" or (part["type"] == "Replace" and r"\A" in str(part["pattern"])):
            return True
    for part in _parts(raw.get("pre_tokenizer")):
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return True
        if part["type"] == "ByteLevel" and part.get("add_prefix_space", True):
            return True
    return False


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, and those that it is a sequence of."""
    if part is None:
        return
    yield part
    for name in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(name) or []:
            yield from _parts(inner)
