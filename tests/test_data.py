"""The order of the data: exact shares, coverage, disjointness, and nothing but its five arguments."""

import os
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shard import Manifest, TokenDataset
from pretrain import data, validation
from pretrain.sections import DataConfig, SourceConfig


def make_mixture(lengths: list[int], weights: list[int], batch: int, seed: int = 1) -> data.Mixture:
    keys = [f"{seed}:{s}" for s in range(len(lengths))]
    return data.Mixture(lengths, [data.Stage(1, shares(weights))], keys, batch)


def shares(weights: list[int]) -> tuple[Fraction, ...]:
    return tuple(Fraction(w, sum(weights)) for w in weights)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(length: int, key: int, epoch: int) -> None:
    position = np.arange(length)
    image = data.permute(position, length, key, np.full(length, epoch))
    assert np.array_equal(np.sort(image), position)
    some = position[:: max(1, length // 7)]  # one by one it is the same as all at once
    assert np.array_equal(data.permute(some, length, key, np.full(len(some), epoch)), image[some])


def test_epochs_and_keys_give_unrelated_permutations() -> None:
    n = 50_000
    position = np.arange(n)
    images = [data.permute(position, n, key, np.full(n, epoch)) for key in (1, 2) for epoch in (0, 1, 2)]
    for i, a in enumerate(images):
        # Neighbours are not correlated: the serial correlation of a random permutation is about 1 / sqrt(n).
        assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 5 / np.sqrt(n)
        assert abs(np.corrcoef(a, position)[0, 1]) < 5 / np.sqrt(n)
        assert np.sum(a == position) < 12  # a random permutation has one fixed point on average
        for b in images[:i]:
            assert np.sum(a == b) < 12
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    batch=st.integers(100, 400),
    step=st.integers(1, 10**6),
)
def test_shares_are_exact_and_never_drift(weights: list[int], batch: int, step: int) -> None:
    mixture = make_mixture([1000] * len(weights), weights, batch)
    before, after = mixture.drawn(step - 1), mixture.drawn(step)
    assert sum(after) == step * batch
    for taken, earlier, weight in zip(after, before, weights):
        due = Fraction(weight, sum(weights)) * batch
        assert abs(taken - due * step) <= 1
        assert abs((taken - earlier) - due) < 2


def test_seven_to_three_is_716_or_717_of_1024_in_every_step() -> None:
    mixture = make_mixture([9999, 7777], [7, 3], 1024)
    counts = Counter(int((mixture.sequences(step)[0] == 0).sum()) for step in range(1, 201))
    assert set(counts) == {716, 717}
    assert counts[717] / 200 == pytest.approx(0.8, abs=0.01)  # 716.8 on average


def test_decimal_weights_are_taken_by_their_digits(datasets: Path) -> None:
    def drawn(a: float, b: float) -> list[int]:
        entries = [SourceConfig(n, str(datasets / n / "train"), w) for n, w in (("a", a), ("b", b))]
        config = DataConfig(seq_len=32, sources=entries)
        return data.make_mixture(data.open_sources(config, 320), config, 1, 5).drawn(123_457)

    assert drawn(0.7, 0.3) == drawn(7, 3) == drawn(70, 30)


def test_stages_change_the_mixture_and_stay_a_pure_function() -> None:
    """Three sources: the third is warmed in at step 11, the first leaves at step 21; shares stay exact, epochs go on."""
    weights = {1: [7, 3, 0], 11: [6, 3, 1], 21: [0, 1, 1]}
    stages = [data.Stage(first, shares(w)) for first, w in weights.items()]
    lengths, batch = [300, 150, 40], 30
    mixture = data.Mixture(lengths, stages, ["a", "b", "c"], batch)
    due = [Fraction(0)] * 3
    sequences: list[list[tuple[int, int]]] = [[], [], []]
    for step in range(1, 31):
        now = shares(weights[max(first for first in weights if first <= step)])
        due = [d + share * batch for d, share in zip(due, now)]
        assert all(abs(taken - d) <= (1 if step < 21 else 1.5) for taken, d in zip(mixture.drawn(step), due))
        source, epoch, sequence = mixture.sequences(step)
        for s in range(3):
            count = int((source == s).sum())
            assert abs(count - now[s] * batch) < 2
            assert count > 0 or now[s] == 0
            sequences[s] += zip(epoch[source == s].tolist(), sequence[source == s].tolist())
    for s, length in enumerate(lengths):
        drawn = sequences[s]
        assert len(drawn) == mixture.drawn(30)[s] == len(set(drawn)), "a sequence twice in an epoch"
        epochs = [epoch for epoch, _ in drawn]
        assert epochs == sorted(epochs)
        assert epochs[-1] == (len(drawn) - 1) // length
    first = data.Mixture(lengths, stages[:1], ["a", "b", "c"], batch)
    assert all(np.array_equal(a, b) for a, b in zip(first.sequences(10), mixture.sequences(10))), "earlier steps stay"


@settings(max_examples=60, deadline=None)
@given(
    stages=st.lists(st.lists(st.integers(1, 20), min_size=4, max_size=4), min_size=1, max_size=6),
    joins=st.integers(1, 6),
    length=st.integers(1, 5),
    batch=st.integers(80, 130),
)
def test_no_source_drifts_by_more_than_one_however_often_the_weights_change(
    stages: list[list[int]], joins: int, length: int, batch: int
) -> None:
    """The fourth source joins with some stage."""
    weights = [[*w[:3], w[3] if number >= joins else 0] for number, w in enumerate(stages)]
    plan = [data.Stage(1 + number * length, shares(w)) for number, w in enumerate(weights)]
    mixture = data.Mixture([1000] * 4, plan, list("abcd"), batch)
    due, before = [Fraction(0)] * 4, [0] * 4
    for step in range(1, len(stages) * length + 20):
        due = [d + share * batch for d, share in zip(due, mixture.shares_at(step))]
        drawn = mixture.drawn(step)
        assert sum(drawn) == step * batch
        assert all(abs(taken - d) <= 1 for taken, d in zip(drawn, due))
        assert all(b <= a for a, b in zip(drawn, before))
        assert mixture.shares_at(step)[3] or drawn[3] == 0
        before = drawn


@settings(max_examples=60, deadline=None)
@given(
    stages=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any), min_size=1, max_size=8),
    batch=st.integers(40, 70),
)
def test_sources_that_leave_and_come_back_leave_the_others_little(stages: list[list[int]], batch: int) -> None:
    plan = [data.Stage(1 + 3 * number, shares(w)) for number, w in enumerate(stages)]
    mixture = data.Mixture([1000] * 4, plan, list("abcd"), batch)
    due, before, left = [Fraction(0)] * 4, [0] * 4, Fraction(0)
    for step in range(1, 3 * len(stages) + 5):
        now = mixture.shares_at(step)
        taking = [s for s in range(4) if now[s]]
        if step % 3 == 1:
            left = sum((due[s] - before[s] for s in taking), Fraction(0)) / len(taking)
        due = [d + share * batch for d, share in zip(due, now)]
        drawn = mixture.drawn(step)
        assert sum(drawn) == step * batch
        assert all(abs(drawn[s] - due[s] + left) <= 1 for s in taking)
        assert all(drawn[s] >= before[s] if now[s] else drawn[s] == before[s] for s in range(4))
        before = drawn


