"""The encoder: its ids are the reference's for any text, whole or in pieces, and a difference is never let pass."""

import json
import random
import sys
import unicodedata
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import options as prepare_options
from test_sources import line, write_jsonl
from test_tokenizer import (  # noqa: F401  unlike_models: a fixture
    CONTROLS,
    LLAMA_MODEL,
    SYMBOLS,
    TRICKY,
    library_texts,
    unlike_models,
)

from data_prep import encoder as encoder_module
from data_prep.__main__ import main
from data_prep.encoder import WHOLE_CHARACTERS, Difference, Encoder, Uncuttable, fast_encoder, probe_texts
from data_prep.prepare import run as prepare
from data_prep.shard import TokenDataset
from data_prep.tokenizer import Tokenizer, load
from data_prep.unit import with_controls

REFERENCE = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA_MODEL))


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return load(LLAMA_MODEL)


@pytest.fixture(scope="module")
def fast(llama: Tokenizer) -> Encoder:
    return Encoder(llama, "gigatoken")


@pytest.fixture(scope="module")
def cut(llama: Tokenizer, unlike_models: list[Path]) -> list[Encoder]:  # noqa: F811
    """The reference, of Llama's model and of those with symbols of the user, with and without a space before a text."""
    return [Encoder(tokenizer, "reference") for tokenizer in (llama, *map(load, unlike_models))]


def split(encoded: encoder_module.Encoded) -> list[list[int]]:
    return [part.tolist() for part in np.split(encoded.ids, encoded.ends[:-1])]


def test_real_files_have_the_ids_of_sentencepiece(llama: Tokenizer, fast: Encoder) -> None:
    chosen, words = fast_encoder(llama)
    assert (chosen.engine, words) == ("gigatoken", "gigatoken, which agrees with sentencepiece on 460 probes")
    texts = library_texts() + TRICKY + CONTROLS
    assert split(fast.encode(texts)) == [REFERENCE.encode(text) for text in texts]


def test_a_model_that_puts_no_space_before_a_text_is_encoded_fast(unlike_models: list[Path]) -> None:  # noqa: F811
    """And with its user's symbols; those of one that does put a space are the reference's."""
    rng = random.Random(0)
    parts = [*SYMBOLS, *"ab =é▁\n", "  ", "<s>", "=== ", "a  b"]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 30))) for _ in range(2000)]
    for model, engine in zip(unlike_models, ("gigatoken", "reference"), strict=True):
        encoder, _ = fast_encoder(load(model))
        assert encoder.engine == engine
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        assert split(encoder.encode(texts)) == [processor.encode(text) for text in texts]


_ANY = st.text(max_size=60)  # every code point but the surrogates
_LIKELY = st.text(alphabet=" ab=-\n\t▁<s>/0x1é.,_eiouABC", max_size=60)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.lists(st.one_of(_ANY, _LIKELY, st.sampled_from(CONTROLS)), max_size=3).map("".join), max_size=5))
def test_any_unicode_has_the_ids_of_sentencepiece(fast: Encoder, texts: list[str]) -> None:
    if texts:
        assert split(fast.encode(texts)) == [REFERENCE.encode(text) for text in texts]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(_ANY, _LIKELY, st.text(alphabet="the end of a word,\n ▁", min_size=20, max_size=200)), st.integers(1, 30)
)
def test_a_text_in_pieces_has_the_ids_of_the_whole(cut: list[Encoder], text: str, size: int) -> None:
    for encoder in cut:
        assert encoder._cutter is not None
        try:
            pieces = list(encoder._cutter.pieces(text, size))
        except Uncuttable:
            continue
        ids = [token for piece, skip in pieces for token in encoder.encode([piece]).ids[skip:]]
        assert ids == encoder.encode([text]).ids.tolist()


def test_symbols_of_the_user_are_not_cut(cut: list[Encoder]) -> None:
    rng, cuts = random.Random(0), 0
    for encoder in cut[1:]:
        for _ in range(300):
            text = "".join(rng.choices([*SYMBOLS, *"abc =\n", "  ", "word"], k=80))
            pieces = list(encoder._cutter.pieces(text, 30))
            cuts += len(pieces) - 1
            ids = [token for piece, skip in pieces for token in encoder.encode([piece]).ids[skip:]]
            assert ids == encoder.encode([text]).ids.tolist()
    assert cuts > 1000


