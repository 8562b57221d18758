"""The data: opened and checked, and loaded in the order of the mixture.

    step k ─> Mixture.sequences(k)   which sequence of which source stands in each of the step's slots: arithmetic alone
                 │  the slots of this rank and micro-step
                 v
    TokenDataset.read_sequence ─> (B, T + 1) int64 ─> threads prefetch ─> trainer

Nothing here has a state that a resume needs. Which sequences make up step k depends on the manifests, the mixture, the seed,
the global batch size and k, and on nothing else; ranks and micro-steps only divide the slots among themselves. So there is
nothing to save, and a run that starts at step 1,000,000 starts at once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data_prep.shard import TokenDataset
from pretrain.hosts import is_first_here
from pretrain.mixture import Mixture, Stage
from pretrain.permutation import GOLDEN, mix
from pretrain.sections import DataConfig, ValidationSet
from pretrain.slots import slots_of_rank


@dataclass(frozen=True)
class Source:
    """One dataset of the mixture, opened."""

    name: str
    train: TokenDataset
    validation: TokenDataset | None


Sets = dict[str, TokenDataset]
"""Data that is validated on, opened, by name."""


def validated(sources: list[Source], sets: Sets) -> Sets:
    """All that is validated on: the sources' own splits, then `validation.sets`."""
    return {s.name: s.validation for s in sources if s.validation is not None} | sets


def datasets(sources: list[Source], sets: Sets) -> list[TokenDataset]:
    """Every dataset of a run, source by source, then the sets."""
    return [d for source in sources for d in (source.train, source.validation) if d is not None] + list(sets.values())


def stop_waiting(opened: list[TokenDataset]) -> None:
    """No more is needed of them: threads that read ahead, and wait for a file system that is away, are not to hold up the end."""
    for dataset in opened:
        dataset.stop_waiting()


def open_sources(config: DataConfig, vocab_size: int) -> list[Source]:
    """Open every source's manifests and check that they fit together and fit the model.

    The first rank of a node asks for the sizes of all files, the others take its word: it is the same folder to them.

    Raises:
        FileNotFoundError: a folder has no manifest.
        ValueError: another tokenizer than the first source's, a vocabulary larger than the model's, another policy on
            BOS and EOS, a split too short for one sequence, or validation data that the source also trains on.
    """
    sources = []
    for entry in config.sources:
        train = _open(entry.train, config.seq_len, vocab_size)
        validation = None if entry.validation is None else _open(entry.validation, config.seq_len, vocab_size)
        if validation is not None:
            _check_held_out(train, validation)
        sources.append(Source(entry.name, train, validation))
    for dataset in datasets(sources, {}):
        _check_same_tokens(sources[0].train, dataset)
    return sources


def open_sets(sets: list[ValidationSet], sources: list[Source], seq_len: int, vocab_size: int) -> Sets:
    """Open the manifests of `validation.sets` and check that they fit the sources and the model.

    Raises:
        FileNotFoundError, ValueError: as `open_sources`, for what a source's validation data are refused for.
    """
    opened = {}
    for entry in sets:
        opened[entry.name] = one = _open(entry.path, seq_len, vocab_size)
        _check_same_tokens(sources[0].train, one)
        for source in sources:
            if source.train.manifest.fingerprint == one.manifest.fingerprint:
                raise ValueError(
                    f"validation.sets: {entry.name} ({entry.path}) holds what {source.name} is trained on; take other data"
                )
    return opened


def _open(directory: str, seq_len: int, vocab_size: int) -> TokenDataset:
    dataset = TokenDataset(Path(directory), check_files=is_first_here())
    tokenizer = dataset.manifest.tokenizer
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{directory}: its tokenizer has {tokenizer.vocab_size} tokens and model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    if dataset.num_sequences(seq_len) < 1:
        raise ValueError(
            f"{directory}: {dataset.num_tokens} tokens are not enough for one sequence of data.seq_len + 1 = {seq_len + 1} "
            "tokens; prepare more text or set a shorter data.seq_len"
        )
    return dataset


