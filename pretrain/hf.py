"""To and from Hugging Face: a folder that transformers loads as it is.

    ModelConfig ── hf_config ─────> config.json, generation_config.json ─┐
    weights ── our names are theirs ────────────────> model*.safetensors ├─ write ─> FOLDER ─ load ─> ModelConfig, weights
    tokenizer/ ────────────────> tokenizer.json, tokenizer_config.json ──┘             └─ compared with what was meant

A folder that transformers' `save_pretrained` wrote for a Llama loads the same way. What Cria cannot represent (biases, other
head sizes ...) is refused by name: a model that loads and is wrong is worse than none.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.hf_config import from_hf_config, to_hf_config
from pretrain.model import Llama
from pretrain.reading import read_json, read_tokenizer
from pretrain.sections import ModelConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What a tokenizer may consist of; the first two are needed."""

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights, as safetensors calls them."""
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TokenizerFacts:
    """What a model must know about its tokenizer."""

    vocab_size: int
    """Ids lie in [0, vocab_size)."""
    bos_id: int | None
    """Begin of sequence; None: there is none."""
    eos_id: int | None
    """End of sequence; None: there is none."""


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def tokenizer_facts(folder: Path) -> TokenizerFacts:
    """Vocabulary size and special ids of a Hugging Face tokenizer folder; no BOS where texts do not begin with it.

    Raises:
        FileNotFoundError: where tokenizer.json or tokenizer_config.json is missing.
        ValueError: where a special token is not in the vocabulary.
    """
    for name in TOKENIZER_FILES[:2]:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing; copy the tokenizer folder that data-prep wrote to {folder}"
            )
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    config = read_json(folder / "tokenizer_config.json")
    ids: dict[str, int | None] = {}
    for key in ("bos_token", "eos_token"):
        token = config.get(key)
        token = token.get("content", token) if isinstance(token, dict) else token
        ids[key] = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if token is not None and ids[key] is None:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} names {token!r} as {key}; tokenizer.json does not have it"
            )
    if not _begins_with_bos(config):
        ids["bos_token"] = None
    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    return TokenizerFacts(vocab_size, ids["bos_token"], ids["eos_token"])


def _begins_with_bos(tokenizer_config: dict[str, Any]) -> bool:
    return tokenizer_config.get("add_bos_token") is not False  # which data-prep writes for shards without BOS


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer. Where texts do not begin with BOS none is named: the model has never seen it.

    Evaluation tools put BOS before a text without context, or EOS where the tokenizer names no BOS. EOS is right here: in shards
    without BOS it stands before every document but the first.
    """
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not _begins_with_bos(read_json(folder / "tokenizer_config.json")):
        for name in {"tokenizer_config.json", "special_tokens_map.json"} & files.keys():
            content = read_json(folder / name)
            content.pop("bos_token", None)
            files[name] = _as_json(content)
    return files


# --- writing ---------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    model: ModelConfig,
    weights: dict[str, Tensor],
    tokenizer: Path,
    max_shard_size: int | str = "5GB",
) -> TokenizerFacts:
    """Write model and tokenizer into an empty folder, and compare what can be read there with what was meant.

    weights: whole CPU tensors under the model's parameter names, all of one type, which becomes the export's.
    tokenizer: a Hugging Face tokenizer folder.

    Raises:
        ValueError: weights that are not the model's, are not finite, or a tokenizer with more ids than the model has.
        FileNotFoundError: an incomplete tokenizer.
        OSError: the disk is full, or what was read back is not what was written.
    """
    check_weights(model, weights)
    facts = tokenizer_facts(tokenizer)
    if facts.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer} has ids up to {facts.vocab_size - 1}, but the model has {model.vocab_size} "
            f"embeddings; put the tokenizer there that the run was trained with"
        )
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} is not finite as {tensor.dtype}; take bfloat16 or float32, or an earlier checkpoint"
            )
    dtype = next(iter(weights.values())).dtype
    config = to_hf_config(model, dtype, facts.bos_id, facts.eos_id)
    _write_json(folder / "config.json", config)
    ids = {"bos_token_id": facts.bos_id, "eos_token_id": facts.eos_id}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    try:
        save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
    except SafetensorError as error:  # how it says that the disk is full
        raise OSError(f"{folder}: the weights cannot be written ({error})") from error
    files = _tokenizer_files(tokenizer)
    for name, content in files.items():
        (folder / name).write_bytes(content)

    read_model, read_weights = load(folder)
    wrong = [name for name, content in files.items() if (folder / name).read_bytes() != content]
    wrong += [name for name, tensor in weights.items() if not same_bits(tensor, read_weights[name])]
    wrong += ["config.json"] * (read_model != model or read_json(folder / "config.json") != config)
    if wrong:
        raise OSError(f"{folder}: {wrong[0]} reads otherwise than it was written; check the disk")
    return facts


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one type, one shape and the same bits: NaN equals NaN, 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- reading ---------------------------------------------------------------------------------------------------------


