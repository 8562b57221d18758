"""The files of a tokenizer, and whether those beside the shards are of the tokenizer that made the ids.

    DATASET/tokenizer/tokenizer.model        (SentencePiece) determines the ids: its digest is the fingerprint
                      tokenizer.json         (Hugging Face) the same; beside a tokenizer.model it has the same pieces
                      tokenizer_config.json  which tokens are BOS and EOS
                            |
                            v  check_tokenizer: against the manifest

With another tokenizer the ids mean other words: `inspect` shows wrong text, prompts are encoded wrongly, an export ships it,
a resumed preparation mixes ids.

Part of the door between `data_prep` and `pretrain`: the standard library, and `data_prep.manifest` with its numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from data_prep.manifest import TokenizerInfo, read_object

TOKENIZER_DIR = "tokenizer"
MODEL_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"


def model_fingerprint(data: bytes) -> str:
    """Digest "sha256:HEX" of the bytes of a tokenizer.model."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def json_fingerprint(raw: dict[str, Any]) -> str:
    """Digest "sha256:HEX" of the content of a tokenizer.json: of what decides on the ids, nothing of decoding or padding."""
    decisive = {name: raw.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()
    return f"sha256:{hashlib.sha256(canonical).hexdigest()}"


def folder_fingerprint(folder: Path) -> str:
    """That of the tokenizer in `folder`. Raises ValueError or FileNotFoundError where there is none."""
    if (folder / MODEL_NAME).is_file():
        return model_fingerprint((folder / MODEL_NAME).read_bytes())
    return json_fingerprint(read_object(folder / JSON_NAME, "copy it again"))


def named_tokens(folder: Path) -> dict[str, str]:
    """Which tokens are BOS, EOS and UNK by the configuration files in `folder`: {"bos_token": "<s>", ...}.

    Raises ValueError for a file that does not say it.
    """
    named: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / CONFIG_NAME):
        if file.is_file():
            config = read_object(file, "copy it again")
            for name in ("bos_token", "eos_token", "unk_token"):
                token = config.get(name)
                text = token.get("content") if isinstance(token, dict) else token
                if token is not None and not isinstance(text, str):
                    raise ValueError(f"{file}: {name} is {token!r}, neither a text nor an object with its content")
                if text is not None:
                    named[name] = text
    return named


def check_tokenizer(directory: str | os.PathLike[str], info: TokenizerInfo) -> None:
    """Raise ValueError, naming the folder, unless DIRECTORY/tokenizer is the tokenizer `info` that made the ids."""
    folder = Path(directory) / TOKENIZER_DIR
    try:
        problem = _problem(folder, info) if folder.is_dir() else "there is no such folder"
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    except ValueError as error:
        problem = str(error)
    except (TypeError, KeyError, AttributeError):
        problem = f"{JSON_NAME} has no vocabulary"
    if problem:
        remedy = "run the data-prep command that made the dataset again, which writes the folder anew"
        raise ValueError(f"{folder} is not the tokenizer that made the ids: {problem}; {remedy}")


def _problem(folder: Path, info: TokenizerInfo) -> str | None:
    raw = read_object(folder / JSON_NAME, "it is damaged")
    model = (folder / MODEL_NAME).read_bytes() if info.kind == "sentencepiece" else None
    if model is None and (folder / MODEL_NAME).exists():
        return f"{MODEL_NAME} is another one, which would be taken first"
    decisive, found = (JSON_NAME, json_fingerprint(raw)) if model is None else (MODEL_NAME, model_fingerprint(model))
    if found != info.fingerprint:
        return f"{decisive} has the fingerprint {found[:19]}, the manifest {info.fingerprint[:19]}"
    vocabulary = raw["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces and scores
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    if model is not None and not (len(vocabulary) == info.vocab_size and _are_pieces(vocabulary, model)):
        return f"{JSON_NAME} has other pieces than {MODEL_NAME}"
    vocabulary = vocabulary | {token["content"]: token["id"] for token in raw["added_tokens"]}
    tokens = named_tokens(folder)
    for name, wanted in (("bos_token", info.bos_id), ("eos_token", info.eos_id)):
        named = vocabulary.get(tokens.get(name))
        if named != wanted:
            return f"{name} is the id {named} by {CONFIG_NAME}, {wanted} by the manifest"
    return None


def _are_pieces(vocabulary: dict[str, int], model: bytes) -> bool:
    """Whether the pieces of a .model file are `vocabulary`, in the order of their ids.

    A file of protobuf's, in which each piece begins with the byte 10, its length and its text.
    """
    at = 0
    for piece in sorted(vocabulary, key=lambda piece: vocabulary[piece]):
        text = piece.encode()
        length = bytes([len(text)] if len(text) < 128 else [len(text) & 127 | 128, len(text) >> 7])
        at = model.find(b"\n" + length + text, at) + 1
        if not at:
            return False
    return True
