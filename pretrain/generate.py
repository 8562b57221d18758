"""pretrain generate: text from an exported model.

    prompt ── tokenizer ──> ids ── Llama, filling the KVCache ──> logits of the last token ── sample ──> id ──┐
                                          ^                                                                  │
                                          └────────────────────── one token a step ──────────────────────────┤
    standard output <── TextStream: whole characters only <───────────────────────────────────────────────────┘

Any Hugging Face folder of a Llama that `pretrain.hf.load` accepts will do. The text goes to standard output and nothing
else does; what there is to say about it goes to standard error.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pretrain import hf
from pretrain.cli import Parser, fail
from pretrain.model import KVCache, Llama
from pretrain.reading import read_tokenizer

_LEAST = torch.finfo(torch.float32).tiny
"""Lower bound for temperature and top_p: a smaller number may be 0 in fp32."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature, then the top_k likeliest, then the top_p of their probability."""

    temperature: float = 0.8
    """Logits are divided by it (no unit); 0 always takes the likeliest token."""
    top_k: int = 50
    """Likeliest tokens to draw from (tokens); 0: all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that hold this share of the probability, in (0, 1]."""

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be drawn with."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k} tokens; it must be at least 0 (0: all)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")


def main(argv: list[str]) -> None:
    """The command `pretrain generate`."""
    parser = Parser(prog="pretrain generate", description="Continue a text with an exported model.")
    parser.add_argument("folder", type=Path, help="Folder that `pretrain export` wrote, or any Llama's (path).")
    parser.add_argument("--prompt", type=str, default="", help="Text to go on from; empty: from the start of a text.")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="Stop after so many (tokens).")
    parser.add_class_arguments(Sampling)
    parser.add_argument("--seed", type=int, default=0, help="Fixes what is drawn (whole number).")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    args = parser.parse_args(argv)
    try:
        if args.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {args.max_new_tokens}; it must be at least 1")
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
        continue_text(args.folder, args.prompt, args.max_new_tokens, sampling, args.seed, _device(args.device))
    except UnicodeEncodeError as error:
        fail(parser.prog, f"{error}; the prompt must be UTF-8, and PYTHONUTF8=1 set where the locale is another")
    except (ValueError, OSError) as error:
        fail(parser.prog, error)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here; take --device cpu")
    return torch.device(name)


def continue_text(
    folder: Path, prompt: str, max_new_tokens: int, sampling: Sampling, seed: int, device: torch.device
) -> None:
    """Print the prompt and its continuation, as it comes; then say on standard error why it ended.

    Raises:
        FileNotFoundError: no model or no tokenizer in `folder`.
        ValueError: a model that Cria cannot represent, or a prompt that leaves no room or is no text.
    """
    prompt.encode()  # argv bytes that are not UTF-8 arrive as lone surrogates: fail here and not inside a library
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json; name a folder that `pretrain export` wrote")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    bos_id, eos_ids = hf.special_ids(folder)
    # On a CPU, half precision is slow; fp32 holds every stored type exactly.
    model = hf.load_model(folder, device, torch.float32 if device.type == "cpu" else None)
    prompt_ids = tokenizer.encode(prompt).ids or first_ids(bos_id, eos_ids)
    stream = TextStream(tokenizer, prompt_ids)
    generator = torch.Generator(device).manual_seed(seed)
    known_ids = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())  # there may be holes
    token_ids = generate(model, prompt_ids, max_new_tokens, eos_ids, sampling, generator, known_ids)

    started, new_ids = time.perf_counter(), []
    waiting = prompt  # printed with the first token: nothing is printed where the first forward fails
    for token_id in token_ids:
        new_ids.append(token_id)
        print(waiting + stream.push(token_id), end="", flush=True)
        waiting = ""
    print(stream.rest(), flush=True)
    per_second = len(new_ids) / (time.perf_counter() - started)

    positions = model.config.max_position_embeddings
    if new_ids[-1] in eos_ids:
        why = "the model ended the text"
    elif len(new_ids) == max_new_tokens:
        why = "--max_new_tokens is reached"
    else:
        why = f"the model's {positions} positions are full (max_position_embeddings)"
    print(f"[{len(prompt_ids)} + {len(new_ids)} tokens, {per_second:.0f} tokens/s; {why}]", file=sys.stderr)


