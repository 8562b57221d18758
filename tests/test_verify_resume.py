"""`pretrain verify-resume` and `pretrain order`, as a user runs them; and that the former can fail."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import pretrain, tiny_config, write_config

from data_prep.shard import TokenDataset
from pretrain import checkpoint, config, data, order, processes, verify_resume


@pytest.fixture(scope="module")
def verified(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a real verification, on one rank and on two as is the default, with a kill, and what it printed."""
    folder = tmp_path_factory.mktemp("verify")
    left_out = [{"first_step": 5, "last_step": 6}, {"first_step": 18, "last_step": 19}]
    early = {
        "train": {"stop_after_step": 7, "leave_out": left_out},
        "optim": {"lr_decay_steps": 5},
        "validation": {"sets": [{"name": "extra", "path": str(datasets / "b" / "validation")}]},
    }  # none is of what is proved
    config_file = write_config(folder / "c.yaml", tiny_config(datasets, folder / "run", **early))
    done = pretrain(
        "verify-resume", "--config", config_file, "--steps", 18, "--kills", 1, "--seed", 32, "--out", folder / "out"
    )
    return folder, done.stdout


def test_a_resume_is_the_same_run(verified: tuple[Path, str]) -> None:
    folder, printed = verified
    assert "A resume is the same run" in printed
    assert printed.count("bit-identical") == 3
    assert printed.count("within the reduction order") == 2
    assert printed.count("holds") == 5
    assert "FAIL" not in printed
    worlds = {"straight": [1], "killed": [1, 1], "killed-on-2": [2, 2], "elsewhere": [1, 2]}
    for name, expected in worlds.items():
        lines = map(json.loads, (folder / "out" / name / "metrics.jsonl").read_text().splitlines())
        marks = [line for line in lines if line["kind"] in ("start", "stop")]
        assert [mark["kind"] for mark in marks] == ["start"] * len(expected) + ["stop"], f"{name}: killed, not stopped"
        assert [mark["world_size"] for mark in marks[:-1]] == expected
        assert all(2 <= mark["step"] < 18 for mark in marks[1:-1]), f"{name}: from a checkpoint, before the end"


