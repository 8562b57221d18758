"""The report: pictures and page show what the metrics say and no more."""

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection

from pretrain import history, page, pictures
from pretrain.history import History
from pretrain.report import main

SOURCES = {
    "prose": {"share": 0.7, "train_tokens": 7_654_321, "documents": 90, "unigram_entropy": 6.5},
    "code": {"share": 0.3, "train_tokens": 1_234_567, "documents": 10, "unigram_entropy": 2.5},
}


def start(step: int = 0, **changes: Any) -> dict[str, Any]:
    about = {"world_size": 2, "device": "cpu", "parameters": 4321, "versions": {"torch": "2.13.0"}}
    about |= {"max_steps": 200, "tokens_per_step": 1000, "sources": SOURCES}
    return {"kind": "start", "time": 1.7e9 + step, "step": step, **about, **changes}


def train(step: int, **changes: Any) -> dict[str, Any]:
    speed = {"tokens_per_sec": 100.0 if step == 1 else 1000.0 + step, "mfu_m1_pct": None, "peak_mem_gib": 1.5}
    figures = {"loss": 9 / math.sqrt(step), "grad_norm": 2 / step, "lr": 1e-3 / step, "tokens": 1000 * step}
    return {"kind": "train", "time": 1.7e9 + step, "step": step, **figures, **speed, "skipped_steps": 0, **changes}


def validation(step: int, prose: float, code: float) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "losses": {"prose": prose, "code": code}}


FINISHED = [
    start(),
    validation(0, 9.0, 8.0),
    *(train(step) for step in range(1, 101)),
    start(100),
    *(train(step) for step in range(101, 201)),
    validation(200, 6.0, 3.0),
    {"kind": "stop", "step": 200, "reason": "finished"},
]
RUNS = {
    "finished": FINISHED,
    "running": FINISHED[:50],
    "one line": [train(1)],
    "only begun": [start()],
    "no validation": [start(sources={}), train(1), train(2), {"kind": "stop", "step": 2, "reason": "SIGINT"}],
    "not finite": [start(), train(1), train(2, loss=None, grad_norm=math.inf), train(3, grad_norm=0.0)],
}


