"""Several runs on one page: their names, figures, differences and curves, and nothing written where one is refused."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_report import (  # noqa: F401  fixtures
    FINISHED,
    RUNS,
    Reader,
    coarse_pictures,
    figures,
    run_dir,
    start,
    train,
    validation,
    write,
)

from pretrain import overlay, page, several
from pretrain.pictures import PALETTE
from pretrain.report import main
from pretrain.sections import OptimConfig

SETTINGS: dict[str, Any] = {
    "run_dir": "runs/a",
    "seed": 1,
    "resume": None,
    "model": {"ops": {"rope": "auto"}},
    "data": {
        "sources": [
            {"name": "prose", "train": "shards/prose", "weight": 7.0},
            {"name": "code", "train": "shards/code", "weight": 3},
        ],
        "stages": [],
    },
    "optim": {"max_lr": 0.004, "max_grad_norm": 1.0},
}


def configured(folder: Path, **changes: Any) -> Path:
    """Write a configuration that differs from SETTINGS in `changes`, whose keys have __ for dots."""
    settings = copy.deepcopy(SETTINGS)
    for key, value in changes.items():
        place: Any = settings
        *way, last = [int(word) if word.isdigit() else word for word in key.split("__")]
        for word in way:
            place = place[word]
        place[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "run_dir": str(folder)}, sort_keys=False))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """One that is finished; another of the same name, hotter; and a branch of the first, from step 100 on."""
    first = configured(write(tmp_path / "a" / "run", FINISHED))
    hotter = [
        start(),
        *(train(step, loss=20 / step, lr=3e-3 / step) for step in range(1, 151)),
        validation(150, 7.5, 3.5),
    ]
    second = configured(write(tmp_path / "b" / "run", hotter), optim__max_lr=0.006, data__sources__1__weight=4)
    origin = str((first / "checkpoints" / "step-00000100").resolve())
    branch = [start(100, branched_from=origin), *(train(step, loss=0.5) for step in range(101, 131))]
    stages = [{"first_step": 101, "weights": {"prose": 1.0, "code": 2.5}}]
    third = configured(write(tmp_path / "branch", branch), data__stages=stages, resume=origin)
    return [first, second, third]


def rows(text: str) -> dict[str, list[str]]:
    """The tables' rows by their first cell."""
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", text):
        first, *others = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)]
        found[first] = others
    return found


