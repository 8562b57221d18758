"""A folder that is whole under its name, or is not there.

    staged(DIR): DIR's parent/.DIR.XXXXXXXX.partial/ ── filled, marked, flushed to the disk ── renamed ──> DIR

The mark, cria.json, lists the files. Only an empty folder, or one that holds nothing besides its mark and the files in
it, is ever replaced: nobody's notes are deleted because they lay in an output folder.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "cria.json"
"""Names the files of a folder of ours, and where they came from."""


@contextmanager
def staged(directory: Path, origin: dict[str, Any]) -> Iterator[Path]:
    """Give a folder to fill; it becomes `directory` if the block ends well, and is removed if not.

    origin: what the mark shall remember of the content's past (JSON). A kill leaves a hidden `.NAME.*.partial`, or, between the
    two renames, what was there before as `.NAME.*.old`; nothing reads them.

    Raises:
        ValueError: where `directory` holds anything that is not ours, before anything is written.
    """
    directory = directory.resolve()
    _refuse_foreign(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    try:
        yield folder
        mark = {**origin, "files": sorted(path.name for path in folder.iterdir())}
        (folder / MARK).write_text(json.dumps(mark, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _finish(folder)
        _refuse_foreign(directory)  # writing took its time
        _rename(folder, directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def made_of(directory: Path) -> dict[str, Any] | None:
    """What the mark of a folder says; None where it is none of ours, or a file that the mark names is missing."""
    mark = _mark(directory / MARK)
    if mark is None or not all((directory / name).is_file() for name in mark["files"]):
        return None
    return mark


def clear(parent: Path, names: str) -> None:
    """Remove what killed writers of the folders `names` (a pattern) in `parent` have left; the caller is the only one alive."""
    for left_over in parent.glob(f".{names}.*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)


def _finish(folder: Path) -> None:
    """Give the modes that the user's umask asks for (mkdtemp and safetensors shut others out), and flush to the disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)
        sync(path)
    folder.chmod(0o777 & ~umask)
    sync(folder)


def _refuse_foreign(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; name a folder")
    present = {path.name for path in directory.iterdir()}
    mark = _mark(directory / MARK)
    foreign = present - {MARK, *(mark["files"] if mark else ())}
    if foreign:
        raise ValueError(
            f"{directory} holds {sorted(foreign)[0]!r}, which Cria did not put there; "
            "name another folder, or move that away"
        )


def _mark(mark: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
        return {**content, "files": [str(name) for name in content["files"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing there is known to be ours


def _rename(folder: Path, directory: Path) -> None:
    if directory.exists():
        old = folder.with_suffix(".old")
        os.rename(directory, old)
        try:
            os.rename(folder, directory)
        except OSError:
            if not directory.exists():
                os.rename(old, directory)
            raise
        shutil.rmtree(old)
    else:
        os.rename(folder, directory)
    sync(directory.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
