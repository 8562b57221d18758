"""`pretrain plan`: it says what to do, what that rests on, and what is wrong with what was asked."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_config, write_config

from pretrain import answer, choice, config, plan, retention
from pretrain.memory import GIB
from pretrain.published import PUBLISHED
from pretrain.sections import CheckpointConfig

ROOT = Path(__file__).parent.parent
TINYLLAMA = config.load(ROOT / "configs" / "tinyllama-1.1b.yaml")


def planned(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> str:
    assert plan.main([str(part) for part in argv]) == status
    return capsys.readouterr().out


def test_the_published_runs_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "--published")
    assert sum(map(int, re.findall(r"^│ [AH]100\S* +│ +[\d,]+ │ +(\d+) │", text, re.M))) == 209
    assert all(run.name in text for run in PUBLISHED if run.assumed)
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
    full = ("--parallel.strategy", "full_shard")
    for chip, nodes, *given in (("A100-40G", 2), ("H100", 1), ("A100-80G", 1), ("H100", 16), ("H100", 4, *full)):
        faster = bool(given)
        text = planned(capsys, "--config", name, "--chip", chip, "--nodes", nodes, *given)
        assert ("fastest that fits" in text) == faster, (chip, nodes)
        assert ("to set " in text) == faster
        speeds = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", text.split("tokens/s/GPU ")[1].split("\n")[0])]
        assert len(speeds) == 1 + faster
        assert not faster or speeds[1] > 1.01 * speeds[0]
    assert "--parallel.strategy hybrid" in text
    # One whose speed is not well known must be faster by more; where it is configured, it stays, and that is said.
    asked = ["--config", name, "--chip", "A100-80G", "--nodes", 2, "--parallel.strategy", "shard_grad_op"]
    text = planned(capsys, *asked)
    assert "to set" not in text
    known = "shard_grad_op over several nodes; nanotron 1.3B, 64 H100, not counted, was 14% slower than is predicted"
    assert f"no run on A100 that is counted is {known}" in text
    said = "(±12%, but not for shard_grad_op over several nodes, where one run was 14% slower)"
    assert said in text.splitlines()[-1]
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
    assert answer.advice(settings, basis, best, {}).startswith("fits, with less than 5% free: ")
    assert choice.larger(outcomes, best) == []


def test_what_does_not_fit_is_said_with_the_least_that_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1; and the nodes on which it would fit, which are taken at their word."""
    given = ["--config", ROOT / "configs" / "llama-65b.yaml", "--chip", "A100-40G"]
    text = planned(capsys, *given, status=1)
    last = text.splitlines()[-1]
    assert last.startswith("does not fit: the least is ")
    assert last.endswith(", and A100-40G has 39.4; 8 nodes of 8 would do, or another chip")
    assert planned(capsys, *given, "--nodes", 8).splitlines()[-1].startswith("fits: ")
    planned(capsys, *given, "--nodes", 4, status=1)
    few = ["--train.global_batch_size", 8, "--train.micro_batch_size", 1]
    assert planned(capsys, *given, *few, status=1).splitlines()[-1].endswith(" has 39.4; take another chip")


def test_a_chip_that_cannot_do_with_fp8_is_planned_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    """What training would refuse is not given a speed; what is to be set can be given back."""
    given = ["--config", ROOT / "configs" / "tinyllama-1.1b.yaml", "--parallel.precision", "fp8"]
    text = planned(capsys, *given, "--chip", "A100-40G")
    needs = "it needs a GPU of compute capability 8.9 or later, and A100-40G has 8.0: set it to bf16"
    assert f"as configured it cannot run: parallel.precision is fp8: {needs}\n" in text
    assert "fp8" not in text.split("\n", 1)[1]
    (keys,) = re.findall(r"^to set +(.*)$", text, re.M)
    assert keys == "--parallel.precision bf16"
    again = planned(capsys, *given, "--chip", "A100-40G", *keys.split())
    assert "cannot run" not in again
    assert again.splitlines()[-1] == text.splitlines()[-1]
    assert "cannot run" not in planned(capsys, *given, "--chip", "H100")
    narrow = ["--model.intermediate_size", 5640, "--chip", "H100"]
    assert "2048 x 5640; float8 products need multiples of 16" in planned(capsys, *given, *narrow)


