"""Runs as a user starts them: on one rank and on two, stopped and started again, and refused where something is wrong."""

import ast
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import pretrain, tiny_config, write_config, write_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import config, data, preparation, trainer
from pretrain.__main__ import main
from pretrain.progress import Display


def records(run_dir: Path, kind: str) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == kind}


def trajectory(run_dir: Path) -> list[tuple]:
    """What must not change: exact floats of every step, and of every validation."""
    steps = [
        (step, r["data_hash"], r["loss"], r["grad_norm"], r["lr"])
        for step, r in sorted(records(run_dir, "train").items())
    ]
    return steps + [(step, r["losses"]) for step, r in sorted(records(run_dir, "validation").items())]


@pytest.fixture(scope="module")
def straight(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on one rank, never disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    pretrain("train", "--config", write_config(folder / "c.yaml", tiny_config(datasets, folder / "run")))
    return folder / "run"


def test_the_run_learns_and_says_what_it_did(straight: Path) -> None:
    start, train, val = (records(straight, kind) for kind in ("start", "train", "validation"))
    assert sorted(train) == list(range(1, 21))
    assert sorted(val) == [0, 10, 20]
    for name in ("a", "b"):
        assert val[20]["losses"][name] < val[0]["losses"][name] - 0.3
        assert 0 < start[0]["sources"][name]["unigram_entropy"] < 5.71  # ln 300
    assert start[0]["sources"]["a"]["share"] == pytest.approx(0.7)
    assert train[20]["tokens"] == 20 * 8 * 32
    assert train[7]["tokens_per_sec"] == pytest.approx(8 * 32 / train[7]["step_time_s"])
    assert train[7]["mfu_m1_pct"] is None, "a CPU has no datasheet peak"
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (5, 10, 15, 20)]
    assert (straight / "config.yaml").is_file()
    assert (straight / "tokenizer").is_dir()


def test_twice_is_the_same_to_the_bit(datasets: Path, straight: Path, tmp_path: Path) -> None:
    pretrain("train", "--config", write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run")))
    assert trajectory(tmp_path / "run") == trajectory(straight)


def test_two_ranks_under_torchrun_train_the_same_model(datasets: Path, straight: Path, tmp_path: Path) -> None:
    """FSDP2 over two processes: losses within 1e-5 for 20 steps, and the norm is that of the whole gradient."""
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    pretrain("train", "--config", config_file, ranks=2)
    assert records(tmp_path / "run", "start")[0]["world_size"] == 2
    one, two = records(straight, "train"), records(tmp_path / "run", "train")
    assert sorted(two) == sorted(one) == list(range(1, 21))
    for step in one:
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], abs=1e-5)
        assert two[step]["grad_norm"] == pytest.approx(one[step]["grad_norm"], rel=1e-4)
    for step, r in records(straight, "validation").items():
        assert records(tmp_path / "run", "validation")[step]["losses"] == pytest.approx(r["losses"], abs=1e-5)
    shards = list((tmp_path / "run" / "checkpoints" / "step-00000020" / "tensors").glob("*.distcp"))
    assert len(shards) == 2, "each rank writes its part"


@pytest.mark.parametrize("micro_batch", [1, 8])
def test_the_micro_batch_does_not_change_the_run(
    datasets: Path, straight: Path, tmp_path: Path, micro_batch: int
) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"micro_batch_size": micro_batch, "max_steps": 20})
    pretrain("train", "--config", write_config(tmp_path / "c.yaml", tree))
    one, other = records(straight, "train"), records(tmp_path / "run", "train")
    assert all(other[step]["loss"] == pytest.approx(one[step]["loss"], abs=1e-5) for step in one)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_follows_fp32(datasets: Path, straight: Path, tmp_path: Path, ranks: int) -> None:
    """Autocast on one device, FSDP2's policy on two: near the fp32 run, and not it."""
    tree = tiny_config(datasets, tmp_path / "run", parallel={"precision": "bf16"})
    pretrain("train", "--config", write_config(tmp_path / "c.yaml", tree), ranks=ranks)
    one, other = records(straight, "train"), records(tmp_path / "run", "train")
    assert all(other[step]["loss"] == pytest.approx(one[step]["loss"], abs=2e-2) for step in one)
    assert any(abs(other[step]["loss"] - one[step]["loss"]) > 1e-5 for step in one), "bf16 was not used"


def start(config_file: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pretrain", "train", "--config", str(config_file), *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and step in records(run_dir, "train"):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached:\n{process.communicate()[0]}")


