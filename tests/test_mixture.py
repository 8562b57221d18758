"""The order of the data: exact shares, coverage, disjointness, and nothing but its five arguments."""

import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import data
from pretrain.mixture import Mixture, Stage
from pretrain.permutation import permute
from pretrain.sections import DataConfig, SourceConfig


def make_mixture(lengths: list[int], weights: list[int], batch: int, seed: int = 1) -> Mixture:
    keys = [f"{seed}:{s}" for s in range(len(lengths))]
    return Mixture(lengths, [Stage(1, shares(weights))], keys, batch)


def shares(weights: list[int]) -> tuple[Fraction, ...]:
    return tuple(Fraction(w, sum(weights)) for w in weights)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(length: int, key: int, epoch: int) -> None:
    position = np.arange(length)
    image = permute(position, length, key, np.full(length, epoch))
    assert np.array_equal(np.sort(image), position)
    some = position[:: max(1, length // 7)]  # one by one it is the same as all at once
    assert np.array_equal(permute(some, length, key, np.full(len(some), epoch)), image[some])


def test_epochs_and_keys_give_unrelated_permutations() -> None:
    n = 50_000
    position = np.arange(n)
    images = [permute(position, n, key, np.full(n, epoch)) for key in (1, 2) for epoch in (0, 1, 2)]
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
    stages = [Stage(first, shares(w)) for first, w in weights.items()]
    lengths, batch = [300, 150, 40], 30
    mixture = Mixture(lengths, stages, ["a", "b", "c"], batch)
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
    first = Mixture(lengths, stages[:1], ["a", "b", "c"], batch)
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
    plan = [Stage(1 + number * length, shares(w)) for number, w in enumerate(weights)]
    mixture = Mixture([1000] * 4, plan, list("abcd"), batch)
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
    plan = [Stage(1 + 3 * number, shares(w)) for number, w in enumerate(stages)]
    mixture = Mixture([1000] * 4, plan, list("abcd"), batch)
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
    stages = [Stage(1 + 7 * n, shares(w)) for n, w in enumerate([[7, 3], [2, 1], [1, 6], [7, 3], [5, 8]])]
    mixture = Mixture([1000] * 2, stages, ["a", "b"], 64)
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
    tracemalloc.start()
    mixture = make_mixture([500_000_000, 140_000_000], [7, 3], 1024)  # 1.3T tokens of 2,048
    source, epoch, sequence = mixture.sequences(1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, "no index, not a bit a sequence"
    again = make_mixture([500_000_000, 140_000_000], [7, 3], 1024).sequences(1_000_000)
    assert all(np.array_equal(a, b) for a, b in zip((source, epoch, sequence), again))
    assert epoch[source == 0].tolist() == [1] * int((source == 0).sum())
    assert set(epoch[source == 1]) == {2}
