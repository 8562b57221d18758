"""`pretrain plan`: it says what to do, what that rests on, and what is wrong with what was asked."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY_MODEL, tiny_config, write_config

from pretrain import answer, choice, config, parallel, plan, probe, retention, trainer
from pretrain.memory import GIB
from pretrain.published import PUBLISHED
from pretrain.sections import CheckpointConfig

ROOT = Path(__file__).parent.parent
TINYLLAMA = config.load(ROOT / "configs" / "tinyllama-1.1b.yaml")


def planned(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    plan.main([str(part) for part in argv])
    return capsys.readouterr().out


def test_the_published_runs_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "--published")
    assert all(run.name.split(",")[0] in text for run in PUBLISHED)
    assert re.search(r"TinyLlama-1.1B, 16 A100-40G +│ +24,000 │ +24,\d{3} │ +\+0\.\d% │", text)


def test_the_advice_is_the_fastest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    name = ROOT / "configs" / "tinyllama-1.1b.yaml"
    text = planned(capsys, "--config", name, "--chip", "A100-40G", "--nodes", 2)
    last = text.splitlines()[-1]
    assert last.startswith("fits: micro-batch ")
    assert "16 A100-40G: " in last
    assert last.endswith("days for 3T tokens")
    assert "not known before the data is prepared" in text
    page = (ROOT / "README.md").read_text()
    shown = page.split("--chip A100-40G --nodes 2\n```\n```\n")[1].split("\n```")[0].splitlines()
    assert len(shown) == 4
    assert set(shown) <= set(text.splitlines()), "the README shows another answer"
    basis = plan._known("A100-40G", compiled=True)
    outcomes = [choice.outcome(TINYLLAMA, layout, basis) for layout in choice.layouts(TINYLLAMA, 2, 8)]
    assert any(not o.fits for o in outcomes)
    best = choice.choose(outcomes)
    assert best is not None
    limit = (1 - choice.ROOM) * basis.chip.memory_gib * GIB
    assert best.memory.total <= limit
    assert all(
        0.99 * o.tokens_per_sec_per_gpu <= best.tokens_per_sec_per_gpu or o.memory.total > limit for o in outcomes
    )
    assert 1024 % (best.layout.micro_batch_size * 16) == 0
    assert 24_000 < best.tokens_per_sec_per_gpu < 30_000


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_keys_to_set_make_training_take_the_fastest(nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    name = ROOT / "configs" / "tinyllama-1.1b.yaml"
    others = ["--train.micro_batch_size", "4", "--parallel.cpu_offload", "true", "--parallel.reduce", "micro_step"]
    for given in ([], others):
        settings = config.parse(["--config", str(name), *given])
        basis = plan._known("A100-40G", compiled=True)
        outcomes = [choice.outcome(settings, layout, basis) for layout in choice.layouts(settings, nodes, 8)]
        best = choice.choose(outcomes)
        assert best is not None
        keys = choice.keys_to_set(settings, best.layout, basis.chip)
        assert ("cpu_offload" in keys) == bool(given)
        followed = config.parse(["--config", str(name), *given, *keys.split()])
        taken = choice.configured(followed, nodes, 8, basis.chip)
        assert replace(taken, shard_size=0) == replace(best.layout, shard_size=0)
        assert taken.shards == best.layout.shards
        assert choice.keys_to_set(followed, best.layout, basis.chip) == ""


def test_what_is_configured_stays_where_nothing_is_faster_by_more_than_the_model_can_tell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = ROOT / "configs" / "tinyllama-1.1b.yaml"
    for chip, nodes, faster in (("A100-40G", 2, False), ("H100", 1, False), ("A100-80G", 1, False), ("H100", 16, True)):
        text = planned(capsys, "--config", name, "--chip", chip, "--nodes", nodes)
        assert ("fastest that fits" in text) == faster, (chip, nodes)
        assert ("to set " in text) == faster
        speeds = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", text.split("tokens/s/GPU ")[1].split("\n")[0])]
        assert len(speeds) == 1 + faster
        assert not faster or speeds[1] > 1.01 * speeds[0]
    assert "--parallel.strategy shard_grad_op" in text
    assert (
        "no run that is counted is shard_grad_op over several nodes; nanotron 1.3B, 64 H100, not counted, is " in text
    )
    # Of two layouts that differ in more than the micro-batch the larger one is not taken for being larger.
    basis = plan._known("H100", compiled=True)
    outcomes = [choice.outcome(TINYLLAMA, layout, basis) for layout in choice.layouts(TINYLLAMA, 1, 8)]
    best = choice.choose(outcomes)
    fastest = max((o for o in outcomes if o.roomy), key=lambda o: o.tokens_per_sec_per_gpu)
    assert best is not None
    assert (best.layout.recompute, best.layout.strategy) == (fastest.layout.recompute, fastest.layout.strategy)
    assert best.layout.micro_batch_size >= fastest.layout.micro_batch_size


def test_the_network_is_named_and_has_a_card_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", ROOT / "configs" / "tinyllama-1.1b.yaml", "--chip", "A100-40G", "--nodes", 2]
    for options, network in (
        ([], "1,600 Gbit/s a node assumed"),
        (["--gpus_per_node", 1], "200 Gbit/s a node assumed"),
        (["--network_gbits", 400], "400 Gbit/s a node given"),
    ):
        assert planned(capsys, *given, *options).splitlines()[0].endswith(network)


def test_what_leaves_no_room_is_said_to() -> None:
    basis = plan._known("H100", compiled=True)
    settings = config.load(ROOT / "configs" / "llama-33b.yaml")
    outcomes = [choice.outcome(settings, layout, basis) for layout in choice.layouts(settings, 1, 8)]
    best = choice.choose(outcomes)
    assert best is not None
    assert best.fits
    assert not best.roomy
    line = answer.advice(settings, basis, outcomes, best)
    assert line.startswith("fits, with less than 5% free: ")
    assert "(up to " not in line


def test_what_does_not_fit_is_said_with_the_least_that_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "--config", ROOT / "configs" / "llama-65b.yaml", "--chip", "A100-40G", "--nodes", 1)
    assert text.splitlines()[-1].startswith("does not fit: the least is ")


def test_tokens_set_the_length(capsys: pytest.CaptureFixture[str]) -> None:
    name = ROOT / "configs" / "llama-120m.yaml"
    text = planned(capsys, "--config", name, "--chip", "H200", "--gpus_per_node", 1, "--tokens", "1e9")
    assert "single" in text
    lines = text.splitlines()
    assert lines[-1].endswith("for 1B tokens")
    assert lines[-2].startswith("to set         --train.max_steps ")
    steps = int(lines[-2].split()[3])
    settings = config.load(name)
    assert 0 <= steps * settings.train.global_batch_size * settings.data.seq_len - 1e9 < 2**21


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--chip", "B300"], "--chip B300: there are A100-40G"),
        ([], "say which --chip: A100-40G"),
        (
            ["--chip", "A100-40G", "--nodes", "3"],
            "x world_size 24 = 24 sequences; nearest: 1008 or 1032",
        ),
        (["--chip", "A100-40G", "--nodes", "0"], "must be at least 1"),
        (["--chip", "A100-40G", "--tokens", "5"], "must be at least one step's 2,097,152"),
        (["--chip", "A100-40G", "--tokens", "1e9"], "optim.warmup_steps"),
        (["--chip", "A100-40G", "--network_gbits", "0"], "--network_gbits 0 must be a number of Gbit/s above 0"),
        (["--chip", "A100-40G", "--probe"], "--probe measures this machine's chip"),
    ],
)
def test_what_is_wrong_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config", str(ROOT / "configs" / "tinyllama-1.1b.yaml"), *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("every_steps", "keep_last", "keep_every"), [(5, 2, 20), (5, 2, 0), (7, 3, 14), (0, 2, 0), (10, 0, 0), (5, 1, 5)]
)
@pytest.mark.parametrize("every_minutes", [0, 30])
def test_disk_is_what_the_saver_leaves(
    every_steps: int, keep_last: int, keep_every: int, every_minutes: int, tmp_path: Path
) -> None:
    """At most so many folders as the saver keeps at any time, and one that is being written; never one too many by far."""
    settings = replace(
        TINYLLAMA,
        train=replace(TINYLLAMA.train, max_steps=62),
        checkpoint=CheckpointConfig(every_steps, every_minutes, keep_last, keep_every),
    )
    there, most = [], 0
    for step in (
        s
        for s in range(1, 63)
        if keep_last  # by the clock or a signal, as often as can be
        or s == 62
        or (every_steps and s % every_steps == 0)
    ):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        there.append(step)
        most = max(most, len(list((tmp_path / "checkpoints").iterdir())))
        retention.prune(tmp_path, settings.checkpoint)
    expected, size = answer.disk(settings)
    assert most <= expected <= most + 2
    assert size == expected * 12 * 1_100_048_384


def test_epochs_come_from_the_manifests(datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    found = answer.epochs(config.load(name))
    assert isinstance(found, dict)
    assert found == {"a": 112 / ((20_000 - 1) // 32), "b": 48 / ((25_000 - 1) // 32)}  # 7:3 of 20 steps of 8 sequences
    text = planned(capsys, "--config", name, "--chip", "H100", "--gpus_per_node", 2)
    assert f"epochs         a {found['a']:.2f}, b {found['b']:.2f}" in text


def test_probe_measures_real_steps(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this CPU, in miniature, by a clock that no other work disturbs; and what the plan's time rests on is said."""
    clock, step = SimpleNamespace(seconds=0.0), probe.optimizer_step

    def timed(run: trainer.Run, *batches: object) -> object:
        clock.seconds += 0.1 + 0.05 * len(parallel.unwrap(run.model).model.layers)
        return step(run, *batches)

    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    monkeypatch.setattr(probe, "optimizer_step", timed)
    name = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    text = planned(capsys, "--config", name, "--probe")
    last = text.splitlines()[-1]
    assert last.startswith("fits: micro-batch ")
    assert "; 1 cpu: " in last
    assert (
        "measured on this machine at 2 and 6 layers, its error at 4 between them; memory is not measured on a CPU"
        in text
    )
    assert not (tmp_path / "run").exists()
    assert "epochs         a 0." in text


