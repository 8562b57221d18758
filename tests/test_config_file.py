"""A configuration's YAML says one thing, or is refused with the file's name and the line."""

import re
from pathlib import Path

import pytest
from test_refusals import refused

from pretrain import config

_BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("optim: {warmup_steps: 1}\nseed: 1\noptim: {max_lr: 1.0e-3}\n", ": optim stands twice, lines 1 and 3;"),
        ("optim:\n  beta1: 0.9\n  eps: 1.0\n  beta1: 0.8\n", ": beta1 stands twice, lines 2 and 4;"),
        ("data:\n  sources:\n  - {name: a, train: b, name: c}\n", ": name stands twice, in line 3;"),
        ("&a\nmodel: *a\n", ": line 2: *a is an alias;"),
        (_BOMB, ": line 2: *a0 is an alias;"),
        ("seed: &s 1\ntrain: {<<: *s}\n", ": line 2: *s is an alias;"),
        ("run_dir: " + "[" * 5000 + "]" * 5000, ": line 1: more than 100 lists and sections"),
        ("run_dir: " + "{a: " * 3000 + "1" + "}" * 3000, ": line 1: more than 100 lists and sections"),
        ("", " is empty; it must hold keys"),
        ("# nothing\n", " is empty; it must hold keys"),
        ("optim:\n", " holds 'optim:' and no more; it must hold keys"),
        ("- 1\n", " holds '- 1' and no more; it must hold keys"),
        ("optim: {max_lr: [}", " is not YAML: while parsing a flow node"),
        ("# ä".encode("latin-1"), " cannot be read as text ('utf-8' codec can't decode byte 0xe4"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | bytes, said: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused(capsys, "order", "--config", file, "--step", 1).startswith(f"pretrain order: error: {file}{said}")


def test_a_key_that_stands_twice_is_refused_on_the_command_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "max_lr stands twice, in line 1" in refused(capsys, "train", "--optim", "{max_lr: 1.0, max_lr: 2.0}")


@pytest.mark.parametrize("source", ["[a, b]", "5", "abc"])
def test_a_source_must_hold_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: str) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {{sources: [{source}]}}\n")
    line = refused(capsys, "train", "--config", tmp_path / "c.yaml")
    assert re.search(rf"data.sources\": it has {re.escape(str(source)[:1])}.* where keys must stand", line), line
    assert "class" not in line


def test_keys_that_are_alike_in_different_places_and_anchors_alone_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "seed: &s 7\ndata: {sources: [{name: a, train: x}, {name: b, train: y}], seq_len: 8}\n"
    )
    settings = config.parse(["--config", str(tmp_path / "c.yaml"), "--run_dir", "*x"])
    assert (settings.seed, settings.run_dir) == (7, "*x")
    assert [source.name for source in settings.data.sources] == ["a", "b"]