def test_long_documents_are_cut_often_and_exactly(fast: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "LONG_CHARACTERS", 100)
    for text in (text[:60_000] for text in library_texts()):
        parts = list(fast.encode_long(text))
        assert len(parts) > len(text) / 150
        assert np.concatenate(parts).tolist() == REFERENCE.encode(text)
    with pytest.raises(Uncuttable, match="200 characters in a row"):
        list(fast.encode_long("a" * 1000))
    with pytest.raises(Uncuttable):
        fast.refuse_uncuttable("word " * 100 + "a" * 1000)
    fast.check("a" * (2 * encoder_module._CHECK_CHARACTERS + 1))  # too long to be compared: that drops no document


def test_what_gigatoken_remembers_is_bounded(llama: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, limit = random.Random(0), 20 << 20
    monkeypatch.setattr(encoder_module, "_WORDS_BYTES", limit)
    monkeypatch.setattr(encoder_module, "_RENEW_CHARACTERS", 1 << 20)
    encoder = Encoder(llama, "gigatoken")
    start, highest = encoder_module._resident_bytes(), 0
    original, calls = encoder._renew, []
    monkeypatch.setattr(encoder, "_renew", lambda: calls.append(original()))
    for _ in range(48):
        digits = rng.randbytes(480_000).hex()
        encoder.encode([" ".join(digits[n : n + 16] for n in range(0, len(digits), 16))])
        highest = max(highest, encoder_module._resident_bytes() - start)
    assert len(calls) >= 4, "the words would have taken some 280 MB"
    assert highest < 8 * limit, "the allocator keeps some of what was given back, but the words do not add up"


def test_literal_control_tokens_stay_text(fast: Encoder) -> None:
    for ids in split(fast.encode(CONTROLS)):
        assert not {0, 1, 2} & set(ids)


def test_a_difference_is_named_and_chosen_against(llama: Tokenizer, fast: Encoder) -> None:
    broken = Encoder(llama, "gigatoken")
    raw = json.loads(json.dumps(llama.raw))
    del raw["model"]["merges"][5000:5100]
    broken.model = json.dumps(encoder_module.without_controls(raw)).encode()
    broken._renew()
    text = library_texts()[0]
    with pytest.raises(Difference, match=r"gigatoken gives \[.*\] at token [\d,]+, sentencepiece gives \["):
        broken.check(text)
    fast.check(text)
    long = library_texts()[2][:300_000]  # of which a piece is compared
    assert len(long) > encoder_module._CHECK_CHARACTERS
    with pytest.raises(Difference, match="gigatoken gives"):
        broken.check(long)
    fast.check(long)
    llama_with_lost_merges = load(LLAMA_MODEL)
    llama_with_lost_merges.raw = raw
    chosen, words = fast_encoder(llama_with_lost_merges)
    assert chosen.engine == "reference"
    assert "sentencepiece itself: gigatoken gives other ids on the probe" in words
    reference = Encoder(llama, "reference")
    assert split(reference.encode([text, "", "a"])) == [REFERENCE.encode(t) for t in (text, "", "a")]


def test_without_gigatoken_the_reference_does_it(llama: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    chosen, words = fast_encoder(llama)
    assert chosen.engine == "reference"
    assert words.startswith("sentencepiece itself: gigatoken can't load")


def test_a_byte_level_tokenizer_is_encoded_as_tokenizers_does(tmp_path: Path) -> None:
    import tokenizers

    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(library_texts()[:2], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load(tmp_path)
    chosen, _ = fast_encoder(ours)
    texts = [*library_texts(), "a<|end|>b<|end|>"]
    got = split(chosen.encode(texts))
    assert chosen.engine == "gigatoken"
    assert got == [ids.tolist() for ids in ours.encode_batch(texts)]
    assert 0 not in got[-1]


def test_what_libraries_of_different_age_may_disagree_about_goes_to_the_reference(tmp_path: Path) -> None:
    """The order of newer marks, compositions and letters that Unicode did not have yet."""
    import tokenizers

    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.normalizer = tokenizers.normalizers.NFC()
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator(library_texts()[:1], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load(tmp_path)
    encoder, _ = fast_encoder(ours)
    assert encoder.engine == "gigatoken"
    known = ["naïve café “quoted” — e\u0301 \u0915\u093f 你好 \U0001f600", "plain", ""]
    newer = ["\u0628\u08d3\u0650\u0651", "\U00010d25\u0326", "\U00011935\U00011930", "\U0003fffd"]
    assert [encoder._is_doubtful(text) for text in known + newer] == [False] * 3 + [True] * 4
    far = "a" * 200_000 + newer[0]
    assert encoder._is_doubtful(far)
    rng = random.Random(3)
    marks = [chr(code) for code in range(0x300, 0x20000) if unicodedata.combining(chr(code))]
    texts = [*known, *newer, far, *("x" + "".join(rng.choices(marks, k=2)) + "y" for _ in range(3000))]
    encoded = encoder.encode(texts)
    assert encoded.ids.dtype == np.uint32
    assert split(encoded) == [ids.tolist() for ids in ours.encode_batch(texts)]
    with pytest.raises(Uncuttable, match="encoded by tokenizers it can be"):
        encoder.refuse_uncuttable("a" * WHOLE_CHARACTERS + newer[0])
    encoder.refuse_uncuttable("a" * (WHOLE_CHARACTERS + 1))
    assert encoder.long_characters == WHOLE_CHARACTERS, "longer ones are asked about before they are encoded"
    probes = [text for text in probe_texts(ours) if not text.isascii() and not encoder._is_doubtful(text)]
    assert sum(len(text) > 60 for text in probes) >= 40, "gigatoken itself is probed on any Unicode"


def large_vocabulary(kind: str) -> tuple[dict, list[str]]:
    """A tokenizer.json of more than 65,536 pieces, and words that are its last ones."""
    import tokenizers

    if kind == "WordLevel":
        words = [f"w{n}" for n in range(70_000)]
        model = tokenizers.models.WordLevel({word: n for n, word in enumerate(["[end]", "[unk]", *words])}, "[unk]")
        theirs = tokenizers.Tokenizer(model)
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        theirs.add_special_tokens(["[end]"])
        return json.loads(theirs.to_str()), words[-4000:]
    alphabet, letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "abcdefghijklmnopq"
    pairs = list(product(letters, letters))
    fours = list(product(map("".join, pairs), map("".join, pairs)))[::-1]  # the last begin with what merges first
    pieces = [*alphabet, *map("".join, pairs), *map("".join, fours), "[end]"]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE({piece: n for n, piece in enumerate(pieces)}, [*pairs, *fours]))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens(["[end]"])
    return json.loads(theirs.to_str()), ["".join(four) for four in fours[-4000:]]


@pytest.mark.parametrize(("kind", "engine"), [("WordLevel", "reference"), ("byte-level", "gigatoken")])
def test_a_vocabulary_of_more_than_16_bits_is_prepared_as_it_is_encoded(tmp_path: Path, kind: str, engine: str) -> None:
    """Llama 3's has 128,256 pieces. Here one token is both BOS and EOS, as GPT-2's is."""
    raw, words = large_vocabulary(kind)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"eos_token": "[end]", "bos_token": "[end]"}')
    ours, rng = load(tmp_path / "tokenizer"), random.Random(0)
    texts = [" ".join(["", *rng.choices(words, k=n)]) for n in (500, 1, 2000, 7)]
    write_jsonl(tmp_path / "in/train/chunk1/a.jsonl.zst", *map(line, texts))
    settings = {"tokenizer": str(tmp_path / "tokenizer"), "prepend_bos": True, "check_every": 0}
    manifest = prepare(prepare_options(tmp_path / "in", tmp_path / "out", **settings))
    assert manifest is not None
    assert fast_encoder(ours)[0].engine == engine
    end = ours.info.eos_id
    expected = [token for ids in ours.encode_batch(texts) for token in (end, *ids.tolist(), end)]
    dataset = TokenDataset(tmp_path / "out")
    assert (dataset.dtype, manifest.shards[0].dtype) == (np.uint32, "uint32")
    assert dataset.sequences([0], dataset.num_tokens - 1)[0].tolist() == expected
    assert sum(token > 65_535 for token in expected) > 2000
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("eos", [None, 2])
def test_bos_and_eos_stand_where_they_belong(bos: int | None, eos: int | None) -> None:
    rng = random.Random(0)
    texts = [[rng.randrange(3, 60000) for _ in range(n)] for n in (4, 0, 1, 0, 0, 7)]
    ends = np.cumsum([len(text) for text in texts])
    ids, lengths = with_controls(np.array(list(chain(*texts)), np.uint32), ends, bos, eos, np.dtype("<u2"))
    expected = [[i for i in (bos, *text, eos) if i is not None] for text in texts]
    assert ids.dtype == np.dtype("<u2")
    assert ids.tolist() == list(chain(*expected))
    assert lengths.tolist() == [len(text) for text in expected]