def _check_same_tokens(first: TokenDataset, other: TokenDataset) -> None:
    a, b = first.manifest, other.manifest
    if a.tokenizer.fingerprint != b.tokenizer.fingerprint:
        raise ValueError(
            f"{other.directory} was made with another tokenizer ({b.tokenizer.fingerprint[:19]}, {b.tokenizer.vocab_size} "
            f"tokens) than {first.directory} ({a.tokenizer.fingerprint[:19]}, {a.tokenizer.vocab_size} tokens); "
            "prepare one of them again"
        )
    if (a.prepend_bos, a.append_eos) != (b.prepend_bos, b.append_eos):
        raise ValueError(
            f"{other.directory} has prepend_bos={b.prepend_bos}, append_eos={b.append_eos}, and {first.directory} has "
            f"prepend_bos={a.prepend_bos}, append_eos={a.append_eos}; prepare one of them again"
        )


def _check_held_out(train: TokenDataset, validation: TokenDataset) -> None:
    """Raise ValueError where by their manifests one is the other, or no hash of file and row divided documents between them."""
    a, b = train.manifest, validation.manifest
    problem = None
    if a.fingerprint == b.fingerprint:
        problem = "the same tokens"
    elif (a.split, b.split) == ("validation", "train"):
        problem = "a validation split to train on, and a train split to validate on"
    elif a.name == b.name and "holdout" in {**a.settings, **b.settings}:
        shares = [manifest.settings.get("holdout", 0) for manifest in (a, b)]
        if shares[0] != shares[1]:
            problem = f"prepared with --holdout {shares[0]} and {shares[1]}: documents may be in both"
        elif {shard.source_file for shard in a.shards}.isdisjoint(shard.source_file for shard in b.shards):
            problem = (
                f"prepared from other folders ({a.shards[0].source_file}, {b.shards[0].source_file}), and a document is held "
                "out by its path below --input"
            )
    if problem is not None:
        raise ValueError(
            f"{train.directory} and {validation.directory} are {problem}. Validation would say nothing: prepare both splits "
            "with the same --input and --holdout, or leave validation out"
        )


def make_mixture(sources: list[Source], config: DataConfig, seed: int, global_batch_size: int) -> Mixture:
    """The order over opened sources. The permutations hang on the seed and on what the shards hold, not on paths or names."""
    lengths = [source.train.num_sequences(config.seq_len) for source in sources]
    base = {
        entry.name: length if entry.weight is None else entry.weight for entry, length in zip(config.sources, lengths)
    }
    stages = [
        Stage(1, _shares(base, sources)),
        *(Stage(s.first_step, _shares(s.weights, sources)) for s in config.stages),
    ]
    prints = [source.train.manifest.fingerprint for source in sources]
    # A dataset that stands twice in the mixture is shuffled in two ways: its number among its equals makes the difference.
    keys = [f"{seed}:{one}" + (f":{n}" if (n := prints[:s].count(one)) else "") for s, one in enumerate(prints)]
    return Mixture(lengths, stages, keys, global_batch_size)


def _shares(weights: Mapping[str, float], sources: list[Source]) -> tuple[Fraction, ...]:
    # A weight's decimal digits are meant, not the nearest binary fraction: 0.7 and 0.3 are 7 and 3.
    exact = [Fraction(str(weights.get(source.name, 0))) for source in sources]
    return tuple(weight / sum(exact, Fraction(0)) for weight in exact)


MicroBatch = tuple[torch.Tensor, int]
"""Tokens, (B, T + 1) int64, and their `data_hash`."""


