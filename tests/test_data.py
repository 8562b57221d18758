"""Ranks, micro-batches and workers only divide the steps; sources that do not fit together are refused."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, write_dataset
from test_mixture import make_mixture

from data_prep.shard import Manifest, TokenDataset
from pretrain import data, validation
from pretrain.sections import DataConfig, SourceConfig


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 24), (2, 3), (4, 2), (1, 4), (8, 3)])
def test_ranks_and_micro_batches_only_divide_a_step(datasets: Path, world_size: int, micro_batch: int) -> None:
    entries = [SourceConfig(n, str(datasets / n / "train"), w) for n, w in (("a", 7.0), ("b", 3.0))]
    config = DataConfig(seq_len=32, sources=entries)
    sources = data.open_sources(config, 320)
    mixture = data.make_mixture(sources, config, 5, 24)
    source, _, sequence = mixture.sequences(3)
    expected = Counter(
        sources[s].train.sequences(np.array([i]), 32).tobytes() for s, i in zip(source.tolist(), sequence.tolist())
    )
    got: Counter[bytes] = Counter()
    fingerprints = 0
    for rank in range(world_size):
        batches = data.MicroBatches(sources, mixture, 32, micro_batch, rank, world_size)
        a = batches.grad_accum_steps
        for item in range(2 * a, 3 * a):
            batch, part = batches[item]
            fingerprints += part
            assert batch.shape == (micro_batch, 33)
            got.update(row.tobytes() for row in batch.numpy())
    assert got == expected
    whole, fingerprint = data.MicroBatches(sources, mixture, 32, 24, 0, 1)[2]
    assert fingerprints % 2**63 == fingerprint
    assert data.data_hash(whole.numpy()[::-1]) == fingerprint
    assert data.data_hash(np.roll(whole.numpy(), 1)) != fingerprint


def ranks_sources(weights: list[int], world_size: int, micro_batch: int, whole: int, step: int) -> np.ndarray:
    """The number of each sequence's source as the loader of each rank has them, (ranks, micro-steps, B)."""
    mixture = make_mixture([99_999, 77_777], weights, whole)
    loaders = [data.MicroBatches([], mixture, 32, micro_batch, rank, world_size) for rank in range(world_size)]
    return np.array([loader._step(step)[0] for loader in loaders])


def test_every_micro_batch_sees_the_mixture() -> None:
    for world_size in (1, 4, 16):
        from_first = (ranks_sources([7, 3], world_size, 8, 1024, 77) == 0).sum(axis=2)
        assert set(from_first.ravel().tolist()) <= {5, 6}


