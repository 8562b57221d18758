"""Checkpoints that cannot be read, listed or set aside now are neither corrupt nor missing."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from test_checkpoint import two_checkpoints  # noqa: F401  a fixture: run_dir

from pretrain import checkpoint


def test_what_cannot_be_read_now_is_not_taken_for_corrupt(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale handle, or one sick host: read again, then refused with the host's name, and nothing is set aside."""
    folders = sorted((run_dir / "checkpoints").iterdir())
    read, times = checkpoint.describe, 0

    def stale(path: Path, sign: Callable[[], None]) -> dict:
        nonlocal times
        times += 1
        if times < lasts:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path)

    monkeypatch.setattr(checkpoint, "describe", stale)
    monkeypatch.setattr(checkpoint, "_PAUSES_S", (0.0, 0.0))
    lasts = 2
    assert checkpoint.find(run_dir, pytest.fail) == folders[-1], "it was only a moment"
    lasts = 1000
    with pytest.raises(OSError, match=f"cannot be read on {socket.gethostname()}: .*Stale file handle"):
        checkpoint.find(run_dir, pytest.fail)
    assert sorted((run_dir / "checkpoints").iterdir()) == folders


@pytest.mark.parametrize("trouble", [errno.EACCES, errno.ESTALE])
def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, trouble: int
) -> None:
    """Else the run would begin anew; one folder of a checkpoint that cannot be listed is not corrupt either."""
    folders = sorted((run_dir / "checkpoints").iterdir())
    sick = run_dir / "checkpoints"
    monkeypatch.setattr(checkpoint, "_PAUSES_S", (0.0, 0.0))
    for name in ("listdir", "scandir"):  # whichever is asked
        look = getattr(os, name)

        def fail(path: Path, look: Callable = look) -> object:
            if Path(path) == sick:
                raise OSError(trouble, os.strerror(trouble), str(path))
            return look(path)

        monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match=f"{os.strerror(trouble)}.*, on {socket.gethostname()}"):
        checkpoint.find(run_dir, pytest.fail)
    for look in (checkpoint.committed, checkpoint.updates):
        with pytest.raises(OSError, match=os.strerror(trouble)):
            look(run_dir)
    sick, trouble = folders[-1] / "tensors", errno.ENOENT
    with pytest.raises(OSError, match=r"tensors cannot be listed: .*No such file"):
        checkpoint.find(run_dir, pytest.fail)
    monkeypatch.undo()
    assert sorted((run_dir / "checkpoints").iterdir()) == folders


def test_what_was_set_aside_and_cannot_be_listed_is_not_taken_for_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (run_dir / "checkpoints").iterdir():
        checkpoint.set_aside(folder, "corrupt")
    monkeypatch.setattr(checkpoint, "committed", lambda run_dir: [])
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, lambda path: (_ for _ in ()).throw(PermissionError("not today")))
    with pytest.raises(OSError, match="not today"):
        checkpoint.find(run_dir, pytest.fail)


def test_a_corrupt_checkpoint_that_cannot_be_set_aside_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = run_dir / "checkpoints" / "step-00000010"
    (newest / "state.json").write_text("{}")
    monkeypatch.setattr(os, "rename", mock.Mock(side_effect=PermissionError("not yours")))
    with pytest.raises(OSError, match=r"step-00000010 is corrupt \(.*\) and cannot be set aside: not yours"):
        checkpoint.find(run_dir, pytest.fail)


def test_a_link_that_leads_nowhere_is_not_taken_for_a_run_without_checkpoints(run_dir: Path) -> None:
    (run_dir / "checkpoints").rename(run_dir / "elsewhere")
    (run_dir / "checkpoints").symlink_to(run_dir / "elsewhere")
    assert len(checkpoint.committed(run_dir)) == 2
    (run_dir / "elsewhere").rename(run_dir / "unmounted")
    with pytest.raises(OSError, match=f"checkpoints is a link that leads to {run_dir}/elsewhere, which is not there"):
        checkpoint.find(run_dir, pytest.fail)
