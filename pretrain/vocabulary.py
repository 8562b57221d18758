"""Which token an id means: whether a folder holds the tokenizer that made the shards.

    tokenizer.model ── its bytes ────────────────────────┐
    or tokenizer.json ── what of it decides on the ids ──┴─> fingerprint, as data_prep.tokenizer makes it

A run copies the tokenizer that lies beside its shards, and an export takes that copy: a wrong one would be found weeks later,
by what the model says.
"""

import hashlib
import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from pretrain import hf
from pretrain.reading import json_mapping


def check(folder: Path, fingerprint: str) -> None:
    """Hold a Hugging Face tokenizer folder against the fingerprint of a manifest or a checkpoint.

    Raises:
        FileNotFoundError, ValueError: it is another tokenizer, or one that an export could not read.
    """
    remedy = "copy the tokenizer that the shards were prepared with there"
    found = _fingerprint(folder)
    if found != fingerprint:
        raise ValueError(
            f"{folder} is not the tokenizer that made the shards: its fingerprint is {found[:19]} and theirs {fingerprint[:19]}; "
            f"{remedy}"
        )
    try:
        hf.tokenizer_facts(folder)
    except FileNotFoundError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{folder} cannot be read ({error}); {remedy}") from error
    if (folder / "tokenizer.model").is_file() and read(folder) != _pieces(folder / "tokenizer.model"):
        raise ValueError(
            f"{folder}: tokenizer.json has other tokens than tokenizer.model, which made the shards; {remedy}"
        )


def read(folder: Path) -> dict[str, int] | None:
    """Token -> id by a folder's tokenizer.json; None where there is none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{file} cannot be read ({error})") from error


def _fingerprint(folder: Path) -> str:
    """That of `data_prep.tokenizer.load(folder).info`, which lies behind the door."""
    model, file = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file():
        return f"sha256:{hashlib.sha256(model.read_bytes()).hexdigest()}"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has neither tokenizer.model nor tokenizer.json; an export needs them")
    try:
        content = json_mapping(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    decisive = {name: content.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()
    return f"sha256:{hashlib.sha256(canonical).hexdigest()}"


def _pieces(model: Path) -> dict[str, int]:
    processor = SentencePieceProcessor(model_proto=model.read_bytes())
    return {processor.id_to_piece(number): number for number in range(processor.vocab_size())}