@pytest.mark.parametrize("layers", [2, 4, 6])
def test_the_plan_of_a_probe_takes_what_was_measured(
    layers: int, datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a step of one micro-batch all of it, AdamW's part too."""
    measured = {2: 0.2, 4: 0.3, 6: 0.4}
    monkeypatch.setattr(probe, "_measure", lambda *args: (measured[args[-1]], 0.0))
    batch = {"global_batch_size": 4, "micro_batch_size": 4}
    tree = tiny_config(datasets, tmp_path / "run", model=TINY_MODEL | {"num_hidden_layers": layers}, train=batch)
    text = planned(capsys, "--config", write_config(tmp_path / "c.yaml", tree), "--probe")
    column = dict(re.findall(r"^│ ([\w-]+), s a step +│ +([\d.]+) │$", text, re.M))
    assert len(column) == 7
    assert sum(map(float, column.values())) == pytest.approx(measured[layers], rel=5e-3)
    (speed,) = re.findall(r"1 cpu: ([\d,]+) tokens/s/GPU", text)
    assert float(speed.replace(",", "")) == pytest.approx(4 * 32 / measured[layers], rel=5e-3)


def test_a_probe_on_a_busy_machine_is_refused(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six layers that took no longer than two would make layers cost less than nothing."""
    monkeypatch.setattr(probe, "_measure", lambda *args: (1.0 / args[-1], 0.0))
    with pytest.raises(SystemExit):
        planned(
            capsys, "--config", write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run")), "--probe"
        )
    assert "of 2 layers took 0.500 s and those of 6 took 0.167 s: something else is running" in capsys.readouterr().err