def test_ctrl_c_saves_and_the_next_start_goes_on(datasets: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group, loader workers included."""
    sections = {"train": {"max_steps": 250}, "data": {"num_workers": 2}, "checkpoint": {"every_steps": 0}}
    straight = write_config(tmp_path / "s.yaml", tiny_config(datasets, tmp_path / "straight", **sections))
    pretrain("train", "--config", straight)
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", **sections))
    process = start(config_file)
    wait_for(tmp_path / "run", 30, process)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    stopped = max(records(tmp_path / "run", "train"))
    assert 30 <= stopped < 250
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()

    second = pretrain("train", "--config", config_file)
    assert f"resumed after step {stopped}" in second.stdout
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "straight")


def test_a_killed_run_goes_on_from_its_last_checkpoint(datasets: Path, tmp_path: Path) -> None:
    sections = {"train": {"max_steps": 300}, "checkpoint": {"every_steps": 10, "keep_last": 2}}
    straight = write_config(tmp_path / "s.yaml", tiny_config(datasets, tmp_path / "straight", **sections))
    pretrain("train", "--config", straight)
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", **sections))
    for step in (25, 67):
        process = start(config_file)
        wait_for(tmp_path / "run", step, process)
        process.kill()
        process.wait()
        process.stdout.close()
    pretrain("train", "--config", config_file)
    resumed = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(resumed) > 300 + 31 + 3, "some steps were trained twice"
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "straight")
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000290", "step-00000300"]


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(2, 1), (1, 2)])
def test_a_checkpoint_goes_on_on_another_number_of_ranks(
    datasets: Path, straight: Path, tmp_path: Path, saved_on: int, resumed_on: int
) -> None:
    first = straight
    if saved_on != 1:
        first = tmp_path / "first"
        pretrain("train", "--config", write_config(tmp_path / "f.yaml", tiny_config(datasets, first)), ranks=saved_on)
    name = "checkpoints/step-00000010"
    shutil.copytree(first / name, tmp_path / "run" / name)
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    pretrain("train", "--config", config_file, ranks=resumed_on)
    one, other = records(straight, "train"), records(tmp_path / "run", "train")
    assert sorted(other) == list(range(11, 21))
    assert all(other[step]["loss"] == pytest.approx(one[step]["loss"], abs=1e-5) for step in other)


def test_a_finished_run_started_again_does_nothing(straight: Path) -> None:
    before = trajectory(straight)
    pretrain("train", "--config", straight / "config.yaml")
    assert trajectory(straight) == before


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run the command in this process; it must end with status 2 and one line on standard error, which is returned."""
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in argv])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_refusal_is_a_status_and_no_traceback(datasets: Path, tmp_path: Path) -> None:
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    for wrong in (["--optim.max_lrr", "1"], ["--train.micro_batch_size", "3"], ["--data.seq_len", "31000"]):
        done = pretrain("train", "--config", config_file, *wrong, check=False)
        assert done.returncode == 2
        assert not done.stdout
        assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--optim.max_lrr", "3e-4"], ["--optim.max_lrr", "did you mean optim.max_lr?"]),
        (["--optim.max_lr", "fast"], ["optim.max_lr", "float", "fast"]),
        (["--parallel.precision", "fp8"], ["parallel.precision", "bf16", "fp32", "fp8"]),
        (["--train.global_batch_size", "9"], ["9 is not a multiple", "2 x world_size 1 = 2", "nearest: 8 or 10"]),
        (["--model.num_key_value_heads", "3"], ["num_attention_heads 4", "num_key_value_heads 3"]),
        (["--data.seq_len", "64"], ["64 tokens is longer than", "max_position_embeddings 32"]),
        (["--optim.warmup_steps", "21"], ["warmup_steps 21", "max_steps 20"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "exist"]),
        (["--model.vocab_size", "299"], ["300 tokens", "vocab_size is 299", "at least 300"]),
        (["--parallel.accelerator", "cuda"], ["cuda", "0 GPUs", "--parallel.accelerator cpu"]),
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
    pretrain("train", "--config", config_file, "--train.max_steps", 6, "--data.allow_change", "true")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--seed", "2"], ["data seed = 1337", "says 2"]),
        (["--model.intermediate_size", "128"], ["model intermediate_size = 160", "says 128"]),
        (["--train.global_batch_size", "16"], ["global_batch_size = 8", "says 16"]),
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
    printed = "".join(pretrain("train", "--help").stdout.split())
    tree = ast.parse(inspect.getsource(config))
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
    r"\((steps|tokens|features|no unit|per step|times the|L2 norm|whole)|[Ss]equences|[Tt]okens|layers|heads|processes"
    r"|[Cc]heckpoints"
)


def test_a_step_waits_for_the_device_only_where_it_is_logged(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would synchronise on a GPU is an operator that returns a number: none in the step, one transfer in a logged line."""

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen[str(function)] += 1
            return function(*args, **(kwargs or {}))

    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    run = preparation.prepare(config.load(config_file))
    micro_batches = iter(
        data.train_loader(data.MicroBatches(run.sources, run.mixture, 32, 2, 0, 1), 1, 9, 0, pin=False)
    )
    seen: Counter[str] = Counter()
    trainer.optimizer_step(run, micro_batches)  # AdamW makes its state in the first step
    with Operators():
        for _ in range(3):
            result = trainer.optimizer_step(run, micro_batches)
    assert seen["aten._fused_adamw_.default"] == 3 * 2, "the operators of the step were not seen"
    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "_to_cpu")
    assert not [name for name in seen if any(word in name for word in waits)]

    transfers = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: transfers.append(tensor.shape) or tolist(tensor))
    seen.clear()
    with Operators():
        trainer._log_step(run, Display(20, 4, show=False), result)
    assert transfers == [(3,)]
    assert "aten._local_scalar_dense.default" not in seen
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["loss"] == result.loss.item()


def test_tensorboard_gets_the_numbers(datasets: Path, tmp_path: Path) -> None:
    tree = tiny_config(datasets, tmp_path / "run", logger="tensorboard", train={"max_steps": 4})
    pretrain("train", "--config", write_config(tmp_path / "c.yaml", tree))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert logged == {
        step: pytest.approx(r["loss"], rel=1e-6) for step, r in records(tmp_path / "run", "train").items()
    }
    assert len(logged) == 4
    assert "validation/losses/a" in events.Tags()["scalars"]
    assert "train/tokens_per_sec_per_gpu" in events.Tags()["scalars"]


def test_wandb_works_offline_and_its_key_is_written_nowhere(datasets: Path, tmp_path: Path) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 4})
    secret = "0123456789abcdef" * 2 + "01234567"
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_API_KEY": secret, "WANDB_SILENT": "true"}
    done = pretrain(
        "train", "--config", write_config(tmp_path / "c.yaml", tree), "--logger", "wandb", env=environment, cwd=tmp_path
    )
    (written,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    assert b"tokens_per_sec_per_gpu" in written.read_bytes()
    assert secret not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