def test_larger_micro_batches_that_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """With what has to be computed again for them, up to the largest of all that were looked at."""
    given = ["--config", ROOT / "configs" / "tinyllama-1.1b.yaml", "--chip", "A100-40G", "--gpus_per_node", 1]
    (line,) = re.findall(r"^also fits +(.*)$", planned(capsys, *given), re.M)
    found = choice.look(TINYLLAMA, plan._known("A100-40G", compiled=True), 1, 1)
    assert found.best is not None
    sizes = {o.layout.micro_batch_size for o in found.outcomes if o.roomy}
    named = [int(n) for n in re.findall(r"micro-batch (\d+), single", line)]
    assert found.best.layout.micro_batch_size < named[0]
    assert named[-1] == max(sizes)
    assert "; micro-batch 16, single, recompute mlp: " in line
    whole = ["--train.global_batch_size", 4, "--train.micro_batch_size", 4]
    assert "also fits" not in planned(capsys, *given, *whole)


def test_units_fit_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", ROOT / "configs" / "demo.yaml", "--chip", "H100", "--gpus_per_node", 1]
    text = planned(capsys, *given)
    assert "checkpoints    21.4 MB each, 5 at most: 107.2 MB of disk\n" in text
    assert re.search(r", [\d.]+ seconds for 819k tokens$", text.strip())
    sizes = [answer._size(n) for n in (2.1e7, 1.4e9, 9.99e10, 4.5e11)]
    assert sizes == ["21.0 MB", "1.4 GB", "99.9 GB", "0.45 TB"]
    lasting = [answer._duration(n) for n in (1.2, 138, 5400, 8640, 8.64e5, 3.2e7, 4e8)]
    assert lasting == ["1.2 seconds", "2.3 minutes", "1.5 hours", "0.1 days", "10 days", "370 days", "13 years"]


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


def test_tokens_are_counted_as_people_say_them(capsys: pytest.CaptureFixture[str]) -> None:
    """And what the file says already is not to be set; a chip's name is taken in any case."""
    given = ["--config", ROOT / "configs" / "tinyllama-1.1b.yaml", "--chip", "a100-40g"]
    plain = planned(capsys, *given)
    assert "8 A100-40G: " in plain
    assert [planned(capsys, *given, "--tokens", tokens) for tokens in ("3T", "3t", "3e12", "3000B")] == [plain] * 4
    assert "to set         --train.max_steps 143052\n" in planned(capsys, *given, "--tokens", "300B")


def test_keys_of_the_configuration_are_taken_as_training_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    """So that what is said to be set can be given back."""
    given = ["--config", ROOT / "configs" / "tinyllama-1.1b.yaml", "--chip", "H100", "--nodes", 32]
    text = planned(capsys, *given)
    (keys,) = re.findall(r"^to set +(.*)$", text, re.M)
    again = planned(capsys, *given, *keys.split())
    assert "to set" not in again
    assert again.splitlines()[-1] == text.splitlines()[-1]
    assert "micro-batch 4, " in planned(capsys, *given, "--train.micro_batch_size=4").split("tokens/s/GPU")[0]


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
        (["--chip", "A100-40G", "--tokens", "5"], "at least one step's 2,097,152 and at most 1,000T"),
        (["--chip", "A100-40G", "--tokens", "1e9"], "optim.warmup_steps"),
        (["--chip", "A100-40G", "--network_gbits", "0"], "--network_gbits 0 must be a number of Gbit/s above 0"),
        (["--chip", "A100-40G", "--probe"], "--probe measures this machine's chip"),
        (["--chip", "A100-40G", "--tokens", "nan"], "--tokens nan: it must be a number such as 300B, 3T or 1e9"),
        (["--chip", "A100-40G", "--tokens", "1e30"], "and at most 1,000T"),
        (["--chip", "A100-40G", "--train.max_steps", "1000000000"], "of 2,097,152 tokens: more than 1,000T in all"),
        (["--chip", "A100-40G", "--nodes", "two"], "argument --nodes: invalid int value: 'two'"),
        (["--chip", "A100-40G", "--train.micro_batch_sise", "4"], "did you mean train.micro_batch_size?"),
        (["--published"], "--published shows the model of time and would heed nothing else"),
    ],
)
def test_what_is_wrong_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config", str(ROOT / "configs" / "tinyllama-1.1b.yaml"), *argv])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


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
    without = ["--train.leave_out", "[{first_step: 11, last_step: 19}]"]  # ten steps and the last are trained
    ten, last = (56, 24), (6, 2)
    found = answer.epochs(config.parse(["--config", str(name), *without]))
    assert found == {"a": (ten[0] + last[0]) / ((20_000 - 1) // 32), "b": (ten[1] + last[1]) / ((25_000 - 1) // 32)}
    text = planned(capsys, "--config", name, "--chip", "H100", "--gpus_per_node", 2, *without)
    assert " 20 steps, 2,816 tokens; " in text.splitlines()[0]
