"""Text to token ids, exactly.

    tokenizer.model (SentencePiece BPE with byte fallback, Llama's kind) --.
    tokenizer.json  (Hugging Face tokenizers, any kind)                  --+--> load(path) --> Tokenizer
                                                                                 |
        encode_batch(texts) -> one id array a text; decode(ids) -> text <--------+
        save(folder) -> tokenizer.json, tokenizer_config.json (+ tokenizer.model): what transformers loads

Text is text: a document that contains "<s>" or "</s>" gets the ids of these characters, never those of the control
tokens. BOS and EOS are added by `data_prep.unit`, by the dataset's policy.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import sentencepiece
import tokenizers

from data_prep.shard import TokenizerInfo, write_atomically
from data_prep.tokenizer_convert import SentencePieceModel, bos_template, to_huggingface
from data_prep.tokenizer_files import (
    CONFIG_NAME,
    JSON_NAME,
    MODEL_NAME,
    json_fingerprint,
    model_fingerprint,
    named_tokens,
)

_PRETTY = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


class Tokenizer(ABC):
    """A tokenizer of either kind. Pickling one is not promised: a worker process loads its own."""

    info: TokenizerInfo
    raw: dict[str, Any]
    """The content of a tokenizer.json that gives the same ids."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, (n,) int32, without BOS and EOS. Raises UnicodeEncodeError for lone surrogates."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` (n,)."""

    @abstractmethod
    def save(self, directory: str | Path, prepend_bos: bool) -> None:
        """Write the complete Hugging Face tokenizer folder, which `transformers.AutoTokenizer` loads as it is.

        With `prepend_bos`, and only then, transformers puts BOS before a text, as the training data had it. It never
        appends EOS, whatever the policy of the data: a prompt is there to be continued.
        """


def load(path: str | Path) -> Tokenizer:
    """Load a tokenizer.model, a tokenizer.json, or a folder with one of them (tokenizer.model first: the reference).

    Raises FileNotFoundError; ValueError for a file of neither kind and for a SentencePiece model unlike Llama's.
    """
    file = Path(path)
    if file.is_dir():
        names = [name for name in (MODEL_NAME, JSON_NAME) if (file / name).is_file()]
        if not names:
            raise FileNotFoundError(f"{file} has neither {MODEL_NAME} nor {JSON_NAME}")
        if len(names) == 2:
            _check_same_size(file)
        file = file / names[0]
    elif not file.is_file():
        raise FileNotFoundError(f"there is no tokenizer at {file}: train one with data-prep tokenizer, or name another")
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file)
    return SentencePieceTokenizer(file)


def _check_same_size(folder: Path) -> None:
    """Raise ValueError where tokenizer.json has tokens that the model beside it does not: a text may have them."""
    sizes = [
        file.info.vocab_size
        for file in (SentencePieceTokenizer(folder / MODEL_NAME), HuggingFaceTokenizer(folder / JSON_NAME))
    ]
    if sizes[0] < sizes[1]:
        raise ValueError(
            f"{folder} has two tokenizers, {MODEL_NAME} with {sizes[0]:,} tokens and {JSON_NAME} with {sizes[1]:,}, where tokens "
            f"were added: say which is meant, {folder / JSON_NAME} or {folder / MODEL_NAME}"
        )


def check_marks(tokenizer: Tokenizer, append_eos: bool, prepend_bos: bool) -> None:
    """Raise ValueError where text can hold what marks a document's end or beginning: nobody could tell documents apart."""
    marks = {
        "EOS": tokenizer.info.eos_id if append_eos else None,
        "BOS": tokenizer.info.bos_id if prepend_bos else None,
    }
    for name, mark in marks.items():
        text = "" if mark is None else tokenizer.decode([mark])
        if mark in tokenizer.encode_batch([f"a{text}b"])[0]:
            option = "append_eos" if name == "EOS" else "prepend_bos"
            raise ValueError(
                f"the tokenizer makes {name} ({mark}) of {text!r} in a text, so that documents would seem to end within: mark it "
                f'as "special" among the added_tokens of tokenizer.json, or do without (--{option} false)'
            )


class SentencePieceTokenizer(Tokenizer):
    """Llama's kind of SentencePiece model: BPE with byte fallback over the text as it is."""

    def __init__(self, file: Path) -> None:
        """Load and check the model in `file`; raises ValueError as `load` does."""
        data = file.read_bytes()
        self.model = _parsed(data, str(file))
        self._data, self._file = data, file
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        ids = {"bos_id": self._processor.bos_id(), "eos_id": self._processor.eos_id()}
        self.info = TokenizerInfo(
            fingerprint=model_fingerprint(data),
            kind="sentencepiece",
            vocab_size=self._processor.vocab_size(),
            **{name: value if value >= 0 else None for name, value in ids.items()},
        )

    @cached_property
    def raw(self) -> dict[str, Any]:  # type: ignore[override]  # made when it is first needed
        """See Tokenizer."""
        return _converted(self._data, str(self._file))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        return [np.array(self._processor.encode(text), dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See Tokenizer."""
        return self._processor.decode(np.asarray(ids).tolist())

    def save(self, directory: str | Path, prepend_bos: bool) -> None:
        """See Tokenizer. The SentencePiece model goes with it, byte for byte."""
        folder = Path(directory)
        names = {"bos_token": self.info.bos_id, "eos_token": self.info.eos_id, "unk_token": self._processor.unk_id()}
        tokens = {name: self.model.pieces[i].text for name, i in names.items() if i is not None}
        _write_folder(folder, self.raw, tokens, self.info.bos_id if prepend_bos else None)
        write_atomically(folder / MODEL_NAME, self._data)


@lru_cache(maxsize=4)  # here and below: a run loads its tokenizer more than once
def _parsed(data: bytes, name: str) -> SentencePieceModel:
    """What the bytes of a .model file say."""
    return SentencePieceModel.parse(data, name)


@lru_cache(maxsize=4)
def _converted(data: bytes, name: str) -> dict[str, Any]:
    """The tokenizer.json for the bytes of a .model file."""
    return to_huggingface(_parsed(data, name))


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer.json. BOS and EOS are read from tokenizer_config.json or special_tokens_map.json beside it."""

    def __init__(self, file: Path) -> None:
        """Load `file` and its neighbours; raises ValueError as `load` does."""
        data = file.read_bytes()
        try:
            self.raw = json.loads(data)
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # in text they are text
        self._tokens = named_tokens(file.parent)
        bos, eos = (self._token_id(file, name) for name in ("bos_token", "eos_token"))
        vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.info = TokenizerInfo(json_fingerprint(self.raw), "huggingface", vocab_size, bos, eos)

    def _token_id(self, file: Path, name: str) -> int | None:
        if name not in self._tokens:
            return None
        token_id = self._tokenizer.token_to_id(self._tokens[name])
        if token_id is None:
            raise ValueError(f"{file} has no token {self._tokens[name]!r}, which the files beside it call {name}")
        return token_id

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        encode = self._tokenizer.encode
        return [np.array(encode(text, add_special_tokens=False).ids, dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See Tokenizer."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def save(self, directory: str | Path, prepend_bos: bool) -> None:
        """See Tokenizer. What decides on the ids is written as it was read, so that the fingerprint stays."""
        _write_folder(Path(directory), self.raw, self._tokens, self.info.bos_id if prepend_bos else None)
        (Path(directory) / MODEL_NAME).unlink(missing_ok=True)  # another tokenizer's, which `load` would take first


def _write_folder(folder: Path, raw: dict[str, Any], tokens: dict[str, str], prepend_bos_id: int | None) -> None:
    """Write tokenizer.json, which is `raw` but for BOS, and tokenizer_config.json. `tokens`: "bos_token" to "<s>", ..."""
    folder.mkdir(parents=True, exist_ok=True)
    template = bos_template(tokens["bos_token"], prepend_bos_id) if prepend_bos_id is not None else None
    raw = {**raw, "truncation": None, "padding": None, "post_processor": template}
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; LlamaTokenizer would rebuild it with another normalizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "add_bos_token": prepend_bos_id is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # a Llama takes no token_type_ids
    }
    write_atomically(folder / JSON_NAME, orjson.dumps(raw, option=_PRETTY))
    write_atomically(folder / CONFIG_NAME, orjson.dumps(config, option=_PRETTY))
