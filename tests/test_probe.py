"""`pretrain plan --probe`: it measures real steps of this machine, and says how well it can."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY_MODEL, tiny_config, write_config

from pretrain import config, parallel, plan, probe, trainer


def planned(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    plan.main([str(part) for part in argv])
    return capsys.readouterr().out


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
    assert last.startswith("memory aside: micro-batch 2, single; 1 cpu: ")
    assert "tokens/s/GPU (±1%)" in last
    assert "0.0% at 4 layers between them, 0.0% at 2 layers measured again at the end, 0.0% from step to step" in text
    assert "; memory is not measured on a CPU\n" in text
    assert not re.search(r"GiB|fits|fp32|communication is", text), "what is not of this machine"
    assert not (tmp_path / "run").exists()
    assert "epochs         a 0." in text


@pytest.mark.parametrize("layers", [2, 4, 6])
def test_the_plan_of_a_probe_takes_what_was_measured(
    layers: int, datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a step of one micro-batch all of it, AdamW's part too."""
    measured = {2: 0.2, 4: 0.3, 6: 0.4}
    monkeypatch.setattr(probe, "_measure", lambda *args: ([measured[args[-1]]], 0.0))
    batch = {"global_batch_size": 4, "micro_batch_size": 4}
    tree = tiny_config(datasets, tmp_path / "run", model=TINY_MODEL | {"num_hidden_layers": layers}, train=batch)
    text = planned(capsys, "--config", write_config(tmp_path / "c.yaml", tree), "--probe")
    column = dict(re.findall(r"^│ ([\w-]+), s a step +│ +([\d.]+) │$", text, re.M))
    assert len(column) == 7
    assert sum(map(float, column.values())) == pytest.approx(measured[layers], abs=4e-3)  # seven rounded figures
    (speed,) = re.findall(r"1 cpu: ([\d,]+) tokens/s/GPU", text)
    assert float(speed.replace(",", "")) == pytest.approx(4 * 32 / measured[layers], rel=5e-3)


def test_a_probe_on_a_busy_machine_is_refused(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six layers that took no longer than two would make layers cost less than nothing."""
    monkeypatch.setattr(probe, "_measure", lambda *args: ([1.0 / args[-1]], 0.0))
    with pytest.raises(SystemExit):
        planned(
            capsys, "--config", write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run")), "--probe"
        )
    assert "of 2 layers took 0.500 s and those of 6 took 0.167 s: something else is running" in capsys.readouterr().err


LINE = {2: [0.2] * 3, 6: [0.4] * 3, 4: [0.3] * 3}


@pytest.mark.parametrize(
    ("others", "again", "said"),
    [
        ({}, [0.2] * 3, "±1%"),
        ({4: [0.26] * 3}, [0.2] * 3, "±16%"),  # held out, and the line says 0.3
        ({}, [0.229] * 3, "±15%"),  # drift; the line goes through the mean of both
        ({6: [0.3, 0.4, 0.44]}, [0.2] * 3, "±18%"),  # half of 0.14 over 0.4
    ],
)
def test_a_probe_states_the_largest_of_its_errors(
    others: dict[int, list[float]],
    again: list[float],
    said: str,
    datasets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the depth held out, of the first depth measured again, of the steps of one depth."""
    measured, seen = LINE | others, []

    def measure(*args: Any) -> tuple[list[float], float]:
        seen.append(args[-1])
        return (again if seen.count(2) == 2 else measured[args[-1]]), 0.0

    monkeypatch.setattr(probe, "_measure", measure)
    name = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    assert f" tokens/s/GPU ({said}), " in planned(capsys, "--config", name, "--probe").splitlines()[-1]
    assert seen == [2, 6, 4, 2]
    seen.clear()
    several = planned(capsys, "--config", name, "--probe", "--gpus_per_node", 2)
    assert f"({said}, but not for communication)" in several.splitlines()[-1]


@pytest.mark.parametrize("intra_document", [False, True])
def test_a_probe_keeps_attention_within_documents_where_training_does(
    intra_document: bool,
    datasets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen, step = [], probe.optimizer_step

    def seeing(run: trainer.Run, *batches: object) -> object:
        seen.append(parallel.unwrap(run.model).model.eos_id)
        return step(run, *batches)

    monkeypatch.setattr(probe, "optimizer_step", seeing)
    tree = tiny_config(datasets, tmp_path / "run", data={"intra_document": intra_document})
    settings = config.load(write_config(tmp_path / "c.yaml", tree))
    found = probe.probe(settings)
    assert set(seen) == {settings.model.vocab_size - 1 if intra_document else None}
    monkeypatch.setattr(probe, "probe", lambda _: found)
    assert (
        "; documents are as long as random ids make them" in plan._probed(settings, None)[0].explained
    ) == intra_document
