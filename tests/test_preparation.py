"""How a run begins: every shard is read by one rank, a stage that has begun does not change, and who saves needs room."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import pretrain, tiny_config, write_config, write_dataset

from data_prep import shard
from pretrain import bench_step, checkpoint, config, data, going_on, preparation, ranks, saver
from pretrain.__main__ import main
from pretrain.sections import DataConfig, SourceConfig

SHARDS = 60


@pytest.mark.parametrize("world", [1, 3])
def test_the_ranks_read_every_shard_once_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """In several rounds, since there are more than 16 a rank."""
    folder = write_dataset(tmp_path / "a", 600, 0, shards=SHARDS)
    sources = data.open_sources(DataConfig(32, sources=[SourceConfig("a", str(folder))]), 320)
    scan_all, rounds = shard.scan_all, []

    def noted(stretches: Iterable[Any], *rest: Any) -> Any:
        rounds.append([stretch.path.name for stretch in stretches])
        return scan_all(stretches, *rest)

    monkeypatch.setattr(shard, "scan_all", noted)
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    monkeypatch.setattr(ranks, "on_rank_0", lambda work: work())
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        preparation._verify_shards([tmp_path / f"verified-{rank}.json"], data.datasets(sources, {}), stop=None)
    assert len(rounds) > world, "there was one round"
    assert max(map(len, rounds)) <= 16
    assert Counter(name for names in rounds for name in names) == {f"part-{n}.npy": 1 for n in range(SHARDS)}


@pytest.mark.parametrize("content", ["null", "[]", "3", '"x"', "{", "[" * 100_000])
def test_a_damaged_record_of_what_was_read_has_all_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    folder = write_dataset(tmp_path / "a", 600, 0)
    sources = data.open_sources(DataConfig(32, sources=[SourceConfig("a", str(folder))]), 320)
    record, read = tmp_path / "verified.json", []
    monkeypatch.setattr(shard.TokenDataset, "check", lambda *_: read.append(1))
    for written in (content, None):
        if written is not None:
            record.write_text(written)
        preparation._verify_shards([record], data.datasets(sources, {}), stop=None)
    assert read == [1], "once, and what was found good then counts"


@pytest.mark.parametrize("how", ["--resume", "--init_from"])
def test_a_run_begun_from_another_ones_checkpoint_takes_its_word_for_the_shards(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """By whatever link the checkpoint is named; what was written since is read, and the word is kept."""
    shutil.copytree(datasets / "a", tmp_path / "a", copy_function=shutil.copy)
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 3}, optim={"warmup_steps": 1})
    tree["data"]["sources"][0] |= {split: str(tmp_path / "a" / split) for split in ("train", "validation")}
    words = ["train", "--config", str(write_config(tmp_path / "c.yaml", tree))]
    assert main(words) == 0
    (tmp_path / "best").symlink_to(tmp_path / "run" / "checkpoints" / "step-00000003")
    read: list[Path] = []
    check = shard.TokenDataset.check

    def noted(self: shard.TokenDataset, *rest: Any) -> str | None:
        read.append(self.directory)
        return check(self, *rest)

    monkeypatch.setattr(shard.TokenDataset, "check", noted)
    begin = [*words, how, str(tmp_path / "best"), "--train.max_steps", "4", "--run_dir"]
    assert main([*begin, str(tmp_path / "branch")]) == 0
    assert read == []
    assert json.loads((tmp_path / "branch" / "verified.json").read_text()).keys() >= {str(tmp_path / "a" / "train")}
    part = next((tmp_path / "a" / "train" / "shards").iterdir())
    part.write_bytes(part.read_bytes())
    assert main([*begin, str(tmp_path / "another")]) == 0
    assert read == [tmp_path / "a" / "train"]


def test_shards_that_were_replaced_are_read_again_whatever_times_the_copy_has(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a", 600, 0)
    dataset = shard.TokenDataset(folder)
    before, path = dataset.signature(of_these_files=True), folder / dataset.manifest.shards[0].path
    assert shard.TokenDataset(folder).signature(of_these_files=True) == before
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert dataset.signature(of_these_files=True) == before, "as it was opened"
    for check_files in (True, False):
        again = shard.TokenDataset(folder, check_files=check_files)
        assert again.signature(of_these_files=True) != before
    shutil.copytree(folder, tmp_path / "local")
    copies = [shard.TokenDataset(tmp_path / name).signature() for name in ("a", "local")]
    assert len(set(copies)) == 1, "doctor compares what nodes have in places of their own"


def test_a_folder_in_the_place_of_a_file_is_one_line(datasets: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "operations.json").mkdir(parents=True)
    settings = config.load(write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run")))
    with pytest.raises(OSError, match=r"operations\.json"):
        preparation.prepare(settings)


def test_a_checkpoint_of_another_version_is_refused_by_all_ranks(datasets: Path, tmp_path: Path) -> None:
    """What rank 0 alone needs of it must not end rank 0 alone: the others would wait for it."""
    tree = tiny_config(
        datasets, tmp_path / "run", train={"max_steps": 2}, optim={"warmup_steps": 1}, checkpoint={"every_steps": 1}
    )
    settings = write_config(tmp_path / "c.yaml", tree)
    assert pretrain("train", "--config", settings, "--train.max_steps", "1").returncode == 0
    folder = checkpoint.latest(tmp_path / "run", warn=print)
    state = json.loads((folder / "state.json").read_text())
    del state["operations"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = checkpoint.describe(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = pretrain("train", "--config", settings, ranks=2, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("state.json has no operations: another version of Cria wrote it") == 2, "said by both"


def test_a_stage_may_change_until_its_first_step_was_trained(datasets: Path, tmp_path: Path) -> None:
    """Of a checkpoint after step k: step k is trained, step k + 1 is not."""

    def facts(weights: dict[str, int]) -> tuple:
        tree = tiny_config(datasets, tmp_path / "run", data={"stages": [{"first_step": 10, "weights": weights}]})
        settings = config.load(write_config(tmp_path / "c.yaml", tree))
        sources = data.open_sources(settings.data, settings.model.vocab_size)
        mixture = data.make_mixture(sources, settings.data, settings.seed, settings.train.global_batch_size)
        return going_on.facts(settings, sources, {}, mixture), settings, sources

    before, (now, *rest) = facts({"a": 1, "b": 1})[0], facts({"a": 1, "b": 3})
    going_on._check_same_run(tmp_path, {"step": 9, **before}, now, *rest, say=pytest.fail)
    with pytest.raises(ValueError, match=r"mixture = .*50\.0:50\.0 from step 10 .* says .*25\.0:75\.0 from step 10"):
        going_on._check_same_run(tmp_path, {"step": 10, **before}, now, *rest, say=pytest.fail)


def test_a_benchmark_needs_no_room_for_a_checkpoint(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(total=2**30, used=2**30, free=2**20)
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: full)
    settings = config.load(write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run")))
    with pytest.raises(OSError, match=r"has 1\.0 MiB free and a checkpoint needs"):
        preparation.prepare(settings)
    assert bench_step.measure(settings, bench_step.Timing(steps=1, warmup=1))["problem"] is None
