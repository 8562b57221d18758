"""Stopped, killed, started again, elsewhere or from somewhere else: the same run."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import transformers
from conftest import (
    TINY_MODEL,
    pretrain,
    records,
    start,
    tiny_config,
    trajectory,
    wait_for,
    write_config,
    write_dataset,
)
from hangs import before_call

from data_prep.shard import TokenDataset
from pretrain import checkpoint, config, parallel, preparation, trainer
from pretrain.__main__ import main
from pretrain.scheduler import REQUEUE


def test_ctrl_c_saves_and_the_next_start_goes_on(datasets: Path, tmp_path: Path) -> None:
    sections = {
        "train": {"max_steps": 400, "global_batch_size": 4},
        "data": {"num_workers": 2},
        "checkpoint": {"every_steps": 0},
    }
    sections["validation"] = {"every_steps": 200, "max_sequences": 3}
    straight = write_config(tmp_path / "s.yaml", tiny_config(datasets, tmp_path / "straight", **sections))
    pretrain("train", "--config", straight)
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", **sections))
    process = start(config_file)
    wait_for(tmp_path / "run", 30, process)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    stopped = max(records(tmp_path / "run", "train"))
    assert 30 <= stopped < 400
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()

    second = pretrain("train", "--config", config_file)
    assert f"resumed after step {stopped}" in second.stdout
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "straight")


def test_data_that_cannot_be_read_any_more_end_a_run_with_a_save(
    datasets: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of step 8, of four micro-batches of two."""
    read, times = TokenDataset.read_sequence, 0

    def fails(self: TokenDataset, index: int, row: np.ndarray) -> None:
        nonlocal times
        times += 1
        if times > 7 * 8 + 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "part-0.npy")
        read(self, index, row)

    tree = tiny_config(datasets, tmp_path / "run", validation={"every_steps": 0}, checkpoint={"every_steps": 0})
    command = ["train", "--config", str(write_config(tmp_path / "c.yaml", tree))]
    with monkeypatch.context() as patch:
        patch.setattr(TokenDataset, "read_sequence", fails)
        with pytest.raises(OSError, match="Input/output error"):
            main(command)
    assert [step for step, _ in checkpoint.committed(tmp_path / "run")] == [7]
    assert main(command) == 0
    assert records(tmp_path / "run", "train").keys() == records(straight, "train").keys()
    for step, record in records(tmp_path / "run", "train").items():
        assert all(record[key] == records(straight, "train")[step][key] for key in ("loss", "grad_norm", "data_hash"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_whole_group_saves(datasets: Path, tmp_path: Path, number: signal.Signals) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 2000}, data={"num_workers": 2})
    process = start(write_config(tmp_path / "c.yaml", tree))
    wait_for(tmp_path / "run", 6, process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == REQUEUE, output
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
    output = process.communicate(timeout=300)[0]
    assert "stopped by SIGTERM after step" in output
    stopped = max(records(tmp_path / "run", "train"))
    assert 10 <= stopped < 4000
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()


@pytest.mark.parametrize(("factor", "norm"), [(float("nan"), "nan"), (0.0, "0")])
def test_gradients_that_stay_unusable_end_the_run(
    factor: float, norm: str, datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are borne and counted; `max_skipped_steps` in a row are not. What is logged stays JSON."""
    config_file = write_config(
        tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", train={"max_skipped_steps": 3})
    )
    run = preparation.prepare(config.load(config_file))
    before = [p.clone() for p in run.model.parameters()]
    step_of, bad = run.fabric.backward, {3, 6, 7, 8}

    def backward(loss: torch.Tensor) -> None:
        step_of(loss * (factor if run.step + 1 in bad else 1.0))

    monkeypatch.setattr(run.fabric, "backward", backward)
    with pytest.raises(
        FloatingPointError,
        match=rf"up to step 8, whose gradient norm was {norm}, updated nothing .* 3\): .*pretrain order --config .* --step 8;",
    ):
        trainer.train(run)
    logged = records(tmp_path / "run", "train")
    assert {step: r["skipped_steps"] for step, r in logged.items()} == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 3, 8: 4}
    assert logged[3]["grad_norm"] == (0 if factor == 0 else None)
    assert logged[5]["grad_norm"] > 0
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(run.model.parameters(), before))
    saved = checkpoint.committed(tmp_path / "run")[0][1]
    state = checkpoint.read_state(saved)
    assert (saved.name, state["skips"]["total"], state["updates"]) == ("step-00000008", 4, 4), "it ends with a save"
    again = preparation.prepare(config.load(config_file)).skips
    assert (again.total, again.state()["tally"]) == (4, 0), "it begins to count anew"


def test_a_gradient_that_one_rank_cannot_use_is_used_by_none(datasets: Path, tmp_path: Path) -> None:
    """Rank 1's loss is NaN in step 2, which spoils every rank's gradients; in step 4 one number of its own shard is."""
    sections = {"train": {"max_steps": 5}, "parallel": {"strategy": "full_shard"}}
    settings = config.load(write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", **sections)))

    def body(rank: int) -> int:
        run = preparation.prepare(settings)
        inner, clip = run.fabric.backward, trainer.clip_gradients

        def backward(loss: torch.Tensor) -> None:
            inner(loss * (float("nan") if rank == 1 and run.step + 1 == 2 else 1.0))

        def spoil(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
            if rank == 1 and run.step + 1 == 4:
                next(model.parameters()).grad.to_local().view(-1)[0] = float("nan")
            return clip(model, max_norm)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.fabric, "backward", backward)
            patch.setattr(trainer, "clip_gradients", spoil)
            status = trainer.train(run)
        updates = {int(state["step"]) for state in run.optimizer.state.values()}
        (tmp_path / f"{rank}").write_text(f"{int(run.skips.total)} {updates}")
        parallel.leave()
        return status

    output = tmp_path / "output.txt"
    assert forks.finish(forks.fork_ranks(2, output, body)) == [0, 0], output.read_text()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 {3}"] * 2
    logged = records(tmp_path / "run", "train")
    assert {step: r["skipped_steps"] for step, r in logged.items()} == {1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    assert [step for step, r in logged.items() if r["grad_norm"] is None] == [2, 4]
    saved = checkpoint.load_tensors(checkpoint.latest(tmp_path / "run", pytest.fail))
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_resume_picks_a_checkpoint(datasets: Path, straight: Path, tmp_path: Path) -> None:
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    done = pretrain("train", "--config", config_file, "--resume", straight / "checkpoints" / "step-00000015")
    assert "resumed after step 15" in done.stdout
    got, expected = records(tmp_path / "run", "train"), records(straight, "train")
    assert sorted(got) == [16, 17, 18, 19, 20]
    assert all(got[step]["loss"] == expected[step]["loss"] for step in got)


@pytest.mark.parametrize("ranks", [1, 2])
def test_init_from_takes_the_weights_and_nothing_else(
    datasets: Path, straight: Path, tmp_path: Path, ranks: int
) -> None:
    """Of a checkpoint, which has an optimizer's state too, as of a Hugging Face folder, which has none."""
    saved = straight / "checkpoints" / "step-00000020"
    sources = {"checkpoint": saved, "hf": write_hf_folder(tmp_path / "weights", checkpoint.load_weights(saved))}
    for kind, source in sources.items():
        run_dir = tmp_path / kind
        tree = tiny_config(datasets, run_dir, optim={"max_lr": 1e-3}, train={"max_steps": 4}, seed=99)
        config_file = write_config(tmp_path / "c.yaml", tree)
        pretrain("train", "--config", config_file, "--init_from", source, ranks=ranks)
        first, last = records(run_dir, "validation")[0], records(straight, "validation")[20]
        assert first["losses"] == pytest.approx(last["losses"], abs=1e-5), "it begins where the other ended"
        train = records(run_dir, "train")
        assert sorted(train) == [1, 2, 3, 4]
        assert train[1]["lr"] == pytest.approx(1e-3 / 4), "with its own schedule"
        state = checkpoint.read_state(checkpoint.latest(run_dir, pytest.fail))
        assert (state["updates"], state["init_from"]) == (4, str(source))
    assert trajectory(tmp_path / "checkpoint") == trajectory(tmp_path / "hf")


@pytest.mark.parametrize("kind", ["checkpoint", "hugging face"])
def test_init_from_weights_of_other_tokens_is_refused(
    datasets: Path, straight: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A vocabulary of the same size fits every shape, and means other words."""
    source, tree = straight / "checkpoints" / "step-00000020", tiny_config(datasets, tmp_path / "run")
    if kind == "checkpoint":
        other = write_dataset(tmp_path / "other", 2_000, 5, tokenizer="b")
        tree["data"]["sources"] = [{"name": "other", "train": str(other)}]
    else:
        source = write_hf_folder(tmp_path / "hf", checkpoint.load_weights(source))
        theirs = json.loads((datasets / "a" / "train" / "tokenizer" / "tokenizer.json").read_text())
        theirs["model"]["vocab"] |= {"7": 8, "8": 7}
        (source / "tokenizer.json").write_text(json.dumps(theirs))
    tree["train"]["max_steps"] = tree["optim"]["warmup_steps"] = 1
    words = ["train", "--config", str(write_config(tmp_path / "c.yaml", tree)), "--init_from", str(source)]
    with pytest.raises(SystemExit):
        main(words)
    assert "was trained with another tokenizer than the shards are of; the ids would mean" in capsys.readouterr().err
    assert main([*words, "--data.allow_change", "true"]) == 0
    assert "allowed: --init_from" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["checkpoint", "hugging face"])
def test_init_from_weights_that_mean_something_else_is_refused_by_name(
    datasets: Path, straight: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another rope_theta fits every tensor; of max_position_embeddings no weight knows."""
    source = straight / "checkpoints" / "step-00000020"
    if kind != "checkpoint":
        source = write_hf_folder(tmp_path / "hf", checkpoint.load_weights(source))
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 1}, optim={"warmup_steps": 1})
    words = ["train", "--config", str(write_config(tmp_path / "c.yaml", tree)), "--init_from", str(source)]
    with pytest.raises(SystemExit):
        main([*words, "--model.rope_theta", "20000"])
    said = capsys.readouterr().err
    assert f"{source} has rope_theta = 10000.0 and the configuration says model.rope_theta = 20000.0" in said
    assert "give the model its shape, or go on with other positions by --data.allow_change true" in said
    longer = ["--model.rope_theta", "20000", "--data.allow_change", "true", "--run_dir", str(tmp_path / "longer")]
    assert main([*words, *longer]) == 0
    capsys.readouterr()
    assert main([*words, "--model.max_position_embeddings", "48"]) == 0
    again = f"{source} was trained on a and b in the order of seed 1337: this run reads the same sequences again"
    assert (again in capsys.readouterr().out) == (kind == "checkpoint")
    assert main([*words, "--model.max_position_embeddings", "64", "--train.max_steps", "2"]) == 0, "going on, too"
    first, last = records(tmp_path / "run", "validation")[0], records(straight, "validation")[20]
    assert first["losses"] == pytest.approx(last["losses"], abs=1e-5)


def test_init_from_is_for_the_first_start_alone(
    datasets: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler repeats the whole command; what was trained since must not be replaced by the first weights."""
    sections = {"train": {"max_steps": 6}, "validation": {"every_steps": 3}, "checkpoint": {"every_steps": 3}}
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", **sections))
    source = straight / "checkpoints" / "step-00000020"
    words = ["train", "--config", str(config_file), "--init_from", str(source)]
    assert main(words) == 0
    undisturbed = trajectory(tmp_path / "run")
    assert "changes nothing" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")  # as if it had been killed before
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "resumed after step 3" in said
    assert f"{tmp_path / 'run'} has a checkpoint: the run goes on from it, and --init_from changes nothing" in said
    assert trajectory(tmp_path / "run") == undisturbed
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert main([*words[:-1], str(tmp_path / "deleted since")]) == 0, "it is needed no more"
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    made_of = json.loads((tmp_path / "model" / "cria.json").read_text())
    assert (made_of["run"], made_of["init_from"]) == ("run", str(source))
    starts = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["init_from"] for line in starts if line["kind"] == "start"] == [str(source)] * 3


@pytest.mark.parametrize("kind", ["nowhere", "another shape", "a run", "its checkpoints", "not finite"])
def test_what_init_from_cannot_take_is_refused_before_anything_is_read(
    datasets: Path, straight: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, said = {
        "nowhere": (tmp_path / "nowhere", "is not there"),
        "another shape": (
            straight / "checkpoints" / "step-00000020",
            "has intermediate_size = {}, rope_theta = 10000.0 and the configuration says model.intermediate_size = 72, "
            "model.rope_theta = 5.0: give the model its shape",
        ),
        "a run": (straight, f"is no checkpoint; name one of those in {straight / 'checkpoints'}"),
        "its checkpoints": (
            straight / "checkpoints",
            f"is no checkpoint; name one of those in {straight / 'checkpoints'}",
        ),
        "not finite": (tmp_path / "hf", "model.norm.weight has numbers that are not finite"),
    }[kind]
    if kind == "not finite":
        weights = checkpoint.load_weights(straight / "checkpoints" / "step-00000020")
        weights["model.norm.weight"][3] = math.nan
        write_hf_folder(source, weights)
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 1}, optim={"warmup_steps": 1})
    words = ["train", "--config", str(write_config(tmp_path / "c.yaml", tree)), "--init_from", str(source)]
    if kind == "another shape":
        said = said.format(tree["model"]["intermediate_size"])
        words += ["--model.rope_theta", "5.0", "--model.intermediate_size", "72"]
    with pytest.raises(SystemExit):
        main(words)
    assert said in capsys.readouterr().err
    assert (tmp_path / "run").exists() == (kind == "not finite")


def write_hf_folder(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """As transformers itself writes a model."""
    shape = transformers.LlamaConfig(**{**TINY_MODEL, "rms_norm_eps": 1e-5}, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(shape)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    return folder


def test_a_killed_run_goes_on_from_its_last_checkpoint(datasets: Path, tmp_path: Path) -> None:
    sections = {"train": {"max_steps": 120, "global_batch_size": 4}, "checkpoint": {"every_steps": 10, "keep_last": 2}}
    sections["validation"] = {"every_steps": 50, "max_sequences": 3}
    straight = write_config(tmp_path / "s.yaml", tiny_config(datasets, tmp_path / "straight", **sections))
    pretrain("train", "--config", straight)
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", **sections))
    for step in (26, 68):

        def dies(rank: int, step: int = step) -> None:
            before_call(
                trainer, "learning_rate", lambda: os.kill(os.getpid(), signal.SIGKILL), lambda at, *_: at == step
            )

        assert forks.finish(forks.start_training(1, config.load(config_file), dies)) == [-signal.SIGKILL]
    pretrain("train", "--config", config_file)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if line["kind"] == "train"]
    assert len(trained) > len(set(trained)) == 120, "no step was trained twice"
    begun = [line["step"] for line in lines if line["kind"] == "start"]
    assert begun[0] == 0 < begun[1] < begun[2], f"it began after the steps {begun}"
    assert len(begun) == 3
    assert all(step % 10 == 0 for step in begun)
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "straight")
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000110", "step-00000120"]


def test_two_ranks_save_after_the_same_steps_by_the_clock_of_one(datasets: Path, tmp_path: Path) -> None:
    """Whether it is time, rank 0 alone knows: a rank that does not hear it would save another step's weights."""
    sections = {"train": {"max_steps": 6}, "watchdog": {"limit_s": 30}}  # ranks that wait for each other for ever end
    for name, every_minutes in (("straight", 0), ("often", 1e-9)):
        often = {"every_steps": 0, "every_minutes": every_minutes, "keep_last": 100}
        tree = tiny_config(datasets, tmp_path / name, checkpoint=often, **sections)
        pretrain("train", "--config", write_config(tmp_path / "c.yaml", tree), ranks=2)
    saved = checkpoint.committed(tmp_path / "often")
    assert len(checkpoint.committed(tmp_path / "straight")) == 1
    assert {6, 1} <= {step for step, _ in saved}
    assert [checkpoint.verify(folder) for _, folder in saved] == [None] * len(saved)
    assert trajectory(tmp_path / "often") == trajectory(tmp_path / "straight")


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
