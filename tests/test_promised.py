"""Values that are a promise to runs and datasets under way: the order of the data, its fingerprint, what is held out.

A run goes on with whatever version is installed then, and the order is not saved but computed anew. So none of these values may
ever change: another one would repeat some sequences and leave out others in the middle of a run, without a word.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_dataset

from data_prep.shard import Manifest, TokenizerInfo
from data_prep.sources import is_held_out
from pretrain import data
from pretrain.mixture import Mixture
from pretrain.permutation import permute
from pretrain.sections import DataConfig, SourceConfig, StageConfig

SEQ_LEN = 10
TOKENIZER = TokenizerInfo(f"sha256:{'a' * 64}", "sentencepiece", 300, 1, 2)
"""Manifests' digests depend on it, and no file's is the same for ever."""


@pytest.mark.parametrize(
    ("key", "epoch", "image"),
    [
        (1, 0, [3, 2, 6, 0, 8, 9, 5, 4, 1, 7]),
        (0xFEDCBA9876543210, 3, [2, 7, 4, 6, 5, 8, 3, 1, 0, 9]),
    ],
)
def test_the_permutations_are_the_promised_ones(key: int, epoch: int, image: list[int]) -> None:
    assert permute(np.arange(10), 10, key, np.full(10, epoch)).tolist() == image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets a and b of 32 and 48 sequences."""
    folder = tmp_path_factory.mktemp("promised")
    for seed, (name, sequences) in enumerate((("a", 32), ("b", 48))):
        manifest = Manifest.load(write_dataset(folder / name, sequences * SEQ_LEN + 1, seed))
        replace(manifest, tokenizer=TOKENIZER).save(folder / name)
    return folder


def mixture(
    *entries: tuple[Path, float], seed: int = 1, batch: int = 10, stages: tuple[StageConfig, ...] = ()
) -> Mixture:
    """The order as `pretrain train` makes it, of `batch` sequences a step."""
    named = [SourceConfig(f"{number}", str(train), weight) for number, (train, weight) in enumerate(entries)]
    config = DataConfig(SEQ_LEN, sources=named, stages=list(stages))
    return data.make_mixture(data.open_sources(config, 320), config, seed, batch)


def test_the_mixture_is_the_promised_one(folder: Path) -> None:
    """Step 5, in which the first source's second epoch begins."""
    a, b = (data.TokenDataset(folder / name).manifest.fingerprint for name in "ab")
    assert (a[:15], b[:15]) == ("sha256:e9def15b", "sha256:4231bdbd"), "manifests' digests are promised too"
    source, epoch, sequence = mixture((folder / "a", 0.7), (folder / "b", 0.3)).sequences(5)
    assert source.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert epoch.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 1]
    assert sequence.tolist() == [25, 43, 7, 28, 21, 21, 1, 30, 5, 14]


def test_a_stage_without_one_of_three_sources_is_the_promised_one(folder: Path) -> None:
    """It begins with step 4, where the first source has had half a sequence too many; and nothing comes out even."""
    three = ((folder / "a", 5.0), (folder / "b", 3.0), (folder / "b", 2.0))
    order = mixture(*three, batch=11, stages=(StageConfig(4, {"1": 3, "2": 2}),))
    assert [order.drawn(step) for step in range(1, 8)] == [
        [6, 3, 2],
        [11, 7, 4],
        [17, 9, 7],
        [17, 16, 11],
        [17, 23, 15],
        [17, 29, 20],
        [17, 36, 24],
    ]
    source, epoch, sequence = order.sequences(6)
    assert source.tolist() == [1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1]
    assert epoch.tolist() == [0] * 11
    assert sequence.tolist() == [36, 17, 2, 4, 39, 36, 17, 29, 22, 46, 4]


def test_half_a_sequence_goes_to_the_source_that_is_named_first(folder: Path) -> None:
    order = mixture((folder / "a", 1.0), (folder / "b", 1.0), batch=9)
    assert [order.drawn(step) for step in (1, 2, 3, 1001)] == [[5, 4], [9, 9], [14, 13], [4505, 4504]]


def test_the_fingerprint_of_a_batch_is_the_promised_one() -> None:
    assert data.data_hash(np.arange(15).reshape(3, 5)) == 1543159687772998417


def test_what_is_held_out_is_the_promised_part() -> None:
    held_out = [row for row in range(20) if is_held_out("python/train-00000-of-00059.parquet", row, 0.25)]
    assert held_out == [0, 2, 13, 15, 19]


def test_another_seed_is_another_order(folder: Path) -> None:
    one, same, other = (mixture((folder / "b", 1.0), seed=seed).sequences(1)[2].tolist() for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_dataset_that_stands_twice_in_the_mixture_is_shuffled_in_two_ways(folder: Path) -> None:
    twice = mixture((folder / "b", 0.5), (folder / "b", 0.5))
    source, _, sequence = np.concatenate([twice.sequences(step) for step in range(1, 5)], axis=1)
    first, second = (sequence[source == number].tolist() for number in (0, 1))
    assert len(first) == len(second) == 20
    assert first != second
    assert second[:5] == [12, 0, 37, 16, 39]
