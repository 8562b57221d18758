"""The fastest exact way to token ids: gigatoken where it gives the reference's ids, else the reference itself.

    Tokenizer (SentencePiece or tokenizers: the reference)
         |  fast_encoder: does gigatoken agree on every probe? chosen once, at load, and said
         v
    Encoder.encode(texts) -> flat ids (n,) and ends (texts,), no Python object a token
    Encoder.encode_long(text) -> ids piece by piece, in bounded memory; what can't be cut nor taken whole is refused
    Encoder.check(text) -> both ways, compared            every --check_every documents, while the work goes on

gigatoken is young and SentencePiece is what others will decode with, so the latter has the last word. Where a tokenizer.json
asks for what the Unicode standard says of a character, two libraries of different age disagree about the newest ones: texts that
hold such a character go to the reference (`doubtful`).
"""

from __future__ import annotations

import ctypes
import random
import resource
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from data_prep.readers import Bad
from data_prep.tokenizer import SentencePieceTokenizer, Tokenizer
from data_prep.tokenizer_convert import SPACE

LONG_CHARACTERS = 4 << 20
"""Longer texts are encoded in pieces of at most this many characters."""
WHOLE_BYTES = 32 << 20
"""Of UTF-8: the longest text that gigatoken takes in one, for a tokenizer whose texts can't be cut."""
WHOLE_CHARACTERS = 1 << 20
"""The longest text that tokenizers takes in one: 800 bytes of memory a character, if they are emoji."""
_CHECK_CHARACTERS = 1 << 18
# Relearning words is the dearest thing here, so gigatoken keeps this much; before a large record it keeps only
# _FEW_WORDS_BYTES.
_WORDS_BYTES = 300 << 20
_FEW_WORDS_BYTES = 64 << 20
_RENEW_CHARACTERS = 8 << 20
_PROBES = 400
_LOOKED_UP = 1 << 16
"""Characters at a time."""


class Encoded(NamedTuple):
    """The ids of several texts."""

    ids: np.ndarray
    """(n,), unsigned integers; those of all texts, one behind the other."""
    ends: np.ndarray
    """(texts,) int64; where each text ends in `ids`."""


class Difference(ValueError):
    """The encoder and the reference disagree on a text. Nobody's input is wrong: nothing may be made of it."""