class Weights:
    """The weights of a Hugging Face folder of a Llama, under our (= their) names: found and checked at once, read one by one."""

    def __init__(self, directory: Path) -> None:
        """Read config.json and the names, shapes and types of the weights; they are held against each other.

        Raises:
            FileNotFoundError: no config.json, or no safetensors.
            ValueError: a model that Cria cannot represent; weights that are missing, too many, or of another shape.
        """
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"{directory} has no config.json; name a folder that `pretrain export` wrote")
        self.model = from_hf_config(read_json(directory / "config.json"))
        """The shape."""
        self._files: dict[str, Path] = {}
        found: dict[str, Tensor] = {}
        for file in _weight_files(directory):
            for name, tensor in _headers(file).items():
                # Conversions of 2023 stored the rotary frequencies, which follow from the configuration.
                if not name.endswith("rotary_emb.inv_freq"):
                    self._files[name], found[name] = file, tensor
        if self.model.tie_word_embeddings and found.pop("lm_head.weight", None) is not None:
            embedding = "model.embed_tokens.weight"
            if embedding in found and not same_bits(self["lm_head.weight"], self[embedding]):
                raise ValueError(
                    f"{directory}: config.json ties the embeddings, but lm_head.weight is not the embedding"
                )
        check_weights(self.model, found)
        self.names = tuple(found)

    def __getitem__(self, name: str) -> Tensor:
        """A weight, whole, as it is stored."""
        with _opened(self._files[name]) as tensors:
            return tensors.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({error}); export or download it again") from error


def _headers(file: Path) -> dict[str, Tensor]:
    """Name -> an empty tensor of the shape and type of each weight in a file. Raises ValueError for a type that is no float."""
    with _opened(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        if other := [f"{name} is {s.get_dtype()}" for name, s in slices.items() if s.get_dtype() not in _FLOATS]:
            raise ValueError(f"{file}: {other[0]}; the weights must all be float32, all bfloat16 or all float16")
        return {n: torch.empty(s.get_shape(), dtype=_FLOATS[s.get_dtype()], device="meta") for n, s in slices.items()}


def load(directory: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The shape and all weights of a Hugging Face folder of a Llama; see `Weights`, whose errors it raises."""
    weights = Weights(directory)
    return weights.model, {name: weights[name] for name in weights.names}


def load_model(directory: Path, device: torch.device, dtype: torch.dtype | None = None) -> Llama:
    """`load`, and a model on `device` that computes in `dtype`; None: the type that the weights are stored in."""
    config, weights = load(directory)
    with torch.device("meta"):
        model = Llama(config).to(dtype or weights["model.norm.weight"].dtype)
    model.materialize(device)
    model.load_state_dict(weights)
    return model


def special_ids(directory: Path) -> tuple[int | None, tuple[int, ...]]:
    """The ids of BOS and of all tokens that end a text, by generation_config.json, else by config.json.

    Raises:
        ValueError: something that is no id.
    """
    file = directory / "generation_config.json"
    file = file if file.is_file() else directory / "config.json"
    config = read_json(file)
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for name, value, ids in (("bos_token_id", bos, [] if bos is None else [bos]), ("eos_token_id", eos, eos_ids)):
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise ValueError(f"{file}: {name} is {value!r}; an id is a whole number of at least 0")
    return bos, tuple(eos_ids)


def check_weights(model: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Raise ValueError unless `weights` are the model's parameters by name and shape, all of one float type."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(model).named_parameters()}
    problems = [f"{name} is missing" for name in shapes if name not in weights]
    problems += [f"{name} is not a parameter of the model" for name in weights if name not in shapes]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, the model's is {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    dtypes = sorted({str(tensor.dtype) for tensor in weights.values()})
    if len(dtypes) > 1 or not all(tensor.dtype in _FLOATS.values() for tensor in weights.values()):
        problems.append(f"the weights are {', '.join(dtypes)}; they must all be float32, all bfloat16 or all float16")
    if problems:
        rest = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights do not fit the configuration: {'; '.join(problems[:3])}{rest}")


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    names = ["model.safetensors"]
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{index}: weight_map is no object of weights and their files; download the folder again")
        names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which leads out of its folder")
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} is missing; Cria reads weights from safetensors only")
    return [directory / name for name in names]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes(_as_json(content))


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