def test_two_sources_have_floor_or_ceiling_in_every_step_of_every_stage() -> None:
    stages = [data.Stage(1 + 7 * n, shares(w)) for n, w in enumerate([[7, 3], [2, 1], [1, 6], [7, 3], [5, 8]])]
    mixture = data.Mixture([1000] * 2, stages, ["a", "b"], 64)
    due = Fraction(0)
    for step in range(1, 60):
        share = mixture.shares_at(step)[0] * 64
        due += share
        assert abs(mixture.drawn(step)[0] - due) <= Fraction(1, 2)
        difference = abs(mixture.drawn(step)[0] - mixture.drawn(step - 1)[0] - share)
        assert difference < 1 or (difference == 1 and step % 7 == 1)


def test_without_weights_each_sequence_is_as_likely(datasets: Path) -> None:
    config = DataConfig(seq_len=32, sources=[SourceConfig(n, str(datasets / n / "train")) for n in "ab"])
    sources = data.open_sources(config, 320)
    lengths = [source.train.num_sequences(32) for source in sources]
    assert lengths[0] != lengths[1]
    assert data.make_mixture(sources, config, 1, 64).drawn(sum(lengths)) == [64 * length for length in lengths]


def test_every_sequence_once_an_epoch() -> None:
    lengths, batch = [140, 60], 20
    mixture = make_mixture(lengths, [7, 3], batch)
    seen: dict[tuple[int, int], list[int]] = {}
    for step in range(1, 31):  # 14 and 6 a step: 3 epochs of each
        for s, epoch, sequence in zip(*mixture.sequences(step)):
            seen.setdefault((int(s), int(epoch)), []).append(int(sequence))
    assert sorted(seen) == [(s, e) for s in (0, 1) for e in (0, 1, 2)]
    for (s, _), sequences in seen.items():
        assert sorted(sequences) == list(range(lengths[s]))
    assert seen[0, 0] != seen[0, 1]