class Encoder:
    """Encodes with gigatoken, or with the reference when `engine` is its name. No special tokens are added or seen."""

    def __init__(self, tokenizer: Tokenizer, engine: str, model: bytes = b"") -> None:
        """`engine` is "gigatoken", or "reference" for `tokenizer` itself.

        `model` is that of another encoder for the same tokenizer, which spares the work of making it.
        """
        self.tokenizer, self.engine = tokenizer, engine
        self.model = b""
        self._characters = self._resident = 0
        self._gigatoken: Any = None
        if engine == "gigatoken":
            self.model = model or orjson.dumps(without_controls(tokenizer.raw))
            self._renew()
        can_cut = isinstance(tokenizer, SentencePieceTokenizer)
        self.long_characters = LONG_CHARACTERS if can_cut else WHOLE_CHARACTERS
        """Longer texts go through encode_long."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of the texts, without BOS and EOS."""
        if self.engine == "gigatoken":
            # One by one: encode_batch forgets its words with every call, which takes twice the time.
            parts = [
                self.tokenizer.encode_batch([text])[0].astype(np.uint32)
                if self._is_doubtful(text)
                else self._gigatoken.encode(text)
                for text in texts
            ]
            self._characters += sum(map(len, texts))
            if self._characters >= _RENEW_CHARACTERS:
                self._characters = 0
                if _resident_bytes() - self._resident > _WORDS_BYTES:
                    self._renew()
        else:
            parts = self.tokenizer.encode_batch(texts)
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return Encoded(np.concatenate(parts) if parts else np.empty(0, np.uint32), ends)

    def _is_doubtful(self, text: str) -> bool:
        if self.engine != "gigatoken" or text.isascii() or isinstance(self.tokenizer, SentencePieceTokenizer):
            return False
        table = doubtful(bool(self.tokenizer.raw.get("normalizer")))
        parts = (text[start : start + _LOOKED_UP] for start in range(0, len(text), _LOOKED_UP))
        return any(table[np.frombuffer(part.encode("utf-32-le"), np.uint32)].any() for part in parts)

    @cached_property
    def _cutter(self) -> _Cutter | None:
        """Cuts what is long; made when it is needed, which is seldom. None for a tokenizer of Hugging Face's kind."""
        return _Cutter(self.tokenizer) if isinstance(self.tokenizer, SentencePieceTokenizer) else None

    def _renew(self) -> None:
        """Load gigatoken, and with that let go of the words that it remembers: it never forgets one by itself."""
        import gigatoken

        self._gigatoken = None
        _trim()
        self._gigatoken = gigatoken.Tokenizer.from_json(self.model)
        self._characters, self._resident = 0, _resident_bytes()

    def make_room(self) -> None:
        """Let go of the words, if they are many."""
        if self.engine == "gigatoken" and _resident_bytes() - self._resident > _FEW_WORDS_BYTES:
            self._renew()

    def encode_long(self, text: str) -> Iterator[np.ndarray]:
        """The ids of one text in several arrays. Raises Uncuttable, as refuse_uncuttable does."""
        if self._cutter is None or len(text) <= LONG_CHARACTERS:
            yield self.encode([text]).ids
            return
        for piece, skip in self._cutter.pieces(text, LONG_CHARACTERS):
            yield self.encode([piece]).ids[skip:]

    def refuse_uncuttable(self, text: str) -> None:
        """Raise Uncuttable for a text that has no place to be cut in 8M characters.

        A tokenizer of Hugging Face's kind has no places that are known to be safe, so it gets a text in one. What that
        takes is many times the text: gigatoken has a limit, tokenizers a lower one.
        """
        if self._cutter is not None:
            if len(text) > LONG_CHARACTERS:
                for _ in self._cutter.pieces(text, LONG_CHARACTERS):
                    pass
        elif len(text) > WHOLE_CHARACTERS and (self.engine != "gigatoken" or self._is_doubtful(text)):
            detail = f"{len(text):,} characters; encoded by tokenizers it can be {WHOLE_CHARACTERS:,}"
            raise Uncuttable("too long", detail)
        elif (size := len(text) if len(text) > WHOLE_BYTES else len(text.encode())) > WHOLE_BYTES:
            detail = f"{size:,} bytes or more; with a tokenizer.json it can be {WHOLE_BYTES:,}"
            raise Uncuttable("too long", detail)

    def check(self, text: str) -> None:
        """Raise Difference when the reference gives other ids; of a long text the first piece is compared.

        What can't be cut is let pass: whether a document is taken must not depend on its being checked.
        """
        if self.engine != "gigatoken":
            return
        if len(text) > _CHECK_CHARACTERS:
            if self._cutter is None:
                return
            try:
                text = next(self._cutter.pieces(text, _CHECK_CHARACTERS))[0]
            except Uncuttable:
                return
        got, expected = self.encode([text]).ids, self.tokenizer.encode_batch([text])[0]
        if not np.array_equal(got, expected):
            n = min(len(got), len(expected))
            first = int(np.argmax(np.append(got[:n] != expected[:n], True)))
            raise Difference(
                f"gigatoken gives {got[first : first + 4].tolist()} at token {first:,}, {self.tokenizer.info.kind} gives "
                f"{expected[first : first + 4].tolist()}; report the document, and run the same command with --encoder "
                "reference: it does the files that gigatoken encoded again"
            )


class Uncuttable(ValueError):
    """A text that can't be cut without changing its ids, and is too long to be taken whole."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.bad = Bad(reason, detail)


def fast_encoder(tokenizer: Tokenizer) -> tuple[Encoder, str]:
    """The fastest exact encoder for `tokenizer`, and what it is and why in words."""
    reference = tokenizer.info.kind
    try:
        encoder = Encoder(tokenizer, "gigatoken")
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        words = f"{reference} itself: gigatoken can't load this vocabulary ({error})"
        return Encoder(tokenizer, "reference"), words
    probes = probe_texts(tokenizer)
    ids, ends = encoder.encode(probes)
    for text, got, expected in zip(probes, np.split(ids, ends[:-1]), tokenizer.encode_batch(probes), strict=True):
        if not np.array_equal(got, expected):
            words = f"{reference} itself: gigatoken gives other ids on the probe {text[:40]!r}"
            return Encoder(tokenizer, "reference"), words
    return encoder, f"gigatoken, which agrees with {reference} on {len(probes)} probes"


@cache
def doubtful(normalized: bool) -> np.ndarray:
    """Whether libraries of different age may disagree about a code point: a table, (0x110000,) bool.

    Those are the ones that this Python's Unicode does not know yet: they may be letters to another. Where texts are
    `normalized`, also marks, and what is made of several characters, if newer than Unicode 3.2: their order and their
    composition depend on tables that libraries carry with them.
    """
    table = np.zeros(0x110000, bool)
    for code in range(0x80, 0x110000):
        character = chr(code)
        category = unicodedata.category(character)
        changing = normalized and (category[0] == "M" or unicodedata.decomposition(character))
        new = changing and unicodedata.ucd_3_2_0.category(character) == "Cn"
        table[code] = category == "Cn" or bool(new)
    return table


def _trim() -> None:
    """Give freed memory back to the system: by itself glibc would keep some 70 MB of it; other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_bytes() -> int:
    """Memory that this process has in use now; 0 where the system has no /proc (macOS): there gigatoken keeps all words."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return 0


def without_controls(raw: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that takes special tokens in the text for text.

    They are no added tokens any more; those that stand in the vocabulary get names that no merge leads to.
    """
    special = {token["content"]: token["id"] for token in raw["added_tokens"] if token["special"]}
    added = [token for token in raw["added_tokens"] if not token["special"]]
    model = dict(raw["model"])
    if isinstance(model.get("vocab"), dict):
        names = {content: f"\ue000control {n}\ue000" for content, n in special.items()}
        model["vocab"] = {names.get(piece, piece): n for piece, n in model["vocab"].items()}
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
    return {**raw, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None, "model": model}


