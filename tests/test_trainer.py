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
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TINY_MODEL, pretrain, tiny_config, write_config, write_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import checkpoint, config, data, preparation, trainer
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


@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_are_those_of_a_plain_loop(datasets: Path, tmp_path: Path, tied: bool) -> None:
    """The trainer's own step against transformers' model in a loop of torch's parts: warm-up, cosine, clipping, accumulation."""
    tree = tiny_config(datasets, tmp_path / "run", model={"tie_word_embeddings": tied}, optim={"max_grad_norm": 1.5})
    run = preparation.prepare(config.load(write_config(tmp_path / "c.yaml", tree)))
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**TINY_MODEL, "rms_norm_eps": 1e-5}, tie_word_embeddings=tied)
    )
    theirs.load_state_dict(run.model.module.state_dict(), strict=not tied)
    plain = [p for n, p in theirs.named_parameters() if p.ndim == 1 or "embed" in n]
    decayed = [p for n, p in theirs.named_parameters() if not (p.ndim == 1 or "embed" in n)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    warmup = torch.optim.lr_scheduler.LinearLR(reference, 1 / 4, 1.0, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=16, eta_min=3e-4)
    scheduler = torch.optim.lr_scheduler.SequentialLR(reference, [warmup, cosine], milestones=[3])
    micro_batches = data.MicroBatches(run.sources, run.mixture, 32, 2, 0, 1)
    batches = data.train_loader(micro_batches, 1, 20, 0, pin=False)
    again = iter(batches)
    taken, clipped = iter(batches), 0
    for _ in range(20):
        expected = 0.0
        for _ in range(4):
            tokens, _ = next(again)
            logits = theirs(input_ids=tokens[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / 4
            loss.backward()
            expected += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.5).item()
        result = trainer.optimizer_step(run, taken)
        assert result.loss.item() == pytest.approx(expected, abs=1e-4)
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-3)
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9)
        clipped += norm > 1.5
        reference.step()
        scheduler.step()
        reference.zero_grad()
    assert clipped >= 5, "the clipping never acted"
    run.at_end.close()


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_saves_though_loaders_get_it_too(
    datasets: Path, tmp_path: Path, number: signal.Signals
) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 2000}, data={"num_workers": 2})
    process = start(write_config(tmp_path / "c.yaml", tree))
    wait_for(tmp_path / "run", 6, process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    stopped = max(records(tmp_path / "run", "train"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()


def test_a_signal_to_one_rank_stops_all_after_the_same_step(datasets: Path, tmp_path: Path) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 4000}, checkpoint={"every_steps": 0})
    config_file = write_config(tmp_path / "c.yaml", tree)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "pretrain",
        "train",
    ]
    process = subprocess.Popen(
        [*command, "--config", str(config_file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(tmp_path / "run", 10, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert "stopped by SIGTERM after step" in output
    stopped = max(records(tmp_path / "run", "train"))
    assert 10 <= stopped < 4000
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()


def test_gradients_that_stay_infinite_end_the_run(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are borne and counted; `max_skipped_steps` in a row are not. What is logged stays JSON."""
    config_file = write_config(
        tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", train={"max_skipped_steps": 3})
    )
    run = preparation.prepare(config.load(config_file))
    before = [p.clone() for p in run.model.parameters()]
    step_of, bad = run.fabric.backward, {3, 6, 7, 8}

    def backward(loss: torch.Tensor) -> None:
        step_of(loss * (float("nan") if run.step + 1 in bad else 1.0))

    monkeypatch.setattr(run.fabric, "backward", backward)
    with pytest.raises(FloatingPointError, match=r"last 3 steps up to step 8 .*pretrain order --config .* --step 8"):
        trainer.train(run)
    logged = records(tmp_path / "run", "train")
    assert {step: r["skipped_steps"] for step, r in logged.items()} == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 3, 8: 4}
    assert logged[3]["grad_norm"] is None
    assert logged[5]["grad_norm"] > 0
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(run.model.parameters(), before))


def test_when_no_checkpoint_is_whole_nothing_is_begun_anew(
    capsys: pytest.CaptureFixture[str], straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        state = folder / "state.json"
        state.write_text(state.read_text().replace("1337", "1338"))
    with pytest.raises(SystemExit):
        main(["train", "--config", str(straight / "config.yaml"), "--run_dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert "no whole checkpoint left" in error
    assert "--resume" in error
    assert len(list((tmp_path / "run" / "checkpoints").glob("corrupt-*"))) == 4


def test_resume_picks_a_checkpoint(datasets: Path, straight: Path, tmp_path: Path) -> None:
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    done = pretrain("train", "--config", config_file, "--resume", straight / "checkpoints" / "step-00000015")
    assert "resumed after step 15" in done.stdout
    got, expected = records(tmp_path / "run", "train"), records(straight, "train")
    assert sorted(got) == [16, 17, 18, 19, 20]
    assert all(got[step]["loss"] == expected[step]["loss"] for step in got)


@pytest.mark.parametrize("kind", ["checkpoint", "hugging face"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_init_from_takes_the_weights_and_nothing_else(
    datasets: Path, straight: Path, tmp_path: Path, kind: str, ranks: int
) -> None:
    source = straight / "checkpoints" / "step-00000020"
    if kind != "checkpoint":
        source = write_hf_folder(tmp_path / "hf", checkpoint.load_weights(source))
    tree = tiny_config(datasets, tmp_path / "run", optim={"max_lr": 1e-3}, train={"max_steps": 4}, seed=99)
    config_file = write_config(tmp_path / "c.yaml", tree)
    pretrain("train", "--config", config_file, "--init_from", source, ranks=ranks)
    first, last = records(tmp_path / "run", "validation")[0], records(straight, "validation")[20]
    assert first["losses"] == pytest.approx(last["losses"], abs=1e-5), "it begins where the other ended"
    train = records(tmp_path / "run", "train")
    assert sorted(train) == [1, 2, 3, 4]
    assert train[1]["lr"] == pytest.approx(1e-3 / 4), "with its own schedule"


def write_hf_folder(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """As transformers itself writes a model."""
    shape = transformers.LlamaConfig(**{**TINY_MODEL, "rms_norm_eps": 1e-5}, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(shape)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    return folder


def test_compiled_it_trains_the_same_model(datasets: Path, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        run_dir = tmp_path / str(compiled)
        tree = tiny_config(datasets, run_dir, train={"max_steps": 4}, parallel={"compile": compiled})
        tree["model"] = {**TINY_MODEL, "num_hidden_layers": 1}
        pretrain("train", "--config", write_config(tmp_path / f"{compiled}.yaml", tree))
        losses.append([r["loss"] for r in records(run_dir, "train").values()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


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
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if line["kind"] == "train"]
    assert len(trained) > len(set(trained)) == 300, "no step was trained twice"
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
    transfers: list[tuple[str, torch.Size]] = []

    def watched(name: str, method: Callable) -> Callable:
        return lambda tensor, *args, **kwargs: transfers.append((name, tensor.shape)) or method(tensor, *args, **kwargs)

    with monkeypatch.context() as patch, Operators():
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"):
            patch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
        patch.setattr(torch.cuda, "synchronize", lambda *args: pytest.fail("the step synchronises"))
        for _ in range(3):
            result = trainer.optimizer_step(run, micro_batches)
        assert seen["aten._fused_adamw_.default"] == 3 * 2, "the operators of the step were not seen"
        assert not [name for name in seen if "_local_scalar_dense" in name or "nonzero" in name]
        assert transfers == []
        seen.clear()
        trainer._log_step(run, Display(20, 4, show=False), result)
        # The fingerprint's sum is a CPU tensor; of what lies on the device one stacked tensor is fetched.
        assert [name for name, _ in transfers] == ["numpy", "tolist"]
        assert [shape for name, shape in transfers if name == "tolist"] == [(4,)]
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