def test_ctrl_c_leaves_no_rank_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts it, in a session of its own."""
    rank = [sys.executable, "-c", "import time; time.sleep(600)"]
    agent = [sys.executable, "-c", f"import subprocess; subprocess.Popen({rank}, start_new_session=True).wait()"]
    trial, ranks = verify_resume.Trial(tmp_path / "c.yaml", [], 8, tmp_path, 0.0), []

    def interrupted(run_dir: Path, starts: int, step: int, process: subprocess.Popen) -> float:
        while not ranks:
            ranks.extend(processes.descendants(process.pid))
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_resume.Trial, "_command", lambda *_: agent)
    monkeypatch.setattr(verify_resume, "_wait_for_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trial.run("killed", [2, 2], [3.5])
    assert all(processes.stat(pid)[:1] in ([], ["Z"]) for pid in ranks)


def test_what_is_not_the_same_run_is_said_and_is_a_status(
    verified: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = verified
    shutil.copytree(folder / "out", tmp_path / "out")
    path = tmp_path / "out" / "killed-on-2" / "metrics.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"step": 13,' not in line) + "\n")
    monkeypatch.setattr(verify_resume.Trial, "run", lambda self, name, *_: self.out / name.replace(" ", "-"))
    words = ["--config", str(folder / "c.yaml"), "--steps", "18", "--kills", "1", "--out", str(tmp_path / "out")]
    assert verify_resume.main(words) == 1
    said = capsys.readouterr().out
    assert said.count("holds") == 4
    assert said.splitlines()[-1].startswith("FAILED: killed on 2; ")


@pytest.mark.parametrize(
    ("gpus", "batch", "strategy", "expected"),
    [
        (0, 8, "auto", [1, 2]),
        (0, 7, "auto", [1]),
        (1, 8, "auto", [1]),
        (2, 8, "auto", [2, 1]),
        (8, 16, "auto", [8, 4]),
        (8, 12, "auto", [6, 3]),
        (8, 16, "single", [1]),
    ],
)
def test_it_takes_the_gpus_that_there_are(
    gpus: int, batch: int, strategy: str, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In micro-batches of two. One GPU of eight may not hold the model."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    parallel = {"accelerator": "auto", "strategy": strategy}
    tree = tiny_config(tmp_path, tmp_path / "run", train={"global_batch_size": 2 * batch}, parallel=parallel)
    assert verify_resume._numbers_of_ranks(config.load(write_config(tmp_path / "c.yaml", tree))) == expected


def test_a_folder_of_something_else_is_left_alone(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that happens to have a `straight` in it, which would be replaced."""
    kept = tmp_path / "out" / "straight" / "thesis.tex"
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    with pytest.raises(SystemExit, match="2"):
        verify_resume.main(["--config", str(config_file), "--out", str(tmp_path / "out")])
    assert f"--out is {tmp_path / 'out'}, which holds something other than such runs" in capsys.readouterr().err
    assert kept.read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "moved", "status", "message"),
    [
        (["--kills", "-1"], "", 2, "--kills -1"),
        (["--ranks", "[0]"], "", 2, "--ranks [0]; at least 4 steps, no kills and one number of at least 1"),
        (["--ranks", "[1, -1]"], "", 2, "--ranks [1, -1]; at least"),
        (["--overrides", "[--model.vocabsize=1]"], "", 2, "pretrain verify-resume: error: unrecognized arguments"),
        (["--ranks", "[1]"], "nowhere", 1, "straight ended with status 2; see"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    datasets: Path,
    tmp_path: Path,
    options: list[str],
    moved: str,
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = tiny_config(datasets, tmp_path / "run")
    tree["data"]["sources"][0]["train"] += moved
    with pytest.raises(SystemExit) as stopped:
        verify_resume.main(["--config", str(write_config(tmp_path / "c.yaml", tree)), *options])
    assert stopped.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.long
def test_on_other_numbers_of_ranks_too_in_bf16(datasets: Path, tmp_path: Path) -> None:
    config_file = write_config(
        tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", parallel={"precision": "bf16"})
    )
    words = ("--steps", 8, "--kills", 1, "--ranks", "[1,2]", "--out", tmp_path / "out")
    printed = pretrain("verify-resume", "--config", config_file, *words).stdout
    assert printed.count("holds") == 5
    assert printed.count("within the reduction order") == 2


def test_other_numbers_of_ranks_may_differ_by_rounding_and_no_more() -> None:
    outcome = verify_resume.Outcome(
        "elsewhere", "1, 2", 1, [4], True, False, 4e-3, False, verify_resume.LOSS_TOLERANCE["bf16"]
    )
    assert outcome.holds
    for change in (
        {"loss_difference": 6e-3},
        {"tolerance": verify_resume.LOSS_TOLERANCE["fp32"]},
        {"same_sequences": False},
        {"loss_difference": float("inf")},
        {"must_be_same_bits": True},
        {"resumed": [0]},
        {"resumed": []},
    ):
        assert not dataclasses.replace(outcome, **change).holds, change


@pytest.mark.parametrize("key", ["loss", "grad_norm", "data_hash", "lr"])
def test_one_bit_in_one_step_is_a_failure(verified: tuple[Path, str], tmp_path: Path, key: str, monkeypatch) -> None:
    folder, _ = verified
    for name in ("straight", "killed"):
        shutil.copytree(folder / "out" / name, tmp_path / name)
    path = tmp_path / "killed" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    last = next(r for r in reversed(records) if r["kind"] == "train" and r["step"] == 17)
    last[key] = "0" * 16 if key == "data_hash" else last[key] * (1 + 2**-50)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setattr(verify_resume.Trial, "run", lambda self, name, ranks, stops: self.out / name)
    trial = verify_resume.Trial(folder / "c.yaml", [], 18, tmp_path, 0.0)
    assert trial._compare("straight", tmp_path / "straight", [1], []).holds
    outcome = trial._compare("killed", tmp_path / "straight", [1], [])
    assert not outcome.holds
    assert (not outcome.same_sequences) == (key == "data_hash")


def test_one_bit_in_the_last_checkpoint_is_a_failure(
    verified: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkpoint that is whole by its manifest."""
    folder, _ = verified
    shutil.copytree(folder / "out" / "straight", tmp_path / "again")
    last = tmp_path / "again" / "checkpoints" / "step-00000018"
    data_file = next((last / "tensors").glob("*.distcp"))
    content = bytearray(data_file.read_bytes())
    place = len(content) // 2
    content[place] ^= 1
    data_file.write_bytes(content)
    manifest = json.loads((last / "manifest.json").read_text())
    manifest["files"][f"tensors/{data_file.name}"] = checkpoint.describe(data_file)
    (last / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(verify_resume.Trial, "run", lambda self, name, ranks, stops: self.out / name)
    trial = verify_resume.Trial(folder / "c.yaml", [], 18, tmp_path, 0.0)
    outcome = trial._compare("again", folder / "out" / "straight", [1], [])
    assert (outcome.same_sequences, outcome.loss_difference, outcome.holds) == (True, 0.0, False)


@pytest.mark.parametrize(
    ("ending", "status", "message"),
    [
        ("stop", 0, "killed was over before it could be killed, 3 times: give --steps more than 8"),
        ("train", 1, "killed ended with status 1"),
    ],
)
def test_a_kill_that_did_not_take_place_is_none(
    ending: str, status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was over, or broke down by itself."""
    lines = [{"kind": "start", "step": 0}, {"kind": "train", "step": 8}, {"kind": ending, "step": 8}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    script = f"import pathlib, sys; pathlib.Path(sys.argv[1], 'metrics.jsonl').write_text({text!r}); sys.exit({status})"
    trial = verify_resume.Trial(tmp_path / "c.yaml", [], 8, tmp_path, 0.0)
    monkeypatch.setattr(
        trial.__class__, "_command", lambda self, folder, n: [sys.executable, "-c", script, str(folder)]
    )
    monkeypatch.setattr(checkpoint, "committed", lambda run_dir: [(1, run_dir)] if status else [])
    with pytest.raises(RuntimeError, match=message):
        trial.run("killed", [1, 1], [3.5])


def test_a_lost_step_is_a_failure(verified: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = verified
    shutil.copytree(folder / "out" / "straight", tmp_path / "killed")
    path = tmp_path / "killed" / "metrics.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"step": 13,' not in line) + "\n")
    monkeypatch.setattr(verify_resume.Trial, "run", lambda self, name, ranks, stops: self.out / name)
    trial = verify_resume.Trial(folder / "c.yaml", [], 18, tmp_path, 0.0)
    assert not trial._compare("killed", folder / "out" / "straight", [1], []).holds


def test_order_shows_what_a_step_is_made_of(verified: tuple[Path, str]) -> None:
    """The table's sequences are those whose fingerprint the run logged for that step."""
    folder, _ = verified
    settings = config.load(folder / "c.yaml")
    sources = data.open_sources(settings.data, settings.model.vocab_size)
    mixture = data.make_mixture(sources, settings.data, settings.seed, settings.train.global_batch_size)
    table = order.step_table(settings, sources, mixture, 7)
    columns = {column.header: list(column.cells) for column in table.columns}
    rows = [(s, int(i)) for s, i in zip(columns["source"], columns["sequence"]) if s]
    assert len(rows) == settings.train.global_batch_size
    by_name = {source.name: source.train for source in sources}
    total = sum(data.data_hash(by_name[s].sequences([i], settings.data.seq_len)) for s, i in rows)
    logged = verify_resume.read_trajectory(folder / "out" / "straight")[7]["data_hash"]
    assert f"{total % 2**63:016x}" == logged
    assert set(columns["file"]) <= {f"part-{n}.txt" for n in range(3)}
    assert sum(int(n) for n in columns["tokens"]) == 8 * 33
    shown, slot = {}, 0
    for place, *cells in zip(columns["slot"], columns["file"], columns["line"], columns["tokens"]):
        slot = int(place) if place else slot
        shown.setdefault(slot, []).append(tuple(cells))
    for slot, (name, number) in enumerate(rows):
        parts = by_name[name].documents(number * settings.data.seq_len, settings.data.seq_len + 1)
        lines = [f"{part.line:,}" if part.line is not None else f"document {part.document + 1:,}" for part in parts]
        assert shown[slot] == [(part.source_file, line, f"{part.tokens:,}") for part, line in zip(parts, lines)]


def test_order_is_held_against_what_the_run_has_read(verified: tuple[Path, str], tmp_path: Path) -> None:
    """Another seed, as after an allowed change: the documents shown would not be those of that step."""
    folder, _ = verified
    run_dir = folder / "out" / "straight"
    words = ("order", "--config", run_dir / "config.yaml", "--step", 7)
    logged = verify_resume.read_trajectory(run_dir)[7]["data_hash"]
    assert pretrain(*words).stdout.endswith(f"{run_dir} has read these sequences: data_hash {logged}\n")
    changed = tmp_path / "c.yaml"
    settings = config.load(run_dir / "config.yaml")
    config.write(dataclasses.replace(settings, seed=settings.seed + 1), changed)
    refused = pretrain("order", "--config", changed, "--step", 7, check=False)
    assert refused.returncode == 2
    assert "has read other sequences in step 7: it logged data_hash " + logged in refused.stderr
    assert refused.stdout.count("\n") > 8, "they are shown all the same"
    elsewhere = config.load(folder / "c.yaml")
    sources = data.open_sources(elsewhere.data, elsewhere.model.vocab_size)
    mixture = data.make_mixture(sources, elsewhere.data, elsewhere.seed, elsewhere.train.global_batch_size)
    assert order.compare_with_log(elsewhere, sources, mixture, 7) is None, "a run that has not begun"


def test_order_as_a_command(datasets: Path, tmp_path: Path) -> None:
    stages = [{"first_step": 11, "weights": {"b": 1}}]
    tree = tiny_config(datasets, tmp_path / "run", data={"stages": stages}, train={"max_steps": 30})
    config_file = write_config(tmp_path / "c.yaml", tree)
    shown = pretrain("order", "--config", config_file, "--summary").stdout
    assert "30 steps, 7,680 tokens" in shown
    told = {tuple(re.findall(r"[\w.,%]+", line)) for line in shown.splitlines()}
    tokens = {name: TokenDataset(datasets / name / "train").num_tokens for name in "ab"}
    for first, name, share, sequences in (("1", "a", "70.00%", 56), ("11", "b", "100.00%", 160), ("all", "b", "", 184)):
        epochs = f"{sequences / ((tokens[name] - 1) // 32):.3f}"
        assert (first, name, *filter(None, [share]), f"{sequences * 32:,}", f"{tokens[name]:,}", epochs) in told, shown
    assert "70.00%" in shown
    assert "100.00%" in shown
    assert pretrain("order", "--config", config_file, "--step", 12).stdout.count(" b ") == 8
    assert "1 to 30" in pretrain("order", "--config", config_file, "--step", 31, check=False).stderr
