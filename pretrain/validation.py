"""Validation: the loss on each source's own split and on each of `validation.sets`, and what it is to be compared with."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn

from data_prep.shard import TOKENIZER_DIR, TokenDataset, token_bytes
from pretrain import data, ranks
from pretrain.mixture import Mixture
from pretrain.ops import IGNORE_INDEX
from pretrain.sections import ValidationConfig
from pretrain.watchdog import at


@torch.no_grad()
def losses(
    fabric: Fabric,
    model: nn.Module,
    datasets: data.Sets,
    seq_len: int,
    config: ValidationConfig,
    micro_batch_size: int,
) -> dict[str, float]:
    """Mean cross-entropy over each dataset's tokens, on all ranks together, in nats, by name; called by all ranks.

    The same sequences count whatever the number of ranks and the micro-batch.
    """
    result = {}
    for name, dataset in datasets.items():
        total = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # loss x sequences, sequences
        for batch, counted in micro_batches(
            dataset, seq_len, config.max_sequences, micro_batch_size, fabric.global_rank, fabric.world_size
        ):
            at(f"validation on {name}")
            batch = batch.to(fabric.device)
            targets = batch[:, 1:].clone()
            targets[max(counted, 1) :] = IGNORE_INDEX  # a rank with nothing left goes along, its loss times 0
            loss = model(batch[:, :-1], targets).double()
            total += torch.stack((loss * counted, torch.full_like(loss, counted)))
        # By gloo, as every figure: for two numbers NCCL would keep a communicator of all ranks and its buffers to the end.
        loss_sum, sequences = ranks.all_reduce_sum(total.cpu()).tolist()
        result[name] = loss_sum / sequences
    return result


def micro_batches(
    dataset: TokenDataset, seq_len: int, max_sequences: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """One rank's share of the validation sequences: micro-batches (B, T + 1) int64 and how many of their rows count.

    Every rank gets the same number of micro-batches of the same shape, since they forward together; rows that fill up a
    batch stand after those that count.
    """
    indices = _indices(dataset, seq_len, max_sequences)
    stride = world_size * micro_batch_size
    for first in range(rank * micro_batch_size, -(-len(indices) // stride) * stride, stride):
        mine = indices[first : first + micro_batch_size]
        filled = np.concatenate([mine, np.full(micro_batch_size - len(mine), indices[0])])
        yield torch.from_numpy(dataset.sequences(filled, seq_len)), len(mine)


def describe_sources(
    sources: list[data.Source], mixture: Mixture, step: int, seq_len: int, config: ValidationConfig
) -> dict[str, dict[str, Any]]:
    """What the run's first line of metrics says of each source: share, sizes, and the entropy that a model must beat."""
    described = {}
    for source, share in zip(sources, mixture.shares_at(step)):
        described[source.name] = {
            "share": float(share),
            "train_tokens": source.train.num_tokens,
            "train_sequences": source.train.num_sequences(seq_len),
            "documents": source.train.manifest.documents,
            **_describe_validated(source.validation, seq_len, config),
        }
    return described


def describe_sets(sets: data.Sets, seq_len: int, config: ValidationConfig) -> dict[str, dict[str, Any]]:
    """The same of each of `validation.sets`, which have no share and nothing to train on."""
    return {
        name: {"documents": one.manifest.documents, **_describe_validated(one, seq_len, config)}
        for name, one in sets.items()
    }


def _describe_validated(dataset: TokenDataset | None, seq_len: int, config: ValidationConfig) -> dict[str, Any]:
    measures: dict[str, float | None] = {"unigram_entropy": None, "bytes_per_token": None}
    if dataset is not None and config.every_steps > 0:
        measures = measure(dataset, seq_len, config.max_sequences)
    return {"validation_tokens": dataset.num_tokens if dataset is not None else 0, **measures}


def measure(dataset: TokenDataset, seq_len: int, max_sequences: int) -> dict[str, float | None]:
    """What the losses on it are to be held against, over the tokens that validation predicts.

    unigram_entropy: that of the tokens, each for itself, in nats: the loss of the best model without context. bytes_per_token:
    the text's, in UTF-8, over all tokens, BOS and EOS too; None where the tokenizer does not tell.
    """
    counts = np.zeros(dataset.manifest.tokenizer.vocab_size, dtype=np.int64)
    lengths = token_bytes.of(dataset.directory / TOKENIZER_DIR / "tokenizer.json", len(counts))
    begins_after, size = dataset.manifest.begins_after, 0
    with ThreadPoolExecutor(16) as pool:  # what takes long is the file system
        for rows in pool.map(
            lambda i: dataset.sequences([i], seq_len), _indices(dataset, seq_len, max_sequences).tolist()
        ):
            counts += np.bincount(rows[0, 1:], minlength=len(counts))
            size += 0 if lengths is None else lengths.count(rows[0], begins_after)
    p = counts[counts > 0] / counts.sum()
    entropy = float(-(p * np.log(p)).sum())
    return {"unigram_entropy": entropy, "bytes_per_token": size / int(counts.sum()) if size else None}


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats a token as bits a byte of text, which does not depend on the tokenizer."""
    return loss / math.log(2) / bytes_per_token


def _indices(dataset: TokenDataset, seq_len: int, max_sequences: int) -> np.ndarray:
    """The sequences that validation looks at: at most `max_sequences`, spread evenly over the split; int64."""
    available = dataset.num_sequences(seq_len)
    count = min(available, max_sequences)
    return np.arange(count, dtype=np.int64) * available // count
