"""Validation: the loss of each source on its own split, and what it is to be compared with."""

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from pretrain import data, ranks
from pretrain.ops import IGNORE_INDEX
from pretrain.sections import ValidationConfig
from pretrain.watchdog import at


@torch.no_grad()
def losses(
    fabric: Fabric,
    model: nn.Module,
    sources: list[data.Source],
    seq_len: int,
    config: ValidationConfig,
    micro_batch_size: int,
) -> dict[str, float]:
    """Mean cross-entropy over each source's validation tokens, on all ranks together, in nats; called by all ranks.

    The same sequences count whatever the number of ranks and the micro-batch.
    """
    result = {}
    for source in sources:
        if source.validation is None:
            continue
        total = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # loss x sequences, sequences
        for batch, counted in data.validation_batches(
            source.validation, seq_len, config.max_sequences, micro_batch_size, fabric.global_rank, fabric.world_size
        ):
            at(f"validation on {source.name}")
            batch = batch.to(fabric.device)
            targets = batch[:, 1:].clone()
            targets[max(counted, 1) :] = IGNORE_INDEX  # a rank with nothing left goes along, and counts for nothing
            loss = model(batch[:, :-1], targets).double()
            total += torch.stack((loss * counted, torch.full_like(loss, counted)))
        loss_sum, sequences = ranks.all_reduce_sum(total).tolist()
        result[source.name] = loss_sum / sequences
    return result


def describe_sources(
    sources: list[data.Source], mixture: data.Mixture, step: int, seq_len: int, config: ValidationConfig
) -> dict[str, dict[str, Any]]:
    """What the run's first line of metrics says of each source: share, sizes, and the entropy that a model must beat."""
    described = {}
    for source, share in zip(sources, mixture.shares_at(step)):
        entropy = None
        if source.validation is not None and config.every_steps > 0:
            entropy = data.unigram_entropy(source.validation, seq_len, config.max_sequences)
        described[source.name] = {
            "share": float(share),
            "train_tokens": source.train.num_tokens,
            "train_sequences": source.train.num_sequences(seq_len),
            "documents": source.train.manifest.documents,
            "validation_tokens": source.validation.num_tokens if source.validation is not None else 0,
            "unigram_entropy": entropy,
        }
    return described