def probe_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts that a wrong encoder would stumble over: the same ones for the same vocabulary."""
    rng = random.Random(0)
    added = [token["content"] for token in tokenizer.raw["added_tokens"]]
    vocab = tokenizer.raw["model"]["vocab"]
    pieces = sorted(vocab) if isinstance(vocab, dict) else [piece for piece, *_ in vocab]
    texts = ["", " ", "a", " a ", "\n", "\0", "\r\n\t", SPACE, f" {SPACE}a", "<0x0A>", "e\u0301", "\ufeffx", *added]
    texts += [f"x{character * n}y" for character in " =-\n\ta" for n in (2, 3, 7, 16, 17, 40, 65)]
    texts += [f"a{token} {token}{token}\n{token}" for token in added]
    for n in range(_PROBES):
        kind = n % 4
        if kind == 0:  # what merges: pieces side by side
            parts = [piece.replace(SPACE, " ") for piece in rng.choices(pieces, k=40)]
        elif kind == 1:  # any Unicode but surrogates
            parts = [chr(rng.randrange(rng.choice((0x80, 0x800, 0xD800)))) for _ in range(60)]
            parts += [chr(rng.randrange(0xE000, 0x110000)) for _ in range(10)]
            if n % 8 == 1:  # every other one without those for which the reference is asked
                parts = [part for part in parts if not doubtful(True)[ord(part)]]
        elif kind == 2:  # near a piece, but not one
            parts = [piece[: rng.randint(1, 4)] + rng.choice(" \n.,aé") for piece in rng.choices(pieces, k=40)]
        else:  # few letters, many ties
            parts = rng.choices("ab \n1<s>/", k=80)
        texts.append("".join(parts))
    return texts


class _Cutter:
    """Cuts a text where SentencePiece would not merge across, so that the ids of the pieces are those of the text.

    BPE joins neighbours into pieces of the vocabulary. Two characters that stand side by side in no piece never come
    into one token, and what happens left of them does not depend on what is right of them.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._prefix = tokenizer.model.add_dummy_prefix
        # Control and byte pieces stand for no text.
        texts = [piece.text for piece in tokenizer.model.pieces if piece.kind in ("NORMAL", "USER_DEFINED")]
        self._joined = {text[n : n + 2] for text in texts for n in range(len(text) - 1)}

    def pieces(self, text: str, size: int) -> Iterator[tuple[str, int]]:
        """Pieces of `size` characters or a little less, with how many of the first ids of each are too many.

        Raises Uncuttable.
        """
        start, skip = 0, 0
        while len(text) - start > size and (end := self._find(text, start, size)) < len(text):
            yield text[start:end], skip
            start, skip = end, 0
            if self._prefix:  # the tokenizer puts a space before each piece: leave out the text's own, else the token
                is_space = text[end] in (" ", SPACE)
                start, skip = end + is_space, 1 - is_space
        yield text[start:], skip

    def _find(self, text: str, start: int, size: int) -> int:
        """The last safe place in (start, start + size], or the first one in the `size` behind, or the end."""
        last = len(text) - 2  # something must be left behind the cut
        before = range(min(start + size, last), start, -1)
        behind = range(start + size + 1, min(start + 2 * size, last) + 1)
        for end in chain(before, behind):
            if self._is_safe(text[end - 1].replace(" ", SPACE), text[end].replace(" ", SPACE)):
                return end
        if len(text) - start > 2 * size:
            detail = f"{2 * size:,} characters in a row without a place where tokens must end"
            raise Uncuttable("no place to cut", detail)
        return len(text)

    def _is_safe(self, left: str, right: str) -> bool:
        """Whether a text may be cut between these two characters; the space put before `right` must stay apart too."""
        apart = left + right not in self._joined
        return apart and (not self._prefix or right == SPACE or SPACE + right not in self._joined)