def write(run_dir: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return run_dir


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the pixels: drawing is most of these tests' time."""
    monkeypatch.setattr(pictures, "DPI", 40)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = write(tmp_path / "run", FINISHED)
    (run_dir / "config.yaml").write_text("run_dir: somewhere\noptim:\n  max_grad_norm: 0.75\n")
    return run_dir


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, kept open to be looked into."""
    kept: list[Any] = []
    close = plt.close
    monkeypatch.setattr(plt, "close", kept.append)
    yield kept
    for figure in kept:
        close(figure)


def drawn(history_: History, folder: Path, figures: list[Any], limit: float | None = None) -> dict[str, Any]:
    files = pictures.draw(history_, folder, limit)
    return {title: figure.axes[0] for title, figure in zip(files, figures)}


def levels(ax: Any) -> list[float]:
    """Heights of the dashed lines across a picture."""
    return [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"]


def test_pictures_show_the_records(tmp_path: Path, figures: list[Any]) -> None:
    past = history.read(write(tmp_path, FINISHED))
    axes = drawn(past, tmp_path, figures, limit=0.75)
    assert list(axes) == ["Training loss", "Validation loss", "Learning rate", "Gradient norm", "Throughput"]
    names = {"Training loss": "loss", "Learning rate": "lr", "Gradient norm": "grad_norm"}
    for title, name in {**names, "Throughput": "tokens_per_sec"}.items():
        np.testing.assert_array_equal(axes[title].lines[0].get_xydata().T, past.series(name), err_msg=title)
    curves = [line.get_xydata().tolist() for line in axes["Validation loss"].lines if line.get_linestyle() == "-"]
    assert curves == [[[0, 9], [200, 6]], [[0, 8], [200, 3]]]
    assert levels(axes["Validation loss"]) == [6.5, 2.5]
    assert levels(axes["Gradient norm"]) == [0.75]
    assert levels(axes["Throughput"]) == [past.typical("tokens_per_sec")]
    for title, ax in axes.items():
        resumes = [
            line for drawn in ax.collections if isinstance(drawn, LineCollection) for line in drawn.get_segments()
        ]
        assert [line.tolist() for line in resumes] == [[[100, 0], [100, 1]]], "the resume"
        assert ax.get_xlabel() == "optimizer step"
        assert "(" in ax.get_ylabel() or ax.get_ylabel() == "tokens per second", "a unit"
        assert ax.get_title(loc="left") == title


def test_the_enlargement_never_covers_the_curve(tmp_path: Path, figures: list[Any]) -> None:
    """A run that falls has one; a run that diverges later does not, for it would lie on what matters."""
    falling = [train(step) for step in range(1, 201)]
    diverged = [*falling[:150], *(train(step, loss=8.0) for step in range(151, 201))]
    enlarged = []
    for number, records in enumerate((falling, diverged)):
        past = history.read(write(tmp_path / str(number), records))
        pictures.draw(past, tmp_path / str(number), None)
        inside = figures[4 * number].axes[0].child_axes
        enlarged.append("second half" in [child.get_title(loc="left") for child in inside])
    assert enlarged == [True, False]


@pytest.mark.parametrize("name", RUNS)
def test_any_run_can_be_drawn(tmp_path: Path, name: str) -> None:
    past = history.read(write(tmp_path, RUNS[name]))
    files = pictures.draw(past, tmp_path, None)
    assert ("Validation loss" in files) == bool(past.validation)
    assert ("Training loss" in files) == bool(past.train)
    for file in files.values():
        assert file.read_bytes().startswith(b"\x89PNG")
        assert plt.imread(file).std() > 0.01, "something is on it"
    assert not plt.get_fignums(), "figures are closed"


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    past = history.read(write(tmp_path, FINISHED[:20]))
    other = history.read(write(tmp_path, [*FINISHED[:20], train(19, loss=5.0)]))
    images = []
    for number, run in enumerate((past, past, other)):
        folder = tmp_path / str(number)
        folder.mkdir()
        images.append(pictures.draw(run, folder, None)["Training loss"].read_bytes())
    assert images[0] == images[1] != images[2]


@given(values=st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=100, max_size=400))
@settings(max_examples=50, deadline=None)
def test_smoothing_is_the_mean_of_the_neighbours(values: list[float]) -> None:
    series = np.array(values)
    smooth, width = pictures.smoothed(series)
    half = len(series) // 100
    assert width == 2 * half + 1
    for i in range(len(series)):
        around = series[max(i - half, 0) : i + min(half, i) + 1]
        expected = np.nan if np.isnan(around).all() else np.nanmean(around)
        np.testing.assert_allclose(smooth[i], expected, atol=1e-9)


def test_a_short_series_is_left_alone() -> None:
    series = np.arange(99.0)
    assert pictures.smoothed(series)[0] is series


# --- the page --------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Checks that tags nest, and collects text and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""


@pytest.mark.parametrize("name", RUNS)
def test_the_page_needs_nothing_but_itself(tmp_path: Path, name: str) -> None:
    past = history.read(write(tmp_path, RUNS[name]))
    files = pictures.draw(past, tmp_path, None)
    text = page.render("a run", past, files, "seed: 1\n")
    read = Reader(text)
    assert "://" not in text
    assert not {"script", "link", "iframe", "object"} & set(read.tags)
    assert "url(" not in text
    sources = [value for key, value in read.attributes if key == "src"]
    inlined = [base64.b64decode(value.removeprefix("data:image/png;base64,")) for value in sources]
    assert inlined == [file.read_bytes() for file in files.values()]
    assert past.status[1:] in read.text
    assert "seed: 1" in read.text


def test_the_page_tells_sources_resumes_and_versions(tmp_path: Path) -> None:
    text = Reader(page.render("a run", history.read(write(tmp_path, FINISHED, '{"kind"')), {}, None)).text
    for expected in ("prose", "7,654,321", "70.0%", "9.0000", "6.0000", "6.5000", "not below it", "100 (resumed)"):
        assert expected in text, expected
    for expected in ("torch 2.13.0", "2023-11-14 22:13:20", "1 of its lines were torn", "4,321"):
        assert expected in text, expected


def test_strings_of_the_run_are_escaped(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>\"'&"
    records = [start(sources={evil: SOURCES["prose"]}, device=evil, versions={evil: evil}), train(1)]
    records += [{"kind": "stop", "step": 1, "reason": evil}]
    read = Reader(page.render(evil, history.read(write(tmp_path, records)), {}, evil))
    assert "script" not in read.tags
    assert read.text.count(evil) >= 6


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_pictures_and_page_and_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run_dir)])
    said = capsys.readouterr().out
    names = {"loss", "validation", "learning_rate", "grad_norm", "tokens_per_sec"}
    assert {path.stem for path in (run_dir / "report").glob("*.png")} == names
    assert "max_grad_norm: 0.75" in Reader((run_dir / "report" / "index.html").read_text()).text
    for expected in ("7,654,321", "70.0%", "9.0000 → 6.0000", "6.5000", "not below it", "1,101", str(run_dir)):
        assert expected in said, expected
    assert re.search(r"prose.* 6\.5000 +below it", said)


@pytest.mark.parametrize("name", RUNS)
def test_the_command_works_on_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    main([str(write(tmp_path / "run", RUNS[name])), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "index.html").is_file()
    assert not (tmp_path / "run" / "report").exists()
    assert f"{tmp_path}/out/index.html" in capsys.readouterr().out


def test_a_second_report_replaces_the_first_whole(run_dir: Path) -> None:
    main([str(run_dir)])
    write(run_dir, RUNS["one line"])
    main([str(run_dir)])
    assert not (run_dir / "report" / "validation.png").exists(), "this run has none"
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "metrics.jsonl", "report"]


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl; name the folder of a run"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "sta'), "has no record yet"),
        *(
            (lambda run, text=text: (run / "config.yaml").write_text(text), "run/config.yaml cannot be read")
            for text in ("optim: [", "[1]", "optim: [1]", "optim: {max_grad_norm: x}", "[" * 3000, "")
        ),
        (lambda run: (run / "report").mkdir() or (run / "report" / "notes.md").write_text("mine"), "'notes.md'"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    run_dir: Path, capsys: pytest.CaptureFixture[str], prepare: Any, named: str
) -> None:
    prepare(run_dir)
    with pytest.raises(SystemExit) as stopped:
        main([str(run_dir)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert named in said
    assert said.count("\n") == 1
    assert not (run_dir / "report" / "index.html").exists()


def test_a_report_needs_no_torch(run_dir: Path) -> None:
    """On a login node, importing it takes longer than drawing."""
    code = f"import sys; from pretrain.report import main; main([{str(run_dir)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
