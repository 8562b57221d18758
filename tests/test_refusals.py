"""What is wrong is said in one line, with the remedy, before the first step; nothing is lost."""

import ast
import inspect
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    pretrain,
    records,
    start,
    tiny_config,
    wait_for,
    write_config,
    write_dataset,
)

from pretrain import cli, sections
from pretrain.__main__ import main

ROOT = Path(__file__).parent.parent


def test_when_no_checkpoint_is_whole_nothing_is_begun_anew(
    capsys: pytest.CaptureFixture[str], straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        state = folder / "state.json"
        state.write_text(state.read_text().replace("1337", "1338"))
    again = ("train", "--config", straight / "config.yaml", "--run_dir", tmp_path / "run")
    for _ in range(2):  # the second start finds them set aside
        error = refused(capsys, *again)
        assert "no whole checkpoint left" in error
        assert "--resume" in error
        assert "corrupt-step-00000020" in error
        assert len(list((tmp_path / "run" / "checkpoints").glob("corrupt-*"))) == 4
    named = straight / "checkpoints" / "step-00000015"
    assert main([*map(str, again), "--resume", str(named)]) == 0
    assert 20 in records(tmp_path / "run", "train")


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run the command in this process; it must end with status 2 and one line on standard error, which is returned."""
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in argv])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_refusal_is_a_status_and_no_traceback(datasets: Path, tmp_path: Path) -> None:
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    for wrong in (["--optim.max_lrr", "1"], ["--train.micro_batch_size", "3"], ["--data.seq_len", "31000"]):
        done = pretrain("train", "--config", config_file, *wrong, check=False)
        assert done.returncode == 2
        assert not done.stdout
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_first_rank_speaks_for_all(
    capsys: pytest.CaptureFixture[str], datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher ends all ranks when one has left: the others wait for the first, and speak if they are still there."""
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli.signal, "signal", lambda number, handler: None)
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    said = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        said[rank] = refused(capsys, "train", "--config", config_file, "--train.micro_batch_size", "3")
    assert waited == [cli.PATIENCE_S]
    assert said["0"].startswith("pretrain train: error: ")
    assert said["1"] == f"rank 1 on {socket.gethostname()}: {said['0']}"


def test_a_rank_that_waits_for_the_first_leaves_in_silence_when_the_launcher_ends_it(tmp_path: Path) -> None:
    patient = (
        "import sys; from pretrain import __main__, cli; cli.PATIENCE_S = 600; sys.exit(__main__.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", patient, "bench", "--config", str(tmp_path / "nowhere.yaml")]
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    waiting = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    status = Path(f"/proc/{waiting.pid}/status")
    while waiting.poll() is None and not _catches(status, signal.SIGTERM):
        time.sleep(0.01)
    waiting.terminate()
    output, _ = waiting.communicate(timeout=60)
    assert (waiting.returncode, output) == (2, "")