def test_a_million_positions_are_disjoint_spread_and_unrelated() -> None:
    """979 steps of 1,024, by four ranks' slots: 2.3 epochs of the first source, less than one of the second."""
    lengths, weights, steps, batch = (300_007, 900_001), [7, 3], 979, 1024
    mixture = make_mixture(list(lengths), weights, batch)
    ranks = [np.arange(batch).reshape(-1, 4, 8)[:, rank].ravel() for rank in range(4)]
    drawn = [
        np.concatenate([mixture.sequences(step, slots) for slots in ranks], axis=1) for step in range(1, steps + 1)
    ]
    whole = [mixture.sequences(step) for step in range(1, steps + 1)]
    for step, (source, _, _) in enumerate(drawn, start=1):
        assert (source == 0).sum() in (716, 717), step
    source, epoch, sequence = np.concatenate(drawn, axis=1)
    assert len(source) == steps * batch > 1_000_000
    assert abs((source == 0).sum() - Fraction(7, 10) * steps * batch) <= 1
    for s, length in enumerate(lengths):
        mine, epochs = sequence[source == s], epoch[source == s]
        for e in range(epochs.max() + 1):
            of_epoch = mine[epochs == e]  # no rank has what another has
            assert len(np.unique(of_epoch)) == len(of_epoch) == (length if e < epochs.max() else len(of_epoch))
            assert of_epoch.mean() == pytest.approx(length / 2, abs=5 * length / np.sqrt(12 * len(of_epoch)))
        in_order = np.concatenate([sequences[sources == s] for sources, _, sequences in whole])
        for lag in (1, 2, 7, 1024):
            correlation = np.corrcoef(in_order[:-lag], in_order[lag:])[0, 1]
            assert abs(correlation) < 5 / np.sqrt(len(in_order)), lag
    assert set(epoch[source == 0]) == {0, 1, 2}


def test_any_step_is_reached_at_once_and_alike() -> None:
    mixture = make_mixture([500_000_000, 140_000_000], [7, 3], 1024)  # 1.3T tokens of 2,048
    source, epoch, sequence = mixture.sequences(1_000_000)
    again = make_mixture([500_000_000, 140_000_000], [7, 3], 1024).sequences(1_000_000)
    assert all(np.array_equal(a, b) for a, b in zip((source, epoch, sequence), again))
    assert epoch[source == 0].tolist() == [1] * int((source == 0).sum())
    assert set(epoch[source == 1]) == {2}


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
    assert data.fingerprint(whole.numpy()[::-1]) == fingerprint
    assert data.fingerprint(np.roll(whole.numpy(), 1)) != fingerprint


def test_every_micro_batch_sees_the_mixture() -> None:
    mixture = make_mixture([99_999, 77_777], [7, 3], 1024)
    source = mixture.sequences(77)[0]
    from_first = (source.reshape(-1, 8) == 0).sum(axis=1)
    assert set(from_first) <= {5, 6}


def test_workers_do_not_change_the_order(datasets: Path) -> None:
    entries = [SourceConfig("a", str(datasets / "a" / "train"))]
    config = DataConfig(seq_len=32, sources=entries)
    sources = data.open_sources(config, 320)
    batches = data.MicroBatches(sources, data.make_mixture(sources, config, 5, 8), 32, 4, 0, 1)

    def read(workers: int, first: int) -> list[bytes]:
        return [
            batch.numpy().tobytes() for batch, _ in data.train_loader(batches, first, 9, workers, torch.device("cpu"))
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
    loader = data.train_loader(batches, step, step + 1_000, threads, torch.device("cpu"))
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
    assert validation.unigram_entropy(dataset, 10, 10**6) == pytest.approx(-(p * np.log(p)).sum())
    assert validation.unigram_entropy(dataset, 10, 10**6) < np.log(VOCAB_SIZE)


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
