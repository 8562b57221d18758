"""Several runs, to be laid side by side: their names, what each tells of itself, and where their configurations differ.

RUN_DIRs ── read ──> Runs ── differences ──> the keys that do not have the same value in all of them
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import config, history
from pretrain.history import History
from pretrain.reading import yaml_mapping

_WHERE = ("run_dir", "resume")
"""Keys that say where a run lies or was taken up, which its start records say too."""

NOT_SET = "—"
"""What stands for a key that a configuration does not have."""


@dataclass(frozen=True)
class Run:
    """One of them."""

    name: str
    """Its folder's, with as much of the path before it as tells it from the others."""
    folder: Path
    history: History
    settings: dict[str, Any] | None
    """Of its config.yaml, as a tree; None: it has none."""

    @property
    def label(self) -> str:
        """Its name, and that it is without configuration where it is."""
        return self.name if self.settings is not None else f"{self.name}, without configuration"


def read(run_dirs: list[Path]) -> list[Run]:
    """Read the runs' folders.

    Raises:
        FileNotFoundError: a folder is not there, or has no metrics.jsonl.
        ValueError: a folder is named twice, has no record yet, or a config.yaml that is not one.
    """
    folders = [run_dir.resolve() for run_dir in run_dirs]
    for run_dir, folder in zip(run_dirs, folders):
        if folders.count(folder) > 1:
            raise ValueError(f"{run_dir} is named twice; name each run once")
        if not folder.is_dir():
            raise FileNotFoundError(f"{run_dir} is not there; name the folder of a run (run_dir in its configuration)")
    return [
        Run(name, folder, history.read(run_dir), _read_settings(run_dir / "config.yaml"))
        for name, folder, run_dir in zip(distinct_names(folders), folders, run_dirs)
    ]


def distinct_names(folders: list[Path]) -> list[str]:
    """The folders' names; where several have the same, with the folders that they lie in, until they differ.

    folders: absolute, and each another one.
    """
    depths = [1] * len(folders)
    while True:
        names = [str(Path(*folder.parts[-depth:])) for folder, depth in zip(folders, depths)]
        if len(set(names)) == len(names):
            return names
        depths = [depth + (names.count(name) > 1) for name, depth in zip(names, depths)]


def origin(run: Run, runs: list[Run]) -> str | None:
    """Where a run branched from: the checkpoint's path, or its run's name if that is one of `runs`; None: nowhere."""
    path = run.history.about.get("branched_from")
    if path is None:
        return None
    at = f"step {run.history.branch_step:,}"
    owner = next((other.name for other in runs if other.folder == Path(path).parent.parent), None)
    return f"{path}, {at}" if owner is None else f"{owner}, {at}"


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """The keys whose values are not the same in all runs that have a configuration, and the value in each of `runs`.

    Keys are as a command line has them; those of a source and of a stage stand in brackets behind it. A run without
    configuration has an empty value.
    """
    keys = [None if run.settings is None else _keys(run.settings) for run in runs]
    known = dict.fromkeys(key for settings in keys if settings is not None for key in settings)
    # What a run of an earlier Cria could not set had the default.
    missing = {key: _words(value) for key, value in config.defaults(known).items()}
    rows = [
        (key, ["" if settings is None else settings.get(key, missing.get(key, NOT_SET)) for settings in keys])
        for key in known
    ]
    return [(key, cells) for key, cells in rows if len({cell for cell, its in zip(cells, keys) if its is not None}) > 1]


def _keys(settings: dict[str, Any]) -> dict[str, str]:
    """Each key and its value in words."""
    keys: dict[str, str] = {}
    for key, value in config.flat(settings).items():
        if key == "data.sources":
            keys[key] = ", ".join(str(source["name"]) for source in value)
            for source in value:
                about = {name: what for name, what in source.items() if name != "name"}
                keys |= {f"{key}[{source['name']}].{name}": _words(what) for name, what in about.items()}
        elif key == "data.stages":
            keys |= {f"{key}[from step {stage['first_step']}]": _words(stage["weights"]) for stage in value}
        elif key not in _WHERE:
            keys[key] = _words(value)
    return keys


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(what)}" for name, what in value.items())
    if isinstance(value, list):
        return ", ".join(_words(what) for what in value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # 7.0 is the same weight as 7
    return str(value)


def _read_settings(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        settings = yaml_mapping(file.read_text(encoding="utf-8"))
        _keys(settings)  # a hand may have given its lists another shape
        return settings
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; mend it or move it away, a report can do without") from error