def _catches(status: Path, number: signal.Signals) -> bool:
    caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)  # type: ignore[index]
    return bool(caught >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--optim.max_lrr", "3e-4"], ["--optim.max_lrr", "did you mean optim.max_lr?"]),
        (["--optim.max_lr", "fast"], ["optim.max_lr", "float", "fast"]),
        (["--parallel.precision", "fp16"], ["parallel.precision", "bf16", "fp32", "fp16"]),
        (["--train.global_batch_size", "9"], ["9 is not a multiple", "2 x world_size 1 = 2", "nearest: 8 or 10"]),
        (["--model.num_key_value_heads", "3"], ["num_attention_heads 4", "num_key_value_heads 3"]),
        (["--data.seq_len", "64"], ["64 tokens is longer than", "max_position_embeddings 32"]),
        (["--train.stop_after_step", "21"], ["stop_after_step 21", "0 and train.max_steps 20"]),
        (["--optim.warmup_steps", "21"], ["warmup_steps 21", "max_steps 20"]),
        (["--optim.lr_decay_steps", "17"], ["lr_decay_steps 17", "0 and the 16", "max_steps 20", "warmup_steps 4"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "exist"]),
        (["--model.rope_scaling.fctor", "8"], ["'fctor' is not accepted", "did you mean factor?"]),
        (["--model.rope_scaling.low_freq_factor", "2"], ["required: factor"]),
        (["--model.rope_scaling", "llama3"], ["model.rope_scaling", "it has llama3 where keys must stand ("]),
        (["--model.rope_scaling.factor", "0.5"], ["model.rope_scaling.factor is 0.5", "at least 1"]),
        (
            ["--model.rope_scaling", "{factor: 8, low_freq_factor: 4, original_max_position_embeddings: 0}"],
            [
                "rope_scaling.low_freq_factor 4.0 must lie between 0 and high_freq_factor 4.0",
                "rope_scaling.original_max_position_embeddings is 0 tokens; it must lie between 1 and 16777216",
            ],
        ),
        (["--model.vocab_size", "299"], ["300 tokens", "vocab_size is 299", "at least 300"]),
        (["--parallel.accelerator", "cuda"], ["cuda", "0 GPUs", "--parallel.accelerator cpu"]),
        (["--model.vocab_size", "1000000000000"], ["model.vocab_size is 1000000000000", "at most 16777216"]),
        (["--model.hidden_size", str(10**20)], [f"model.hidden_size is {10**20}", "at most 1048576"]),
        (["--model.intermediate_size", "1000000000000"], ["model.intermediate_size is", "at most 4194304"]),
        (["--model.num_hidden_layers", "1000000000000"], ["model.num_hidden_layers is", "at most 10000"]),
        (["--model.max_position_embeddings", "1000000000000"], ["max_position_embeddings is", "at most 16777216"]),
        (["--train.global_batch_size", "1000000000000"], ["train.global_batch_size is", "at most 16777216"]),
        (["--data.num_workers", str(10**20)], [f"data.num_workers is {10**20}", "at most 1024"]),
        (["--init_from", "a\0b"], ["init_from is 'a\\x00b'", "no path holds a NUL"]),
        (["--train.max_steps", "0", "--data.num_workers", "-1"], ["train.max_steps is 0", "data.num_workers is -1"]),
    ],
)
def test_what_is_wrong_is_one_line_with_the_remedy(
    capsys: pytest.CaptureFixture[str], datasets: Path, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    line = refused(capsys, "train", "--config", config_file, *overrides)
    assert line.startswith("pretrain train: error: ")
    for word in words:
        assert word in line, line
    assert not (tmp_path / "run").exists(), "nothing is left behind by a refused start"


def test_a_run_dir_that_no_folder_can_have_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], datasets: Path, tmp_path: Path
) -> None:
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "r\0n"))
    assert "run_dir is " in refused(capsys, "doctor", "--config", config_file)


def test_data_that_does_not_fit_is_one_line_with_the_remedy(
    capsys: pytest.CaptureFixture[str], datasets: Path, tmp_path: Path
) -> None:
    def with_source_b(train: Path) -> str:
        tree = tiny_config(datasets, tmp_path / "run")
        tree["data"]["sources"][1]["train"] = str(train)
        return refused(capsys, "train", "--config", write_config(tmp_path / "c.yaml", tree))

    assert "nowhere" in with_source_b(tmp_path / "nowhere")
    assert "another tokenizer" in with_source_b(write_dataset(tmp_path / "other", 500, 1, tokenizer="b"))
    tree = tiny_config(datasets, tmp_path / "run")
    tree["optim"]["max_lrr"] = 1.0
    assert "max_lrr" in refused(capsys, "train", "--config", write_config(tmp_path / "c.yaml", tree))
    (tmp_path / "c.yaml").write_text("optim: {max_lr: [}")
    assert "parsing" in refused(capsys, "train", "--config", tmp_path / "c.yaml")


def spoil_shard(folder: Path, how: str) -> Path:
    """Damage the second shard of a dataset; its manifest stays as it was."""
    first, second = (folder / "shards" / f"part-{n}.npy" for n in (0, 1))
    content = bytearray(second.read_bytes())
    if how == "truncated":
        content = content[:-2]
    elif how == "flipped":
        content[-100] ^= 1
    elif how == "swapped":
        content[128:] = first.read_bytes()[128 : 128 + len(content) - 128]
    second.write_bytes(content)
    return second


