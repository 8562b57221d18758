"""A SentencePiece model, read and turned into an equivalent Hugging Face tokenizer.

    tokenizer.model bytes --> SentencePieceModel: pieces, checked to be Llama's kind
                                   |
                                   v  to_huggingface: vocabulary = pieces, merges = every way to make a piece of two
                          tokenizer.json (BPE with byte fallback)

SentencePiece merges the neighbours whose joint piece has the highest score, the leftmost first; Hugging Face's BPE
merges the pair with the lowest rank, the leftmost first. So a pair's rank is the position of its joint piece by
falling score. Where a piece has several splits, see `_splits`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

SPACE = "▁"
"""What SentencePiece writes for a space (U+2581)."""


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: str
    """One of "NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "BYTE"."""


@dataclass(frozen=True)
class SentencePieceModel:
    """What we need of a SentencePiece model of Llama's kind: BPE, byte fallback, text taken as it is."""

    pieces: list[Piece]
    add_dummy_prefix: bool
    """A space is put before each text."""

    @classmethod
    def parse(cls, data: bytes, name: str) -> SentencePieceModel:
        """Read the bytes of a .model file. Raises ValueError, naming `name`, when it is none or not Llama's kind."""
        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated at import
        try:
            proto.ParseFromString(data)
        except DecodeError:
            raise ValueError(f"{name} is not a SentencePiece model; give a tokenizer.model or tokenizer.json") from None
        trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
        kinds = sentencepiece_model_pb2.ModelProto.SentencePiece.Type  # type: ignore[attr-defined]
        names = {number: name for name, number in kinds.items()}
        pieces = [Piece(p.piece, p.score, names[p.type]) for p in proto.pieces]
        unlike = {
            "it is not BPE": trainer.model_type != trainer.BPE,
            "it has no byte fallback": not trainer.byte_fallback,
            "it normalises text": bool(normalizer.precompiled_charsmap or normalizer.normalization_rule_tsv),
            "it removes extra whitespace": normalizer.remove_extra_whitespaces,
            "it keeps spaces as they are": not normalizer.escape_whitespaces,
            "it puts the space behind the word": trainer.treat_whitespace_as_suffix,
            "it has unused pieces": any(p.kind == "UNUSED" for p in pieces),
            "it has no pieces": not pieces,
        }
        reasons = [reason for reason, holds in unlike.items() if holds]
        if reasons:
            raise ValueError(
                f"{name} is not a SentencePiece model of Llama's kind: {', '.join(reasons)}. "
                "Give the tokenizer.json of the same tokenizer instead"
            )
        return cls(pieces, normalizer.add_dummy_prefix)


def to_huggingface(model: SentencePieceModel) -> dict[str, Any]:
    """The tokenizer.json that gives the same ids as `model`, apart from control tokens in the text, which it recognises.

    And, of a model that puts a space before each text, apart from a text that is one symbol of the user and nothing else.
    """
    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    marks = {piece.text: i for i, piece in enumerate(model.pieces) if piece.kind not in ("NORMAL", "BYTE")}
    unknown = next(piece.text for piece in model.pieces if piece.kind == "UNKNOWN")
    # A frame without the words, which are put in below: to write and read all of them would take longer than to make them.
    tokenizer = Tokenizer(models.BPE(vocab=marks, merges=[], unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model))
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in model.pieces:
        if piece.kind in ("UNKNOWN", "CONTROL"):
            tokenizer.add_special_tokens([AddedToken(piece.text, normalized=False, special=True)])
        elif piece.kind == "USER_DEFINED":
            # Looked for when spaces are written as SPACE, as SentencePiece does.
            tokenizer.add_tokens([AddedToken(piece.text, normalized=True, special=False)])
    raw = json.loads(tokenizer.to_str())
    raw["model"] |= {"vocab": vocab, "merges": _merges(model)}
    return raw


def _normalizers(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    """What writes spaces as SPACE and puts the one before the text.

    tokenizers normalises the user's symbols too before it looks for them: no space may come before these.
    """
    escape = normalizers.Replace(" ", SPACE)
    if not model.add_dummy_prefix:
        return [escape]
    symbols = [re.escape(piece.text) for piece in model.pieces if piece.kind == "USER_DEFINED"]
    if not symbols:
        return [normalizers.Prepend(SPACE), escape]
    nothing_else = "|".join([*symbols, ""])
    return [escape, normalizers.Replace(Regex(rf"\A(?!(?:{nothing_else})\z)"), SPACE)]


def bos_template(bos_token: str, bos_id: int) -> dict[str, Any]:
    """The "post_processor" of a tokenizer.json that puts BOS before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A", pair=f"{bos_token} $A {bos_token} $B", special_tokens=[(bos_token, bos_id)]
    )
    return json.loads(tokenizer.to_str())["post_processor"]


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """All pairs of pieces whose joint text is a piece, in the order in which SentencePiece would merge them."""
    normal = {piece.text for piece in model.pieces if piece.kind == "NORMAL"}
    by_score = sorted((p for p in model.pieces if p.kind == "NORMAL"), key=lambda piece: -piece.score)
    return [pair for piece in by_score for pair in _splits(piece.text, normal)]


def _splits(text: str, normal: set[str]) -> list[tuple[str, str]]:
    """Cut a piece in two pieces in every way, ordered so that the leftmost merge wins as it does in SentencePiece.

    To SentencePiece all ways to make one piece have one score. Two of them compete in p+q+r when pq and qr are both
    the piece ("ab","a","ba" for "aba"); the left one wins. So a pair whose left half is the right half of another comes
    after it. (For runs of one character that can't be satisfied both ways; merging from the left never gets there.)
    """
    pairs = [
        (left, right)
        for cut in range(1, len(text))
        if (left := text[:cut]) in normal and (right := text[cut:]) in normal
    ]
    if len(pairs) == 1:
        return pairs
    rights = {right for _, right in pairs}
    return sorted(pairs, key=lambda pair: (pair[0] in rights, len(pair[0])))