def test_the_page_lays_figures_and_differences_side_by_side(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([*map(str, runs), "--out", str(out)])
    text = (out / "index.html").read_text()
    read = Reader(text)
    assert "://" not in text
    found = rows(text)
    assert found[""] == ["a/run", "b/run", "branch"]
    expected = {
        "last step": ["200", "150", "130"],
        "a branch of": ["—", "—", "a/run, step 100"],
        "tokens seen": ["200k", "150k", "130k"],
        "training loss, last step": ["0.6364", "0.1333", "0.5000"],
        "validation loss, prose": ["6.0000", "7.5000", "—"],
        "validation loss, code": ["3.0000", "3.5000", "—"],
        "last step that is saved": ["100", "—", "100"],
        "tokens/s, median": ["1,101", "1,076", "1,116"],
        "data.sources[code].weight": ["3", "4", "3"],
        "data.stages[from step 101]": ["—", "—", "prose 1, code 2.5"],
        "optim.max_lr": ["0.004", "0.006", "0.004"],
    }
    assert {name: found[name] for name in expected} == expected
    assert found["state"][0] == "step 200 of 200; finished"
    keys = [name for name in found if "." in name or name in SETTINGS]
    assert sorted(keys) == sorted(name for name in expected if "." in name), "what is the same, or a place, is left out"
    colours = re.findall(r'style="background: (#\w+)"', text)
    assert colours == [*PALETTE[:3], *PALETTE[:3]]
    images = [value for name, value in read.attributes if name == "alt"]
    assert images[:3] == ["Training loss", "Validation loss, prose", "Validation loss, code"]
    assert images[3:] == ["Learning rate", "Gradient norm"]
    assert len(list(out.glob("*.png"))) == 5
    said = capsys.readouterr().out
    for word in ("a/run", "optim.max_lr", "6.0000", f"{out}/index.html"):
        assert word in said, word


def test_curves_have_a_colour_a_run_and_begin_where_a_branch_does(
    tmp_path: Path,
    runs: list[Path],
    figures: list[Any],  # noqa: F811
) -> None:
    earlier = [start(), *(train(step) for step in range(1, 121))]  # what it was before it became a branch
    write(runs[2], [*earlier, *map(dict, _records(runs[2]))])
    read = several.read(runs)
    files = overlay.draw({run.name: run.history for run in read}, tmp_path)
    axes = {title: figure.axes[0] for title, figure in zip(files, figures)}
    for title, name in {"Training loss": "loss", "Learning rate": "lr", "Gradient norm": "grad_norm"}.items():
        lines = {line.get_label().split(",")[0]: line for line in axes[title].lines if line.get_label()[0] != "_"}
        assert list(lines) == ["a/run", "b/run", "branch"], title
        assert [line.get_color() for line in lines.values()] == list(PALETTE[:3]), title
        assert lines["branch"].get_xdata().tolist() == [*range(101, 131)], title
        if name == "lr":
            np.testing.assert_array_equal(lines["b/run"].get_xydata().T, read[1].history.series(name))
        dotted = [line for line in axes[title].lines if line.get_linestyle() == ":"]
        assert [(line.get_xdata()[0], line.get_color()) for line in dotted] == [(100, PALETTE[2])], title
    prose = [line for line in axes["Validation loss, prose"].lines if line.get_linestyle() == "-"]
    assert [(line.get_color(), line.get_ydata().tolist()) for line in prose] == [
        (PALETTE[0], [9.0, 6.0]),
        (PALETTE[1], [7.5]),
    ]


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_names_are_distinct_and_no_longer_than_they_must_be() -> None:
    folders = [Path(name) for name in ("/x/a/run", "/y/a/run", "/a/run", "/x/b/run", "/x/c", "/run")]
    assert several.distinct_names(folders) == ["x/a/run", "y/a/run", "/a/run", "b/run", "c", "/run"]


def test_runs_of_any_kind_can_be_laid_side_by_side(tmp_path: Path) -> None:
    """As many as there are colours; without configuration each."""
    folders = [str(write(tmp_path / f"_{name} $x^$", records)) for name, records in RUNS.items()]
    assert len(folders) == len(PALETTE)
    main([*folders, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "index.html").read_text()
    assert "_one line $x^$" in Reader(text).text
    assert "there is nothing to compare" in text


def test_a_run_without_configuration_is_named(tmp_path: Path, runs: list[Path]) -> None:
    (runs[0] / "config.yaml").unlink()
    main([*map(str, runs), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "index.html").read_text()
    assert "Without configuration (no config.yaml): a/run." in text
    assert "a/run, without configuration" in text
    assert rows(text)["optim.max_lr"] == ["", "0.006", "0.004"]


def test_strings_of_the_runs_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)<&\"'"
    records = [start(device=evil), {"kind": "validation", "step": 0, "losses": {evil: 1.0}}]
    folders = [configured(write(tmp_path / name, records), seed=name + evil) for name in (f"{evil} a", "b")]
    text = page.render_several(several.read(folders), {}, PALETTE)
    assert "script" not in Reader(text).tags
    assert Reader(text).text.count(evil) >= 6


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        (lambda runs: [runs[0], runs[1].parent / "gone"], "b/gone is not there"),
        (lambda runs: (runs[1] / "metrics.jsonl").unlink() or runs, "b/run has no metrics.jsonl"),
        (lambda runs: (runs[1] / "metrics.jsonl").write_text("{") and runs, "has no record yet"),
        (lambda runs: [runs[0], runs[1], runs[0] / ".." / "run"], "is named twice"),
        (
            lambda runs: (runs[1] / "config.yaml").write_text("data: {sources: [1]}") and runs,
            "config.yaml cannot be read",
        ),
        (lambda runs: (runs[1] / "config.yaml").write_text("- 1") and runs, "config.yaml cannot be read"),
        (
            lambda runs: [write(runs[0].parent / str(n), FINISHED[:3]) for n in range(len(PALETTE) + 1)],
            "7 runs are more than the 6 colours",
        ),
    ],
)
def test_what_is_refused_is_one_line_and_writes_nothing(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str], prepare: Any, named: str
) -> None:
    folders = prepare(runs)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, folders), "--out", str(tmp_path / "new" / "out")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert named in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_several_runs_need_a_folder_to_write(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(run) for run in runs])
    assert stopped.value.code == 2
    assert "--out DIR" in capsys.readouterr().err
    assert not list(runs[0].parent.parent.rglob("*.png"))


def test_one_run_has_its_own_page_as_before(tmp_path: Path, run_dir: Path) -> None:  # noqa: F811
    main([str(run_dir), "--out", str(tmp_path / "out")])
    main([str(run_dir)])
    own = (run_dir / "report" / "index.html").read_bytes()
    assert own == (tmp_path / "out" / "index.html").read_bytes()
    assert b"<h2>Configuration</h2>" in own
    assert b"side by side" not in own
    names = {"loss", "validation", "learning_rate", "grad_norm", "tokens_per_sec"}
    assert {path.stem for path in (run_dir / "report").glob("*.png")} == names


def test_what_an_earlier_version_could_not_set_had_its_default(tmp_path: Path) -> None:
    default = OptimConfig().lr_decay_steps
    for steps, said in ((default, []), (5, [("optim.lr_decay_steps", [str(default), "5"])])):
        old = configured(write(tmp_path / f"old-{steps}", FINISHED))
        new = configured(write(tmp_path / f"new-{steps}", FINISHED), optim__lr_decay_steps=steps)
        assert several.differences(several.read([old, new])) == said
