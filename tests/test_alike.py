"""Ranks that were not started alike are refused, and what fails at one rank's start ends all of them in one line."""

import errno
import os
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fault_runs
import pytest
from conftest import write_dataset
from forks import finish, start_training

from data_prep.shard import TokenDataset
from pretrain import checkpoint, config, preparation, scheduler, versions
from pretrain.sections import RopeScaling, ValidationSet

ROOT = Path(__file__).parent.parent
Outcome = Callable[[Callable[[int, config.Config], None]], str]


@pytest.fixture
def outcome(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Outcome:
    """What two ranks say, who must be refused alike, when a function was called in each with its rank and the settings."""
    return lambda before: _refused(tmp_path, before, capfd)


def _refused(folder: Path, before: Callable[[int, config.Config], None], capfd: pytest.CaptureFixture[str]) -> str:
    settings = fault_runs.at(fault_runs.make_settings(fault_runs.make_data(folder / "data"), folder), folder / "run")
    statuses = finish(start_training(2, settings, lambda rank: before(rank, settings)))
    said = Path(settings.run_dir, "output.txt").read_text() + capfd.readouterr().err
    assert statuses == [2, 2], said
    assert "Traceback" not in said
    assert not list(Path(settings.run_dir).glob("crash-report*"))
    return said


def other_rate(settings: config.Config) -> config.Config:
    return replace(settings, optim=replace(settings.optim, max_lr=0.123))


def other_micro_batch(settings: config.Config) -> config.Config:
    """Which would have the ranks wait for each other for ever."""
    return replace(settings, train=replace(settings.train, micro_batch_size=settings.train.micro_batch_size // 2))


def other_shards(settings: config.Config) -> config.Config:
    folder = write_dataset(Path(settings.run_dir).parent / "local", 4_000, 77)
    first, *others = settings.data.sources
    return replace(settings, data=replace(settings.data, sources=[replace(first, train=str(folder)), *others]))


def other_sets(settings: config.Config) -> config.Config:
    folder = write_dataset(Path(settings.run_dir).parent / "wiki", 4_000, 78)
    sets = [ValidationSet("wiki", str(folder))]
    return replace(settings, validation=replace(settings.validation, sets=sets))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_rate, "optim.max_lr = 0.123, and rank 0 on"),
        (other_micro_batch, "train.micro_batch_size = 1, and rank 0 on"),
        (other_shards, "the shards of "),
        (other_sets, "validation.sets = ['wiki'], and rank 0 on"),
    ],
)
def test_ranks_that_were_started_unlike_do_not_train(
    tmp_path: Path, outcome: Outcome, change: Callable[[config.Config], config.Config], named: str
) -> None:
    def unlike(rank: int, settings: config.Config) -> None:
        if rank == 1:
            config.parse = lambda argv: change(settings)  # type: ignore[assignment]

    said = outcome(unlike)
    assert f"error: rank 1 on {socket.gethostname()} has {named}" in said
    assert "give all ranks the same configuration, data and code" in said
    assert not (tmp_path / "run" / "config.yaml").exists(), "before anything was written"


def test_scaling_that_rank_0_alone_has_is_named(outcome: Outcome) -> None:
    """A key whose section the other rank does not have at all."""

    def unlike(rank: int, settings: config.Config) -> None:
        if rank == 0:
            scaled = replace(settings, model=replace(settings.model, rope_scaling=RopeScaling(8.0)))
            config.parse = lambda argv: scaled  # type: ignore[assignment]

    assert f"error: rank 1 on {socket.gethostname()} has model.rope_scaling = None, and rank 0 on" in outcome(unlike)


def test_other_code_on_a_node_is_named(outcome: Outcome) -> None:
    def stale(rank: int, settings: config.Config) -> None:
        if rank == 1:
            os.environ["LOCAL_RANK"] = "0"  # of another node
            preparation.source_hash = lambda: "0123456789ab"

    assert "has the code of Cria = 0123456789ab, and rank 0 on" in outcome(stale)


def test_a_restart_tries_again_where_a_checkout_is_not_the_same_everywhere_yet(tmp_path: Path) -> None:
    settings = fault_runs.make_settings(fault_runs.make_data(tmp_path / "data"), tmp_path)

    def stale(rank: int) -> None:
        os.environ["SLURM_RESTART_COUNT"] = "1"
        if rank == 1:
            os.environ["LOCAL_RANK"] = "0"  # of another node
            preparation.source_hash = lambda: "0123456789ab"

    assert finish(start_training(2, fault_runs.at(settings, tmp_path / "run"), stale)) == [scheduler.LATER] * 2


def test_a_host_that_computes_wrongly_takes_no_checkpoint_away(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = fault_runs.make_settings(fault_runs.make_data(tmp_path / "data"), tmp_path)
    settings = fault_runs.at(settings, tmp_path / "run")
    assert finish(start_training(2, settings)) == [0, 0]
    before = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    suspected = tmp_path / "suspected"
    describe = checkpoint.describe

    def bad_memory(rank: int) -> None:
        os.environ.update(SLURMD_NODENAME=f"node{rank}", CRIA_SUSPECT=str(suspected))
        if rank == 1:
            checkpoint.describe = lambda *rest: {**describe(*rest), "sha256": "0" * 64}

    assert finish(start_training(2, settings, bad_memory)) == [2, 2]
    said = (tmp_path / "run" / "output.txt").read_text() + capfd.readouterr().err
    assert re.search(r"step-\d+, as rank 1 on node1 reads it, is corrupt .*, on node0, finds it whole", said)
    assert suspected.read_text() == "node1\n"
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == before, "nothing was set aside"
    assert finish(start_training(2, settings)) == [0, 0], "the run is at its end, and whole"


def test_what_an_editor_leaves_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emacs locks a file by a link that leads nowhere."""
    for package in ("pretrain", "data_prep"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "pretrain" / "versions.py"))
    found = versions.source_hash()
    (tmp_path / "pretrain" / ".#model.py").symlink_to("somebody@somewhere.1234:5678")
    assert versions.source_hash() == found
    with open(tmp_path / "pretrain" / "model.py", "a") as file:
        file.write("\n")
    assert versions.source_hash() != found


def test_a_shard_that_one_rank_cannot_read_at_the_start_ends_all_alike(outcome: Outcome) -> None:
    def cannot_read(rank: int, settings: config.Config) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "part-0.npy")

        if rank == 1:
            TokenDataset.check = fail  # type: ignore[method-assign]

    assert "error: rank 1: [Errno 5] Input/output error: 'part-0.npy'" in outcome(cannot_read)


def test_no_room_for_the_record_of_what_was_read_ends_all_alike(outcome: Outcome) -> None:
    def full(rank: int, settings: config.Config) -> None:
        write = preparation.write_atomically

        def fail(path: Path, content: bytes) -> None:
            if path.name == "verified.json":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(path, content)

        preparation.write_atomically = fail

    assert "No space left on device" in outcome(full)