@pytest.mark.parametrize("how", ["truncated", "flipped", "swapped"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_spoilt_shard_is_named_before_the_first_step(
    capsys: pytest.CaptureFixture[str], datasets: Path, tmp_path: Path, how: str, resumed: bool
) -> None:
    shutil.copytree(datasets / "a", tmp_path / "a")
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 3}, optim={"warmup_steps": 1})
    tree["data"]["sources"][0] |= {
        "train": str(tmp_path / "a" / "train"),
        "validation": str(tmp_path / "a" / "validation"),
    }
    config_file = write_config(tmp_path / "c.yaml", tree)
    if resumed:  # verified before, and found good
        pretrain("train", "--config", config_file, "--train.max_steps", 2)
        assert (tmp_path / "run" / "verified.json").is_file()
    shard = spoil_shard(tmp_path / "a" / "train", how)
    for _ in range(2):  # what was read and found bad is not remembered as good
        assert shard.name in refused(capsys, "train", "--config", config_file)


def test_a_second_job_on_a_run_folder_is_refused(
    capsys: pytest.CaptureFixture[str], datasets: Path, tmp_path: Path
) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 5000})
    config_file = write_config(tmp_path / "c.yaml", tree)
    process = start(config_file)
    wait_for(tmp_path / "run", 2, process)
    line = refused(capsys, "train", "--config", config_file)
    assert f"process {process.pid} on" in line
    assert "another run_dir" in line
    process.kill()
    process.communicate()
    last = max(records(tmp_path / "run", "train")) + 2
    pretrain("train", "--config", config_file, "--train.max_steps", last)  # the dead one's lock is in nobody's way
    assert last in records(tmp_path / "run", "train")


def test_a_run_that_is_past_its_end_says_so(capsys: pytest.CaptureFixture[str], straight: Path) -> None:
    line = refused(capsys, "train", "--config", straight / "config.yaml", "--train.max_steps", 10)
    assert "step-00000020" in line
    assert "train.max_steps is 10" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--seed", "2"], ["data seed = 1337", "says 2"]),
        (["--model.intermediate_size", "128"], ["model intermediate_size = 160", "says 128"]),
        (["--train.global_batch_size", "16"], ["global_batch_size = 8", "says 16"]),
        (["--data.seq_len", "16"], ["data seq_len = 32", "says 16", "cut in other places"]),
    ],
)
def test_a_resume_that_would_not_be_the_same_run_is_refused(
    capsys: pytest.CaptureFixture[str], straight: Path, overrides: list[str], words: list[str]
) -> None:
    line = refused(capsys, "train", "--config", straight / "config.yaml", *overrides)
    for word in words:
        assert word in line, line


def test_help_explains_every_field_with_its_unit() -> None:
    """The docstring under each field of the configuration is its help, and that of a number names the unit."""
    of_lists = (f"--{key}.help" for key in ("model.rope_scaling", "validation.sets", "train.leave_out"))
    texts = (pretrain("train", option).stdout for option in ("--help", *of_lists))
    printed = "".join("".join(texts).split())
    tree = ast.parse(inspect.getsource(sections))
    fields = 0
    for section in (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name not in ("SourceConfig", "StageConfig")
    ):
        for field, doc in itertools.pairwise(section.body):
            if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation).endswith("Config"):
                continue
            assert isinstance(doc, ast.Expr), f"{section.name}.{field.target.id} has no docstring"
            text = ast.literal_eval(doc.value)
            assert "".join(text.split()) in printed, f"the help of {section.name}.{field.target.id} is not printed"
            if ast.unparse(field.annotation) in ("int", "float"):
                assert re.search(UNITS, text), f"{section.name}.{field.target.id}: in which unit? {text}"
            fields += 1
    assert fields > 35


UNITS = (
    r"\((steps|seconds|minutes|hours|lines|tokens|features|no unit|per step|times the|L2 norm|whole)|[Ss]equences"
    r"|[Tt]okens|layers|heads|processes|threads|restarts|[Cc]heckpoints"
)


@pytest.mark.parametrize(("command", "module"), [("pretrain", "pretrain"), ("data-prep", "data_prep")])
def test_without_its_packages_a_command_says_what_installs_them(command: str, module: str, tmp_path: Path) -> None:
    """A Python that has none, as in a fresh clone."""
    bare = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "]
    bare[-1] += (
        f"from {module}.__main__ import main; sys.exit(main(['{'train' if command == 'pretrain' else 'stats'}']))"
    )
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(rf"{command}: error: \w+ is not installed here; .*`make setup`.*\n", done.stderr)
