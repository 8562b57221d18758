"""The house: each module imports only from the layers above its own; the two packages meet at one door."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = [
    {"collectives", "folder", "hosts", "index", "permutation", "reading", "skips", "slots", "stuck"},
    {
        "back",
        "bench_profile",
        "bench_timing",
        "cli",
        "config_file",
        "crash",
        "imports",
        "lock",
        "mixture",
        "processes",
        "progress",
        "ranks",
        "scheduler",
        "sections",
        "streams",
        "synced",
        "versions",
    },
    {"left_out"},
    {"history", "bench_rows", "chips", "config", "joining", "loggers", "pace", "peer", "hub"},
    {"watcher", "several"},
    {"bench_result", "ops", "optim", "data", "metrics", "pictures", "page", "checkup", "devices", "watchdog"},
    {"model", "kernels", "checkpoint", "hf_config", "overlay"},
    {"retention"},
    {"backends", "sharding"},
    {"float8", "memory", "soundness"},
    {"disk", "parallel", "hf", "saver", "speed"},
    {"validation", "published", "snapshot", "choice"},
    {"going_on", "run_folder", "answer"},
    {"init_from"},
    {"run"},
    {"logbook"},
    {"leaving"},
    {"trainer", "preparation"},
    {"probe"},
    {"bench_step"},
    {"bench_peers", "bench_sweep"},
    {"bench_paper"},
    {"benchmark", "plan", "train", "doctor", "order", "verify_resume", "report", "export", "generate"},
    {"__main__"},
]
"""Modules of `pretrain`, from the ground up; the commands are the last but one and never import each other."""


def imported(path: Path) -> set[str]:
    """Every module that a file imports, functions' imports included; `from pretrain import data` is pretrain.data."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules(package: str) -> dict[str, Path]:
    return {path.stem: path for path in (ROOT / package).glob("*.py") if path.stem != "__init__"}


def test_every_module_has_its_layer() -> None:
    assert set().union(*LAYERS) == set(modules("pretrain"))


def test_the_package_s_map_names_each_module_once_and_nothing_else() -> None:
    """`pretrain/__init__.py` says in a line what each is for."""
    page = ast.get_docstring(ast.parse((ROOT / "pretrain" / "__init__.py").read_text()))
    assert page is not None
    named = [line.split()[0] for line in page.splitlines() if line.startswith("    ")]
    assert sorted(named) == sorted(modules("pretrain"))


@pytest.mark.parametrize("name", sorted(modules("pretrain")))
def test_pretrain_imports_downwards_only(name: str) -> None:
    (own,) = [number for number, layer in enumerate(LAYERS) if name in layer]
    below = set().union(*LAYERS[:own])
    for module in imported(modules("pretrain")[name]):
        parts = module.split(".")
        if parts[0] == "pretrain" and len(parts) > 1 and parts[1] in modules("pretrain"):
            assert parts[1] in below, f"pretrain.{name} imports {module}, which is not in a layer below"
        if parts[0] == "data_prep":
            assert module == "data_prep.shard" or module.startswith("data_prep.shard."), (
                f"pretrain.{name} imports {module}"
            )


def test_data_prep_does_not_know_pretrain() -> None:
    assert len(modules("data_prep")) > 5
    for path in modules("data_prep").values():
        assert not [m for m in imported(path) if m.split(".")[0] == "pretrain"], path


def test_the_door_needs_numpy_and_the_standard_library_alone() -> None:
    todo, seen = ["shard"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        for module in imported(modules("data_prep")[name]):
            parts = module.split(".")
            if parts[0] == "data_prep":
                todo += (
                    [parts[1]] if len(parts) > 1 and parts[1] not in seen and parts[1] in modules("data_prep") else []
                )
            else:
                assert parts[0] == "numpy" or parts[0] in sys.stdlib_module_names, f"data_prep.{name} imports {module}"
    assert "shard" in seen


def test_the_streams_are_the_same_in_both_packages() -> None:
    assert (ROOT / "pretrain" / "streams.py").read_bytes() == (ROOT / "data_prep" / "streams.py").read_bytes()


def test_there_is_no_utils() -> None:
    assert not list(ROOT.glob("*/*util*.py"))


def test_what_was_imported_is_not_looked_at_again() -> None:
    """In a process of its own: nothing is collected within, all of it is frozen, and collecting goes on."""
    script = (
        "import gc; from pretrain.imports import importing\n"
        "with importing():\n    import numpy; inside = gc.isenabled()\n"
        "print(inside, gc.isenabled(), gc.get_freeze_count() > 10_000)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


SCRIPTS = [
    *(ROOT / "benchmarks").glob("*.py"),
    *(ROOT / "tests" / f"{name}.py" for name in ("faults", "hangs", "slurm_runs")),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_that_runs_by_hand_finds_what_it_imports(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(script.parent)
    runpy.run_path(str(script), run_name="imported")
