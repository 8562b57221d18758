"""Tokenizers: the converted one gives the ids of the original, text stays text, and a fingerprint names the ids."""

import json
import random
import re
import shutil
import string
from importlib.resources import files
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import tokenizer_train
from data_prep.shard import check_tokenizer
from data_prep.tokenizer import Tokenizer, check_marks, load
from data_prep.tokenizer_files import json_fingerprint

LLAMA_MODEL = Path(str(files("mistral_common") / "data" / "tokenizer.model.v1"))
"""A real model of Llama's kind: 32,000 pieces, byte fallback."""

TRICKY = [
    "",
    " ",
    " a",
    "a ",
    "▁",
    "▁a",
    " ▁ ",
    "\n",
    "\r\n",
    "\0",
    "a\0b",
    "<0x0A>",
    "e\u0301é",
    "你好世界",
    "\ufeffx",
]
TRICKY += [
    "👩\u200d👩\u200d👧",
    "abababababa",
    "1234567890",
    "=" * 99,
    "\t" * 33,
    "\u00a0 \u3000",
    "\ud7ff\ue000\uffff",
]
CONTROLS = ["<s>", "</s>", "<unk>", "a<s>b", "</s></s>", " <unk> ", "x </s>\n<s> y"]


def library_texts() -> list[str]:
    """Real code and prose: modules of the standard library with all kinds of text in them."""
    import encodings.cp1252
    import json.decoder
    import pydoc_data.topics
    import statistics
    import this
    import turtle

    modules = (encodings.cp1252, json.decoder, pydoc_data.topics, statistics, this, turtle)
    return [Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules]


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return load(LLAMA_MODEL)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model trained here, with long runs of spaces and of "=" among its pieces."""
    folder = tmp_path_factory.mktemp("small")
    lines = (line for text in library_texts() for line in text.split("\n"))
    (folder / "tokenizer.model").write_bytes(tokenizer_train.train(lines, 2000))
    load(folder / "tokenizer.model").save(folder, prepend_bos=False)
    return folder


SYMBOLS = ["<code>", "a▁▁b", "▁▁", "==", "é"]
"""Of the user: whatever stands around them, each is one token."""


def train_unlike(folder: Path, add_dummy_prefix: bool) -> Path:
    """A model with symbols of the user, and with no space put before a text if it shall be so."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in library_texts()[:2] for line in text.split("\n")),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=add_dummy_prefix,
        user_defined_symbols=SYMBOLS,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def unlike_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models of Llama's kind that have what Llama's has not."""
    return [train_unlike(tmp_path_factory.mktemp("unlike"), add_dummy_prefix) for add_dummy_prefix in (False, True)]


@pytest.fixture(scope="module")
def converted(
    small_model: Path, unlike_models: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Tokenizer, Tokenizer]]:
    """SentencePiece models, each with its conversion loaded from nothing but the tokenizer.json."""
    pairs = []
    for model in (small_model / "tokenizer.model", LLAMA_MODEL, *unlike_models):
        folder = tmp_path_factory.mktemp("converted")
        load(model).save(folder, prepend_bos=False)
        pairs.append((load(model), load(folder / "tokenizer.json")))
    return pairs


def assert_same(pair: tuple[Tokenizer, Tokenizer], texts: list[str]) -> None:
    model = pair[0].model
    if model.add_dummy_prefix and any(piece.kind == "USER_DEFINED" for piece in model.pieces):
        texts = [text for text in texts if text.replace(" ", "▁") not in SYMBOLS]  # the exception of to_huggingface
    for text, expected, got in zip(texts, *(tokenizer.encode_batch(texts) for tokenizer in pair), strict=True):
        assert expected.tolist() == got.tolist(), repr(text[:80])
        assert pair[0].decode(expected) == pair[1].decode(got)


def test_conversion_gives_the_ids_of_sentencepiece(converted: list[tuple[Tokenizer, Tokenizer]]) -> None:
    runs = [f"x{character * n}y" for character in " =-\n\ta#" for n in range(1, 70)]
    runs += [character * n for character in " =" for n in range(1, 70)]
    rng = random.Random(0)
    parts = [*SYMBOLS, *"ab =é▁\n", "  ", "<s>", "=== ", "a  b"]
    mixed = ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(2000)]
    for pair in converted:
        assert_same(pair, library_texts() + TRICKY + CONTROLS + SYMBOLS + runs + mixed)


def test_symbols_of_the_user_are_one_token_each(converted: list[tuple[Tokenizer, Tokenizer]], tmp_path: Path) -> None:
    for bare, prefixed in ((converted[2][n], converted[3][n]) for n in (0, 1)):
        ids = {piece: bare.encode_batch([piece])[0].tolist() for piece in SYMBOLS}
        assert all(len(found) == 1 for found in ids.values())
        for symbol, found in ids.items():
            (alone,), text = found, symbol.replace("▁", " ")
            for tokenizer in (bare, prefixed):
                (got,) = tokenizer.encode_batch([f"x{text}y"])
                assert alone in got
                assert tokenizer.decode(got) == f"x{text}y"
    for n, (original, _) in enumerate(converted[2:]):
        original.save(tmp_path / str(n), prepend_bos=False)
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / str(n))
        for text in (*TRICKY, *(f"{symbol} x {symbol}" for symbol in SYMBOLS), library_texts()[0]):
            assert auto.encode(text, add_special_tokens=False) == original.encode_batch([text])[0].tolist(), repr(text)


_LIKELY = st.text(alphabet=" ab=-\n\t▁<s>/0x1é.,_eiou" + string.ascii_letters, max_size=60)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(_LIKELY, st.text(max_size=40), st.sampled_from(CONTROLS)), max_size=4).map("".join))
def test_conversion_is_exact_for_any_text(converted: list[tuple[Tokenizer, Tokenizer]], text: str) -> None:
    for pair in converted:
        assert_same(pair, [text])


def test_ids_are_those_of_sentencepiece_itself(llama: Tokenizer) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA_MODEL))
    texts = library_texts() + TRICKY
    for text, ids in zip(texts, llama.encode_batch(texts), strict=True):
        assert ids.tolist() == reference.encode(text)
    assert llama.info.vocab_size == 32000
    assert (llama.info.bos_id, llama.info.eos_id) == (1, 2)
    rare = "\n\U0010fffd"  # neither is a piece: byte b is piece b + 3
    np.testing.assert_array_equal(llama.encode_batch(["a" + rare])[0][-5:], np.array(list(rare.encode())) + 3)


def test_control_tokens_in_text_are_text(llama: Tokenizer, converted: list[tuple[Tokenizer, Tokenizer]]) -> None:
    for tokenizer in (llama, *chain(*converted)):
        for text, ids in zip(CONTROLS, tokenizer.encode_batch(CONTROLS), strict=True):
            assert not set(ids.tolist()) & {0, 1, 2}, text
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("with_model_config", [False, True])
def test_transformers_loads_the_folder(
    tmp_path: Path, llama: Tokenizer, prepend_bos: bool, with_model_config: bool
) -> None:
    llama.save(tmp_path, prepend_bos=prepend_bos)
    if with_model_config:  # an exported model's folder
        transformers.LlamaConfig(vocab_size=32000).save_pretrained(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = library_texts()[:2] + TRICKY
    for text, ids in zip(texts, llama.encode_batch(texts), strict=True):
        assert auto.encode(text) == [1] * prepend_bos + ids.tolist(), repr(text[:80])
        assert auto.encode(text, add_special_tokens=False) == ids.tolist()
        assert auto.decode(ids.tolist()) == llama.decode(ids)
    assert (auto.bos_token_id, auto.eos_token_id, auto.unk_token_id, len(auto)) == (1, 2, 0, 32000)
    assert set(auto("a")) == {"input_ids", "attention_mask"}
    assert (tmp_path / "tokenizer.model").read_bytes() == LLAMA_MODEL.read_bytes()


def test_a_fingerprint_names_the_ids(tmp_path: Path, llama: Tokenizer, small_model: Path) -> None:
    llama.save(tmp_path, prepend_bos=True)
    assert load(tmp_path).info == llama.info  # a saved folder is the tokenizer that it was saved from
    assert load(small_model).info.fingerprint != llama.info.fingerprint
    plain = load(tmp_path / "tokenizer.json").info
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["post_processor"] = None
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw, indent=3))
    same = load(tmp_path / "tokenizer.json")
    assert same.info == plain
    assert len(same.encode_batch(["many more than four tokens " * 9])[0]) > 40  # truncation is none of ours
    raw["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert load(tmp_path / "tokenizer.json").info.fingerprint != plain.fingerprint


BPE = {"type": "BPE", "byte_fallback": False, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
RAW = {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<end>", "special": True, "normalized": False}],
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": BPE,
    "post_processor": None,
    "decoder": None,
    "truncation": None,
    "padding": None,
}


@pytest.mark.parametrize(
    ("key", "value", "decides"),
    [
        ("added_tokens", [], True),
        ("added_tokens", [{**RAW["added_tokens"][0], "normalized": True}], True),
        ("normalizer", {"type": "Lowercase"}, True),
        ("pre_tokenizer", None, True),
        ("pre_tokenizer", {"type": "Whitespace"}, True),
        ("model", {**BPE, "merges": []}, True),
        ("model", {**BPE, "vocab": {"a": 1, "b": 0, "ab": 2}}, True),
        ("model", {**BPE, "byte_fallback": True}, True),
        ("post_processor", {"type": "ByteLevel"}, False),
        ("decoder", {"type": "ByteLevel"}, False),
        ("truncation", {"max_length": 4}, False),
        ("padding", {"pad_id": 0}, False),
        ("version", "1.1", False),
    ],
)
def test_a_fingerprint_is_of_all_that_decides_on_the_ids_and_of_nothing_else(
    key: str, value: object, decides: bool
) -> None:
    other = dict(reversed({**RAW, key: value}.items()))
    assert other != RAW
    assert (json_fingerprint(other) != json_fingerprint(RAW)) == decides


def test_a_byte_level_tokenizer_of_hugging_face(tmp_path: Path) -> None:
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(library_texts()[:2], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load(tmp_path)
    assert (ours.info.kind, ours.info.vocab_size, ours.info.eos_id) == ("huggingface", 600, None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    ours = load(tmp_path)
    assert ours.info.eos_id == 0
    for text in (*library_texts(), "a<|end|>b"):
        (ids,) = ours.encode_batch([text])
        assert ours.decode(ids) == text
        assert 0 not in ids
    ours.save(tmp_path / "saved", prepend_bos=False)
    assert load(tmp_path / "saved").info == ours.info
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert auto.encode("def f():\n") == ours.encode_batch(["def f():\n"])[0].tolist()
    assert auto.eos_token_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|fin|>"}')
    with pytest.raises(ValueError, match=r"no token '<\|fin\|>'"):
        load(tmp_path)


@pytest.mark.parametrize("special", [True, False])
def test_an_eos_that_text_can_hold_is_refused(tmp_path: Path, special: bool) -> None:
    """Documents could not be told apart: of a Unigram model, and where it is an added token that is not special."""
    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((letter, -3.0) for letter in "abcde</s>")]
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    if special:
        theirs.add_special_tokens(["</s>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    ours = load(tmp_path)
    check_marks(ours, append_eos=False, prepend_bos=False)
    with pytest.raises(ValueError, match=r"makes EOS \(1\) of '</s>' in a text, .* \(--append_eos false\)"):
        check_marks(ours, append_eos=True, prepend_bos=False)


def test_a_marks_check_passes_what_keeps_them_apart(tmp_path: Path, llama: Tokenizer) -> None:
    check_marks(llama, append_eos=True, prepend_bos=True)
    added = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate("ab<>end|")}, []))
    for kind, refused in ((added.add_special_tokens, False), (added.add_tokens, True)):
        kind(["<|end|>" if not refused else "<end>"])
        added.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>" if refused else "<|end|>"}))
        ours = load(tmp_path)
        if refused:
            with pytest.raises(ValueError, match="of '<end>' in a text"):
                check_marks(ours, append_eos=True, prepend_bos=False)
        else:
            check_marks(ours, append_eos=True, prepend_bos=False)


def test_a_folder_with_two_tokenizers_that_differ_is_asked_which(tmp_path: Path, llama: Tokenizer) -> None:
    llama.save(tmp_path, prepend_bos=False)
    assert load(tmp_path).info == llama.info, "as it was written"
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.add_tokens(["<tool>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"has two tokenizers, .* with 32,000 tokens and .* with 32,001, .* say which"):
        load(tmp_path)
    assert load(tmp_path / "tokenizer.json").info.vocab_size == 32_001
    assert load(tmp_path / "tokenizer.model").info == llama.info


def test_a_saved_folder_is_the_tokenizer_of_its_ids(tmp_path: Path, llama: Tokenizer, small_model: Path) -> None:
    for n, tokenizer in enumerate((llama, load(small_model))):
        tokenizer.save(tmp_path / f"{n}/tokenizer", prepend_bos=True)
        check_tokenizer(tmp_path / str(n), tokenizer.info)
    with pytest.raises(
        ValueError, match=r"0/tokenizer is not the tokenizer .* fingerprint sha256:\w+, the manifest sha256:"
    ):
        check_tokenizer(tmp_path / "0", tokenizer.info)
    words, scores = {"<unk>": 0, "a": 1, "b": 2}, [("<unk>", 0.0), ("a", -1.0), ("b", -2.0)]
    models = [
        tokenizers.models.WordLevel(words, "<unk>"),
        tokenizers.models.Unigram(scores, 0),
        tokenizers.models.BPE(words, []),
    ]
    for model in models:
        source, saved = tmp_path / type(model).__name__, tmp_path / f"{type(model).__name__}.saved"
        source.mkdir()
        theirs = tokenizers.Tokenizer(model)
        theirs.add_special_tokens(["<end>"])
        theirs.save(str(source / "tokenizer.json"))
        for config, eos_id in (("{}", None), ('{"eos_token": {"content": "<end>"}}', 3), ('{"eos_token": "b"}', 2)):
            (source / "tokenizer_config.json").write_text(config)
            tokenizer = load(source)
            llama.save(saved / "tokenizer", prepend_bos=False)
            with pytest.raises(ValueError, match=r"tokenizer\.model is another one"):
                check_tokenizer(saved, tokenizer.info)
            tokenizer.save(saved / "tokenizer", prepend_bos=False)
            check_tokenizer(saved, tokenizer.info)
            assert load(saved / "tokenizer").info == tokenizer.info
            assert tokenizer.info.eos_id == eos_id


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "content", ["[]", "null", "5", '{"eos_token": 5}', '{"eos_token": {}}', '{"eos_token": ["b"]}', "{"]
)
def test_a_file_that_does_not_name_the_tokens_is_refused(
    tmp_path: Path, small_model: Path, name: str, content: str
) -> None:
    shutil.copy(small_model / "tokenizer.json", tmp_path)
    assert load(tmp_path).info.vocab_size == 2000
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        load(tmp_path)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, small_model: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load(tmp_path / "absent.model")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load(tmp_path)
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"what is this?")
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
    lines = iter(library_texts()[1].split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(tmp_path / "u"), model_type="unigram", vocab_size=200, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"not BPE, it has no byte fallback.*tokenizer.json"):
        load(tmp_path / "u.model")