@pytest.mark.parametrize(
    ("weights", "world_size", "micro_batch", "whole"),
    [([1, 1], 2, 1, 1024), ([3, 1], 2, 2, 1024), ([7, 1], 4, 2, 1024), ([9, 1], 2, 5, 960), ([7, 3], 5, 2, 960)],
)
def test_every_rank_sees_the_mixture_though_its_period_is_the_ranks(
    weights: list[int], world_size: int, micro_batch: int, whole: int
) -> None:
    """In each step, by four standard deviations of a rank's share if it were drawn."""
    share = weights[1] / sum(weights)
    for step in (1, 2, 77, 10**6):
        sources = ranks_sources(weights, world_size, micro_batch, whole, step)
        assert abs((sources == 1).sum() - whole * share) <= 1
        of_ranks = (sources == 1).mean(axis=(1, 2))
        assert np.abs(of_ranks - share).max() < 4 * np.sqrt(share * (1 - share) / (whole // world_size))


def test_workers_do_not_change_the_order(datasets: Path) -> None:
    entries = [SourceConfig("a", str(datasets / "a" / "train"))]
    config = DataConfig(seq_len=32, sources=entries)
    sources = data.open_sources(config, 320)
    batches = data.MicroBatches(sources, data.make_mixture(sources, config, 5, 8), 32, 4, 0, 1)

    def read(workers: int, first: int) -> list[bytes]:
        return [
            batch.numpy().tobytes()
            for batch, _ in data.train_loader(batches, range(first, 10), workers, torch.device("cpu"))
        ]

    straight = read(0, 1)
    assert len(straight) == 18
    assert read(2, 1) == straight
    assert read(2, 6) == straight[10:]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_loader_begins_at_any_step_and_reads_nothing_of_those_before(
    threads: int, datasets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of step 1,000,000, two micro-batches of four, the first is had for reading it, and what threads read ahead."""
    config = DataConfig(seq_len=32, sources=[SourceConfig("a", str(datasets / "a" / "train"))])
    sources = data.open_sources(config, 320)
    mixture = data.make_mixture(sources, config, 5, 8)
    step, B = 1_000_000, 4
    first = sources[0].train.sequences(mixture.sequences(step, slice(0, B))[2], 32).tolist()
    read: list[int] = []
    real = TokenDataset.read_sequence

    def noted(dataset: TokenDataset, number: int, row: np.ndarray) -> None:
        read.append(number)
        real(dataset, number, row)

    monkeypatch.setattr(TokenDataset, "read_sequence", noted)
    batches = data.MicroBatches(sources, mixture, 32, B, 0, 1)
    loader = data.train_loader(batches, range(step, step + 1_001), threads, torch.device("cpu"))
    batch, _ = next(loader)
    assert batch.tolist() == first
    assert B <= len(read) <= (1 + data._AHEAD * threads) * B  # this micro-batch, and those that come next


def test_one_rank_of_a_node_asks_for_the_sizes_of_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it finds wrong ends the job; a file that is cut short later is an error for whoever reads it."""
    source = SourceConfig("a", str(write_dataset(tmp_path / "d", 3_000, 3)))
    shard = tmp_path / "d" / TokenDataset(tmp_path / "d").manifest.shards[0].path
    os.truncate(shard, shard.stat().st_size - 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="cut short"):
        data.open_sources(DataConfig(seq_len=32, sources=[source]), VOCAB_SIZE)
    monkeypatch.setenv("LOCAL_RANK", "1")
    asked: list[object] = []
    with monkeypatch.context() as counted:
        counted.setattr(os, "lstat", asked.append)
        (opened,) = data.open_sources(DataConfig(seq_len=32, sources=[source]), VOCAB_SIZE)
    assert not asked
    with pytest.raises(OSError, match="cut short"):
        opened.train.sequences(np.arange(opened.train.num_sequences(32)), 32)


def test_validation_counts_each_sequence_once_on_any_number_of_ranks(datasets: Path) -> None:
    dataset = TokenDataset(datasets / "a" / "validation")
    assert dataset.num_sequences(32) == 31
    whole = Counter(dataset.sequences(np.arange(31), 32)[i].tobytes() for i in range(31))
    for world_size in (1, 2, 3, 50):
        counted: Counter[bytes] = Counter()
        lengths = set()
        for rank in range(world_size):
            batches = list(validation.micro_batches(dataset, 32, 1000, 4, rank, world_size))
            lengths.add(len(batches))
            for batch, count in batches:
                assert batch.shape == (4, 33)
                counted.update(row.tobytes() for row in batch.numpy()[:count])
        assert len(lengths) == 1, "ranks forward together"
        assert counted == whole


def test_unigram_entropy_of_known_tokens(tmp_path: Path) -> None:
    dataset = TokenDataset(write_dataset(tmp_path / "d", 3_000, 3))
    tokens = dataset.sequences(np.arange(dataset.num_sequences(10)), 10)[:, 1:].ravel()
    p = np.bincount(tokens)[np.bincount(tokens) > 0] / len(tokens)
    assert validation.measure(dataset, 10, 10**6)["unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum())
    assert validation.measure(dataset, 10, 10**6)["unigram_entropy"] < np.log(VOCAB_SIZE)


def open_two(a: Path, b: Path, seq_len: int = 32, vocab_size: int = 320) -> None:
    data.open_sources(DataConfig(seq_len, sources=[SourceConfig("a", str(a)), SourceConfig("b", str(b))]), vocab_size)


def test_what_does_not_fit_is_refused_with_the_numbers(datasets: Path, tmp_path: Path) -> None:
    good = datasets / "a" / "train"
    with pytest.raises(ValueError, match="another tokenizer"):
        open_two(good, write_dataset(tmp_path / "other", 500, 1, tokenizer="b"))
    with pytest.raises(ValueError, match="append_eos=False"):
        open_two(good, write_dataset(tmp_path / "policy", 500, 1, append_eos=False))
    with pytest.raises(ValueError, match=r"500 tokens are not enough .* 601"):
        open_two(good, write_dataset(tmp_path / "short", 500, 1), seq_len=600)
    with pytest.raises(ValueError, match=r"300 tokens and model.vocab_size is 299"):
        open_two(good, good, vocab_size=299)
    with pytest.raises(FileNotFoundError):
        open_two(good, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"0\.800 sequences a step.* 8 to at least 10"):
        make_mixture([10, 10], [9, 1], 8)


def test_validation_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    """As far as the manifests can tell: the same tokens, splits given the wrong way round, documents told apart differently."""

    def dataset(name: str, seed: int, split: str = "train", **settings: object) -> Path:
        folder = write_dataset(tmp_path / name, 500, seed)
        replace(Manifest.load(folder), name="text", split=split, settings=settings).save(folder)
        return folder

    def opened(train: Path, validation: Path) -> None:
        data.open_sources(DataConfig(32, sources=[SourceConfig("a", str(train), validation=str(validation))]), 320)

    train, held_out = dataset("t", 0, holdout=0.01), dataset("v", 1, "validation", holdout=0.01)
    opened(train, held_out)
    opened(dataset("t0", 0), dataset("v0", 1))  # packed by others, each under the name of train
    with pytest.raises(ValueError, match="are the same tokens"):
        opened(train, train)
    with pytest.raises(ValueError, match="a validation split to train on"):
        opened(held_out, train)
    with pytest.raises(ValueError, match=r"--holdout 0\.01 and 0\.05"):
        opened(train, dataset("other", 1, "validation", holdout=0.05))
    with pytest.raises(ValueError, match=r"--holdout 0 and 0\.01"):
        opened(dataset("all", 0), held_out)
    manifest = Manifest.load(held_out)
    moved = [replace(shard, source_file=f"below/{shard.source_file}") for shard in manifest.shards]
    replace(manifest, shards=tuple(moved)).save(held_out)
    with pytest.raises(ValueError, match=r"from other folders \(part-0.txt, below/part-0.txt\)"):
        opened(train, held_out)


def test_an_id_beyond_the_vocabulary_is_named(datasets: Path, tmp_path: Path) -> None:
    signs: list[None] = []
    assert TokenDataset(datasets / "a" / "train").check(alive=lambda: signs.append(None)) is None
    assert signs, "while it reads"
    lying = TokenDataset(write_dataset(tmp_path / "d", 3_000, 3, vocab_size=290))
    assert "ids from 0 to 299, not all in a vocabulary of 290" in str(lying.check())
    assert "part-2.npy" in str(lying.check(share=(2, 3)))