@dataclass
class MicroBatches:
    """One rank's micro-batches: item m is micro-step m mod grad_accum_steps of step m div grad_accum_steps + 1."""

    sources: list[Source]
    mixture: Mixture
    seq_len: int
    micro_batch_size: int
    rank: int
    world_size: int

    _kept: tuple[int, np.ndarray, np.ndarray] | None = field(default=None, init=False, repr=False)

    @cached_property
    def _dtype(self) -> np.dtype:
        return np.result_type(*(source.train.dtype for source in self.sources))

    @cached_property
    def grad_accum_steps(self) -> int:
        """Items that make up a step; whole, as `config.grad_accum_steps` has checked."""
        return self.mixture.global_batch_size // (self.micro_batch_size * self.world_size)

    def __getitem__(self, item: int) -> MicroBatch:
        """A micro-batch, (B, T + 1) int64, and its `data_hash`."""
        step, micro_step = divmod(item, self.grad_accum_steps)
        source, sequence = (part[micro_step] for part in self._step(step + 1))
        rows = np.empty((self.micro_batch_size, self.seq_len + 1), self._dtype)
        for row, s, n in zip(rows, source.tolist(), sequence.tolist()):
            self.sources[s].train.read_sequence(n, row)
        batch = rows.astype(np.int64)
        return torch.from_numpy(batch), data_hash(batch)

    def _step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rank's part of a step: source and sequence, (grad_accum_steps, B) each.

        The last one is kept, since a step's micro-batches are asked for one after the other: the order costs little when a
        whole step is permuted at once, and most of a loader's time when each micro-batch is by itself.
        """
        kept = self._kept  # which other threads may replace
        if kept is None or kept[0] != step:
            whole = self.mixture.global_batch_size
            slots = slots_of_rank(self.rank, self.world_size, step, self.micro_batch_size, whole)
            mine = np.array(slots)  # (grad_accum_steps, B) int64
            source, _, sequence = self.mixture.sequences(step, mine.ravel())
            kept = self._kept = (step, source.reshape(mine.shape), sequence.reshape(mine.shape))
        return kept[1:]


def data_hash(batch: np.ndarray) -> int:
    """A number that says which sequences a batch holds, in any order: the hashes of its parts add up to its own.

    batch: (B, T + 1) int64. The sum of the rows' 64-bit hashes, modulo 2^63. Over the ranks and micro-steps of a step it does
    not depend on how they divide it. A row's hash is the sum of its tokens times fixed random weights, one a place, modulo
    2^64 (multilinear hashing: Carter and Wegman, 1979), mixed. A sha256 would take a third of the time of the loader.
    """
    return int(mix(np.einsum("bt,t->b", batch.view(np.uint64), _weights(batch.shape[1]))).sum()) % 2**63


def data_hash_in_words(total: int) -> str:
    """How the log writes the sum of a step's hashes, modulo 2^64 or not: 16 hexadecimal digits."""
    return f"{total % 2**63:016x}"


@lru_cache(maxsize=2)
def _weights(length: int) -> np.ndarray:
    return mix(np.arange(1, length + 1, dtype=np.uint64) * GOLDEN)


def train_loader(
    micro_batches: MicroBatches, steps: Iterable[int], num_workers: int, device: torch.device
) -> Iterator[MicroBatch]:
    """The micro-batches of `steps` (counted from 1) in order, in pinned memory for a GPU.

    `num_workers` threads read ahead, four micro-batches each; with 0 the caller reads. Threads, since what may take long is the
    file system, which they wait for without holding the interpreter; the rest costs little: two of them give 30,000 or more
    sequences of 2,049 tokens a second, and a GPU takes 50. Processes would have to be forked from one that has threads and a
    CUDA context, which can hang, and would hand their batches over in shared memory.
    """

    def read(item: int) -> MicroBatch:
        batch, its_hash = micro_batches[item]
        return (batch.pin_memory() if device.type == "cuda" else batch), its_hash

    of_a_step = micro_batches.grad_accum_steps
    items = (item for step in steps for item in range((step - 1) * of_a_step, step * of_a_step))
    return _read_ahead(read, items, num_workers, device) if num_workers else map(read, items)


_AHEAD = 4
"""What each thread of the loader reads ahead (micro-batches)."""


def _read_ahead(
    read: Callable[[int], MicroBatch], items: Iterable[int], threads: int, device: torch.device
) -> Iterator[MicroBatch]:
    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread's own; pinning would otherwise open a context on GPU 0

    items = iter(items)
    pool = ThreadPoolExecutor(threads, "loader", begin)
    try:
        ahead = deque(pool.submit(read, item) for item in islice(items, _AHEAD * threads))
        while ahead:
            batch = ahead.popleft().result()
            if (item := next(items, None)) is not None:
                ahead.append(pool.submit(read, item))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