def first_ids(bos_id: int | None, eos_ids: tuple[int, ...]) -> list[int]:
    """What an empty prompt starts from, where the tokenizer puts no BOS before it of its own accord.

    That is EOS, which in packed training data stands before every text but the first; else BOS.
    """
    if eos_ids:
        return [eos_ids[0]]
    if bos_id is not None:
        return [bos_id]
    raise ValueError("an empty prompt needs an EOS or BOS token, and the tokenizer has neither; give a --prompt")


def generate(
    model: Llama,
    prompt_ids: list[int],
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    sampling: Sampling,
    generator: torch.Generator,
    known_ids: int | None = None,
) -> Iterator[int]:
    """Yield new token ids: at most `max_new_tokens`, up to the model's last position, and nothing after one of `eos_ids`.

    Only ids below `known_ids` are drawn: a model may have more rows in its embedding than its tokenizer has tokens.

    Raises:
        ValueError: at once, for a prompt that fills all positions, or has ids that the model does not know.
    """
    config = model.config
    room = config.max_position_embeddings - len(prompt_ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens, and the model {config.max_position_embeddings} positions; "
            f"shorten it to at most {config.max_position_embeddings - 1}"
        )
    if max(prompt_ids) >= config.vocab_size:
        raise ValueError(f"the prompt has token id {max(prompt_ids)}; the model knows {config.vocab_size} ids")
    return _generate(model, prompt_ids, min(max_new_tokens, room), eos_ids, sampling, generator, known_ids)


@torch.inference_mode()
def _generate(
    model: Llama,
    prompt_ids: list[int],
    new_tokens: int,
    eos_ids: tuple[int, ...],
    sampling: Sampling,
    generator: torch.Generator,
    known_ids: int | None,
) -> Iterator[int]:
    weight = model.model.embed_tokens.weight
    cache = KVCache(model.config, 1, len(prompt_ids) + new_tokens, weight.device, weight.dtype)
    input_ids = prompt_ids
    for _ in range(new_tokens):
        logits = model(torch.tensor([input_ids], device=weight.device), cache=cache)[0, -1, :known_ids]  # (V,)
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: its weights are damaged, or too large for their type")
        token_id = sample(logits, sampling, generator)
        yield token_id
        if token_id in eos_ids:
            return
        input_ids = [token_id]


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token id from logits, (V,) of any float type."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids, probabilities = distribution(logits, sampling)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Ids and their probabilities (fp32, sum 1), likeliest first, after temperature > 0, top_k and top_p, in this order.

    logits: (V,) of any float type; the result is as long as top_k leaves it. top_p is nucleus sampling (arXiv
    1904.09751, section 3.1).
    """
    values, ids = logits.float().sort(descending=True, stable=True)
    if sampling.top_k:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    # Measured from the largest, a tiny temperature gives -inf for the others and never inf - inf.
    probabilities = ((values - values[0]) / max(sampling.temperature, _LEAST)).softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities  # what the likelier tokens hold
    probabilities = probabilities * (before < max(sampling.top_p, _LEAST))
    return ids, probabilities / probabilities.sum()


class TextStream:
    """Token ids to text, piece by piece, never half a character.

    A token may hold some bytes of a character, and what it decodes to may hang on the token before (a leading space). So
    each piece is the difference of two decodings that begin at the same, earlier token; bytes that are no character yet
    decode to U+FFFD and wait. (tokenizers' own DecodeStream raises "Invalid prefix" when such bytes never become one.)
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._start, self._shown = 0, len(prompt_ids)  # decode from _start; the text up to _shown is out

    def push(self, token_id: int) -> str:
        """The text that has become whole with this token; often a word, sometimes nothing."""
        self._ids.append(token_id)
        piece = self._piece()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return piece

    def rest(self) -> str:
        """At the end: what still waits, be it half a character."""
        piece = self._piece()
        self._start = self._shown = len(self._ids)
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]
