"""Whole runs as a user starts them: they learn, they repeat, and they are the same on one rank and on two."""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TINY_MODEL, pretrain, records, tiny_config, trajectory, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import config, data, logbook, preparation, trainer
from pretrain.progress import Display


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
    taken, again = itertools.tee(data.train_loader(micro_batches, range(1, 21), 0, torch.device("cpu")))
    clipped = 0
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
    pretrain("train", "--config", config_file, ranks=2, torchrun=True)
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


def test_bf16_follows_fp32_and_is_the_same_on_one_rank_and_on_two(
    datasets: Path, straight: Path, tmp_path: Path
) -> None:
    """The same numbers on one device and under FSDP2, up to bf16's rounding; near the fp32 run, and not it."""
    losses = [[record["loss"] for record in records(straight, "train").values()]]
    for ranks in (1, 2):
        tree = tiny_config(datasets, tmp_path / f"{ranks}", parallel={"precision": "bf16"})
        pretrain("train", "--config", write_config(tmp_path / "c.yaml", tree), ranks=ranks)
        losses.append([record["loss"] for record in records(tmp_path / f"{ranks}", "train").values()])
    full, one, two = losses
    assert one == pytest.approx(full, abs=2e-2)
    assert one == pytest.approx(two, abs=5e-3)
    assert any(abs(a - b) > 1e-5 for a, b in zip(one, full)), "bf16 was not used"


def test_compiled_it_trains_the_same_model(datasets: Path, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        run_dir = tmp_path / str(compiled)
        tree = tiny_config(datasets, run_dir, train={"max_steps": 4}, parallel={"compile": compiled})
        tree["model"] = {**TINY_MODEL, "num_hidden_layers": 1}
        pretrain("train", "--config", write_config(tmp_path / f"{compiled}.yaml", tree))
        losses.append([r["loss"] for r in records(run_dir, "train").values()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_finished_run_started_again_does_nothing(straight: Path, tmp_path: Path) -> None:
    def there() -> tuple:
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
        return [line for line in lines if line["kind"] in ("train", "validation")], files

    shutil.copytree(straight, tmp_path / "run")
    before = there()
    pretrain("train", "--config", straight / "config.yaml", "--run_dir", tmp_path / "run")
    assert there() == before


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
    batches = data.MicroBatches(run.sources, run.mixture, 32, 2, 0, 1)
    micro_batches = data.train_loader(batches, range(1, 10), 0, torch.device("cpu"))
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
        logbook.log_line(run, Display(20, 4, last_step=20, show=False), [result, result])
        # The fingerprint's sum and the peak of memory are CPU tensors; of what lies on the device one stacked tensor is fetched.
        assert [name for name, _ in transfers] == ["numpy", "tolist", "numpy"]
        assert "aten._local_scalar_dense.default" not in seen
    of_steps, line = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["loss"] == result.loss.item()
    assert of_steps["steps"] == [4, 4]


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
