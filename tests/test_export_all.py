"""`pretrain export --all`: repeated while the run goes on, each checkpoint is exported once, whole or not at all."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import fork_ranks
from hf_folder import TINY, make_model, weights_of, write_run

from data_prep.shard import folder_fingerprint
from pretrain import back, checkpoint, export, folder, hf, saver, snapshot
from pretrain.lock import Lock
from pretrain.sections import CheckpointConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    write_run(run_dir, TINY, (9, 10, 12))
    return run_dir


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "exports"


def export_all(run: Path, out: Path, *more: str) -> int:
    """The command's exit status."""
    try:
        export.main([str(run), "--all", "--out", str(out), *more])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def of_step(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def names(out: Path) -> list[str]:
    """What lies there, without the lock."""
    return sorted(set(os.listdir(out)) - {".lock"})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def inodes(out: Path) -> dict[str, tuple[int, int]]:
    """Of every file: another one where it has been written anew."""
    found = {path: path.stat() for path in out.rglob("*") if path.name != ".lock"}
    return {str(path): (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def damage(folder: Path, file: str = "tensors/__0_0.distcp") -> None:
    damaged = bytearray((folder / file).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / file).write_bytes(damaged)


def test_each_is_exported_once_and_as_it_is_alone(
    run: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(of_step(run, 12), tmp_path / "later")
    assert export_all(run, out, "--check") == 0
    said = capsys.readouterr().out
    assert names(out) == ["step-00000009", "step-00000010"]
    assert [line.split(":")[0] for line in said.splitlines()] == [f"{out}/{name}" for name in names(out)] + [str(out)]
    assert said.endswith(f"{out}: 2 written, 0 were there\n")
    before = inodes(out)

    assert export_all(run, out) == 0
    assert capsys.readouterr().out == f"{out}: 0 written, 2 were there\n"
    assert inodes(out) == before, "the second time writes nothing"

    shutil.move(tmp_path / "later", of_step(run, 12))
    shutil.rmtree(of_step(run, 9))  # the run has gone on
    assert export_all(run, out) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}/step-00000012: ")
    assert said.endswith(f"{out}: 1 written, 1 were there\n")
    assert inodes(out).items() > before.items(), "what was there stays, and what the run has deleted, too"
    for step in (10, 12):
        export.main([str(run), "--step", str(step), "--out", str(tmp_path / "alone")])
        assert content(tmp_path / "alone") == content(out / f"step-{step:08d}")


@pytest.mark.parametrize("file", ["tensors/__0_0.distcp", "state.json", "manifest.json"])
def test_a_corrupt_one_is_named_and_hinders_no_other(
    run: Path, out: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if file == "manifest.json":
        (of_step(run, 10) / file).unlink()
    else:
        damage(of_step(run, 10), file)
    for were_there in (0, 2):
        assert export_all(run, out) == 1
        said = capsys.readouterr()
        assert (
            f"step-00000010 is NOT exported: checkpoint {of_step(run, 10)} is corrupt ({'it' if file[0] == 'm' else file}"
            in said.out
        )
        assert f"{2 - were_there} written, {were_there} were there" in said.out
        assert said.err.count("\n") == 1
        assert "1 not exported, each for the reason above: step-00000010" in said.err
        assert names(out) == ["step-00000009", "step-00000012"]
    assert of_step(run, 10).is_dir(), "nothing in the run's folder is set aside by who reads"


def delete(victim: Path) -> None:
    """As retention.prune does it."""
    os.rename(victim, victim.with_name(f".deleting-{victim.name}"))
    shutil.rmtree(victim.with_name(f".deleting-{victim.name}"))


@pytest.mark.parametrize(
    "moment",
    ["seal", "take", "checkpoint.verify", "checkpoint.describe", "checkpoint.read_state", "checkpoint.load_weights"],
)
def test_one_that_the_run_deletes_meanwhile_is_passed_over(
    run: Path, out: Path, moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Just before each of the steps in which it is read."""
    where, _, name = moment.rpartition(".")
    module = checkpoint if where else snapshot
    victim, does = of_step(run, 10), getattr(module, name)

    def deleted_before(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.is_relative_to(victim) and victim.exists():
            delete(victim)
        return does(path, *arguments, **more)

    monkeypatch.setattr(module, name, deleted_before)
    assert export_all(run, out) == 0
    said = capsys.readouterr()
    assert "step-00000010 is passed over" in said.out
    assert "was deleted or replaced by the run" in said.out
    assert said.out.endswith("2 written, 0 were there\n")
    assert not said.err
    assert not victim.exists()
    assert names(out) == ["step-00000009", "step-00000012"]


def test_one_that_is_deleted_between_two_of_its_tensors_is_passed_over(
    run: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inside DCP, which makes an error of its own of it."""
    read = checkpoint.Reader.read_data

    def deleted_before(reader: Any, *arguments: Any) -> Any:
        if of_step(run, 9).exists():
            delete(of_step(run, 9))
        return read(reader, *arguments)

    monkeypatch.setattr(checkpoint.Reader, "read_data", deleted_before)
    assert export_all(run, out) == 0
    assert "step-00000009 is passed over" in capsys.readouterr().out
    assert names(out) == ["step-00000010", "step-00000012"]


def test_a_file_that_cannot_be_read_now_is_no_reason_to_say_that_it_was_deleted(
    run: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = checkpoint.Reader.read_data

    def fails(reader: Any, *arguments: Any) -> Any:
        if "step-00000010" in str(reader.path):
            raise OSError("Input/output error")
        return read(reader, *arguments)

    monkeypatch.setattr(checkpoint.Reader, "read_data", fails)
    assert export_all(run, out) == 1
    assert "step-00000010 is NOT exported: " in (said := capsys.readouterr().out)
    assert "Input/output error" in said
    assert names(out) == ["step-00000009", "step-00000012"]


@pytest.mark.parametrize("moment", ["hf.save_torch_state_dict", "hf.load", "folder._finish", "folder._rename"])
def test_killed_half_way_nothing_that_is_there_is_half(
    run: Path, out: Path, tmp_path: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real SIGKILL while the second one is written: before the weights, the reading back, the mark's sync and the rename."""

    def killed(rank: int) -> None:
        module = {"hf": hf, "folder": folder}[moment.split(".")[0]]
        does, calls = getattr(module, moment.split(".")[1]), []

        def kills(*arguments: Any, **more: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return does(*arguments, **more)

        setattr(module, moment.split(".")[1], kills)
        export.main([str(run), "--all", "--out", str(out)])

    (pid,) = fork_ranks(1, tmp_path / "said.txt", killed)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    left_over = [name for name in names(out) if name != "step-00000009"]
    assert len(left_over) == 1
    assert left_over[0].startswith(".step-00000010."), "what is left has no name that counts"
    first = inodes(out / "step-00000009")

    assert export_all(run, out) == 0, "the dead one's lock is in nobody's way"
    assert "2 written, 1 were there" in capsys.readouterr().out
    assert names(out) == ["step-00000009", "step-00000010", "step-00000012"], "what it left is cleared away"
    assert inodes(out / "step-00000009") == first
    assert all(folder.made_of(out / name) for name in names(out))


def test_an_export_that_lacks_a_file_is_made_again(run: Path, out: Path) -> None:
    assert export_all(run, out) == 0
    whole = content(out / "step-00000010")
    (out / "step-00000010" / "model.safetensors").unlink()
    (out / "step-00000012" / "cria.json").unlink()  # not ours any more: it is never replaced
    assert export_all(run, out) == 1
    assert content(out / "step-00000010") == whole
    assert not (out / "step-00000012" / "cria.json").exists()


def test_what_the_run_has_saved_anew_is_not_replaced(run: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may have been evaluated: the figures would be of other weights than those that lie there."""
    assert export_all(run, out) == 0
    before = inodes(out)
    write_run(run.parent / "elsewhere" / "run", TINY, (8, 10))
    shutil.rmtree(of_step(run, 10))
    shutil.copytree(of_step(run.parent / "elsewhere" / "run", 10), of_step(run, 10))
    capsys.readouterr()
    assert export_all(run, out) == 1
    assert f"step-00000010 is NOT exported: {out}/step-00000010 is of another checkpoint" in capsys.readouterr().out
    assert inodes(out) == before


def test_a_mark_of_before_names_no_checkpoint_and_counts_by_its_step(run: Path, out: Path) -> None:
    export.main([str(run), "--step", "9", "--out", str(out / "step-00000009")])
    mark = json.loads((out / "step-00000009" / "cria.json").read_text())
    del mark["checkpoint"]
    (out / "step-00000009" / "cria.json").write_text(json.dumps(mark))
    export.main([str(run), "--step", "9", "--out", str(out / "step-00000010")])
    before = [content(out / name) for name in names(out)]
    assert export_all(run, out) == 1, "one has another's name"
    assert names(out) == ["step-00000009", "step-00000010", "step-00000012"]
    assert [content(out / name) for name in names(out)[:2]] == before


def other_type(run: Path, out: Path) -> tuple[Path, list[str]]:
    return run, ["--dtype", "bfloat16"]


def other_run(run: Path, out: Path) -> tuple[Path, list[str]]:
    return run.rename(run.with_name("other")), []


def another_of_its_name(run: Path, out: Path) -> tuple[Path, list[str]]:
    return Path(shutil.copytree(run, run.parent / "elsewhere" / run.name)), []


def test_a_run_that_was_moved_is_the_same_run(run: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_all(run, out) == 0
    before = names(out)
    (run.parent / "elsewhere").mkdir()
    assert export_all(run.rename(run.parent / "elsewhere" / run.name), out) == 0
    assert names(out) == before
    assert "0 written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_type, "is float32 and --dtype bfloat16; name another --out"),
        (other_run, "is of another run, "),
        (another_of_its_name, "is of another run, "),
    ],
)
def test_what_cannot_be_compared_does_not_come_into_one_folder(
    run: Path,
    out: Path,
    change: Callable[[Path, Path], tuple[Path, list[str]]],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where the run has deleted the checkpoint since."""
    assert export_all(run, out) == 0
    shutil.rmtree(of_step(run, 9))
    for name in ("step-00000010", "step-00000012"):
        shutil.rmtree(out / name)
    run, more = change(run, out)
    capsys.readouterr()
    assert export_all(run, out, *more) == 2
    line = capsys.readouterr().err
    assert f"{out}/step-00000009 {said}" in line
    assert line.count("\n") == 1
    assert names(out) == ["step-00000009"]


def test_two_at_a_time_do_not_write_into_one_folder(run: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.mkdir()
    held = Lock(out)
    (out / ".step-00000009.abc.partial").mkdir()
    assert export_all(run, out) == 2
    line = capsys.readouterr().err
    assert f"process {os.getpid()} on" in line
    assert "give this one another --out" in line
    assert names(out) == [".step-00000009.abc.partial"], "it is being written"
    held.close()
    assert export_all(run, out) == 0
    assert len(names(out)) == 3


def test_what_a_run_that_was_sent_back_has_left_is_passed_over(
    run: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back.write(run, back.Back("checkpoints/step-00000010", 10, "0123"))
    assert export_all(run, out) == 0
    assert "step-00000012 is passed over: the run was sent back to an earlier step" in capsys.readouterr().out
    assert names(out) == ["step-00000009", "step-00000010"]
    back.forget(run)
    assert export_all(run, out) == 0
    assert len(names(out)) == 3


def test_a_run_without_a_checkpoint_is_no_error(run: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A timer may come before the first save."""
    shutil.rmtree(run / "checkpoints")
    assert export_all(run, out) == 0
    assert f"0 written, 0 were there; {run} has no checkpoint yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--all", "--step", "9"], "--step, --all and --average exclude each other"),
        (["--all", "--average", "[9,10]"], "--step, --all and --average exclude each other"),
        (["--step", "0", "--average", "[9,10]"], "--step, --all and --average exclude each other"),
        (["--all", "--out", "{run}"], "is a run's; name another folder"),
        (["--all", "--out", "{run}/checkpoints"], "is a run's; name another folder"),
        (["--all", "--out", "{run}/config.yaml"], "is a file; name another folder"),
        (["--all", "--out", "{run}/../alone"], "is an export itself; name another folder"),
        (["--all", "--out", "{run}/no/such", "{run}/checkpoints"], "unrecognized"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    run: Path, out: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    export.main([str(run), "--out", str(tmp_path / "alone")])
    before = inodes(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        export.main([str(run), "--out", str(out), *(argument.format(run=run) for argument in arguments)])
    line = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in line
    assert line.count("\n") == 1
    assert inodes(tmp_path) == before


def test_while_a_run_saves_and_deletes_nothing_is_wrong(out: Path, tmp_path: Path) -> None:
    """As often as it is repeated: what the run deletes meanwhile is no error, and each export is the model of its step."""
    run_dir = tmp_path / "run"
    write_run(run_dir, TINY, (1,))
    writer = saver.Saver(run_dir, CheckpointConfig(every_steps=1, keep_last=2), say=lambda line: None)
    facts = {"model": TINY.shape(), "data": {"tokenizer": folder_fingerprint(run_dir / "tokenizer")}}
    models, over = {step: make_model(TINY, seed=step) for step in range(2, 20)}, threading.Event()

    def train() -> None:
        for step, model in models.items():
            writer.save(step, model, torch.optim.AdamW(model.parameters()), {"step": step, **facts})
        writer.close()
        over.set()

    training = threading.Thread(target=train)
    training.start()
    try:
        statuses = []
        while not over.is_set():
            statuses.append(export_all(run_dir, out))
    finally:
        training.join()
    statuses.append(export_all(run_dir, out))
    assert set(statuses) == {0}
    assert len(checkpoint.committed(run_dir)) < 5 < len(models), "the run has deleted some"
    exported = {int(name.removeprefix("step-")) for name in names(out)}
    assert {18, 19} <= exported
    for step in exported - {1}:
        _, weights = hf.load(out / f"step-{step:08d}")
        assert all(hf.same_bits(weights[name], tensor) for name, tensor in weights_of(models[step]).items())
