"""Bytes of text that tokens stand for, against the text; and the loss a byte of a run on real text."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encoder import LLAMA_MODEL
from test_tokenizer import TRICKY, library_texts

from data_prep import token_bytes
from data_prep.tokenizer import Tokenizer, load

BOS, EOS = 1, 2
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), min_size=1, max_size=5)


def byte_level(folder: Path, add_prefix_space: bool) -> Tokenizer:
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    theirs.train_from_iterator(library_texts()[:20], trainer)
    theirs.add_tokens(["hé▁llo"])  # no mark: it is text
    folder.mkdir()
    theirs.save(str(folder / "tokenizer.json"))
    return load(folder)


@pytest.fixture(scope="module", params=["llama", "byte level", "byte level, space first"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """One, and its tokenizer.json as it lies beside shards."""
    folder = tmp_path_factory.mktemp("tokenizer")
    found = load(LLAMA_MODEL) if request.param == "llama" else byte_level(folder / "its", "first" in request.param)
    found.save(folder / "saved", prepend_bos=False)
    return found, folder / "saved" / "tokenizer.json"


@pytest.mark.parametrize("marks", [(True, False), (False, True), (True, True)], ids=["eos", "bos", "both"])
@given(texts=TEXTS)
@settings(max_examples=15, deadline=None)
def test_all_bytes_of_documents_are_counted(
    tokenizer: tuple[Tokenizer, Path], marks: tuple[bool, bool], texts: list[str]
) -> None:
    """The space that some put before each text is none of its bytes. (Where a text begins with one, byte level puts none.)"""
    one, file = tokenizer
    append_eos, prepend_bos = marks
    lengths = token_bytes.of(file, one.info.vocab_size)
    assert lengths is not None
    texts = [f"x{text}" for text in (*texts, *TRICKY, "hé▁llo")]
    ids = [EOS]  # of the document before
    for text_ids in one.encode_batch(texts):
        ids += [*([BOS] if prepend_bos else []), *text_ids.tolist(), *([EOS] if append_eos else [])]
    found = lengths.count(np.array(ids), BOS if prepend_bos else EOS)
    if one.info.kind == "sentencepiece":
        texts = [text.replace("▁", " ") for text in texts]  # to it they are one
    assert found == sum(len(text.encode()) for text in texts)
    assert lengths.count(np.array(ids), None) == found + lengths.prefix * len(texts)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 0}}},
        {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}},
        {"model": {}},
        {"decoder": {"type": "ByteLevel"}},
        [],
    ],
)
def test_of_another_kind_nothing_is_said(content: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert token_bytes.of(tmp_path / "tokenizer.json", 5) is None
    assert token_bytes.of(tmp_path / "none.json", 5) is None


def test_unigram_words_are_counted_as_they_are(tmp_path: Path) -> None:
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("▁ab", -1.0), ("é", -2.0)], 0, False))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    theirs.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    theirs.save(str(tmp_path / "tokenizer.json"))
    lengths = token_bytes.of(tmp_path / "tokenizer.json", 5)
    assert lengths is not None
    assert (lengths.bytes_of[1:].tolist(), lengths.prefix) == ([3, 2, 0, 0], 1)
