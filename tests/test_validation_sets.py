"""`validation.sets`: data that a run is only validated on. No step depends on it, and it is shown beside the sources."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import pretrain, records, tiny_config, trajectory, write_config, write_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_validation import OF_ANOTHER_KIND

from data_prep.shard import TokenDataset
from pretrain import checkpoint, config, data, going_on, history, page, pictures, preparation, run_folder, validation
from pretrain.__main__ import main
from pretrain.sections import Config, DataConfig, SourceConfig, ValidationConfig, ValidationSet


@pytest.fixture(scope="module")
def wiki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that no source has."""
    return write_dataset(tmp_path_factory.mktemp("wiki") / "wiki", 900, 40)


def with_sets(datasets: Path, run_dir: Path, sets: dict[str, Path], **sections: Any) -> Path:
    """The file of a configuration that is validated on `sets`, too."""
    tree = tiny_config(datasets, run_dir, **sections)
    tree["validation"]["sets"] = [{"name": name, "path": str(path)} for name, path in sets.items()]
    return write_config(run_dir.with_suffix(".yaml"), tree)


@pytest.fixture(scope="module")
def run_with_sets(datasets: Path, wiki: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run of `straight`, validated on a's validation data as a set and on others; and what it printed."""
    run_dir = tmp_path_factory.mktemp("with-sets") / "run"
    sets = {"ruler": datasets / "a" / "validation", "wiki": wiki}
    done = pretrain("train", "--config", with_sets(datasets, run_dir, sets, logger="tensorboard"))
    return run_dir, done.stdout


def of_sources(run_dir: Path) -> list[tuple]:
    """The trajectory, without the losses of sets."""
    steps = trajectory(run_dir)
    return [
        (step[0], {name: step[1][name] for name in "ab"}) if len(step) == 2 and isinstance(step[1], dict) else step
        for step in steps
    ]


def state(run_dir: Path) -> dict[str, Any]:
    return checkpoint.read_state(checkpoint.latest(run_dir, pytest.fail))


def test_a_run_with_sets_is_the_run_without(run_with_sets: tuple[Path, str], straight: Path) -> None:
    """To the bit; and what decides whether a resume is the same run does not know of them."""
    run_dir, _ = run_with_sets
    assert of_sources(run_dir) == trajectory(straight)
    assert len(trajectory(straight)) == 23
    tensors = [
        {path.name: path.read_bytes() for path in checkpoint.latest(one, pytest.fail).glob("**/*.distcp")}
        for one in (run_dir, straight)
    ]
    assert tensors[0]
    assert tensors[0] == tensors[1]
    now, before = state(run_dir), state(straight)
    assert [now[part] for part in ("data", "model", "tokens_per_source")] == [
        before[part] for part in ("data", "model", "tokens_per_source")
    ]
    assert list(before["validation"]) == ["a", "b"]
    assert list(now["validation"]) == ["a", "b", "ruler", "wiki"]


def test_a_sets_loss_is_that_of_the_same_data_as_a_sources_split(run_with_sets: tuple[Path, str]) -> None:
    validated = records(run_with_sets[0], "validation")
    assert sorted(validated) == [0, 10, 20]
    for record in validated.values():
        losses = record["losses"]
        assert list(losses) == ["a", "b", "ruler", "wiki"]
        assert losses["ruler"] == losses["a"]
        assert len({losses["a"], losses["b"], losses["wiki"]}) == 3


def test_sets_are_shown_beside_the_sources(
    run_with_sets: tuple[Path, str], wiki: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the entropy to beat, and a dash where they have no share and nothing to train on."""
    run_dir, said = run_with_sets
    assert re.search(r"step 20: validation loss  a [\d.]+  b [\d.]+  ruler [\d.]+  wiki [\d.]+", said)
    (about,) = records(run_dir, "start").values()
    measured = validation.measure(TokenDataset(wiki), 32, 7)
    entropy = measured["unigram_entropy"]
    assert list(about["sources"]) == ["a", "b"]
    assert about["validation_sets"]["wiki"] == {
        "documents": 3,
        "validation_tokens": 900,
        **measured,
    }
    assert about["validation_sets"]["ruler"]["unigram_entropy"] == about["sources"]["a"]["unigram_entropy"]
    past = history.read(run_dir)
    line = past.source_lines()[3]
    losses = [records(run_dir, "validation")[step]["losses"]["wiki"] for step in (0, 20)]
    assert dataclasses.astuple(line)[:6] == ("wiki", None, None, *losses, entropy)
    assert line.below_entropy is (losses[1] < entropy)
    assert main(["report", str(run_dir), "--out", str(tmp_path / "report")]) in (0, None)
    row = next(text for text in capsys.readouterr().out.splitlines() if text.lstrip().startswith("wiki"))
    assert re.search(rf"wiki +— +— +{losses[0]:.4f} → {losses[1]:.4f} +— +{entropy:.4f}", row)
    rows = re.findall("<tr>.*?</tr>", page.render("run", past, {}, None))
    (of_wiki,) = [re.findall(r"<td[^>]*>(.*?)</td>", one) for one in rows if ">wiki<" in one]
    first, last = (f"{loss:.4f}" for loss in losses)
    assert of_wiki[:7] == ["wiki", "—", "—", first, last, "—", f"{entropy:.4f}"], "words without text have no bytes"
    figure, axes = pictures.plt.subplots()
    pictures._validation(axes, past)
    labels = axes.get_legend_handles_labels()[1]
    pictures.plt.close(figure)
    assert {f"wiki, last {losses[1]:.3f}", f"wiki, unigram entropy {entropy:.3f}"} <= set(labels)
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("validation/losses/wiki")][::2] == pytest.approx(losses, rel=1e-6)


def test_wandb_gets_the_losses_of_sets(datasets: Path, wiki: Path, tmp_path: Path) -> None:
    file = with_sets(datasets, tmp_path / "run", {"wiki": wiki}, logger="wandb")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    pretrain("train", "--config", file, "--train.stop_after_step", 1, env=environment, cwd=tmp_path)
    (written,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert all(f"validation/losses/{name}".encode() in content for name in ("a", "b", "wiki"))


def test_sets_may_be_added_changed_and_removed_when_a_run_goes_on(
    datasets: Path, wiki: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only that a name stands for other data is said."""
    other, run_dir = write_dataset(tmp_path / "other", 800, 41), tmp_path / "run"
    parts = {5: {"ruler": wiki}, 9: {"ruler": other, "more": wiki}, 15: {}, 20: {"more": wiki}}
    said = {}
    for last, sets in parts.items():
        file = with_sets(datasets, run_dir, sets)
        assert main(["train", "--config", str(file), "--train.stop_after_step", str(last)]) == 0
        said[last] = capsys.readouterr().out
    assert [last for last, lines in said.items() if "is another than" in lines] == [9]
    assert "the validation data of ruler is another than at step-00000005: its losses begin anew" in said[9]
    validated = records(run_dir, "validation")
    names = {step: list(record["losses"]) for step, record in validated.items()}
    a, b = "ab"
    assert names == {
        0: [a, b, "ruler"],
        5: [a, b, "ruler"],
        9: [a, b, "ruler", "more"],
        10: [a, b],
        15: [a, b],
        20: [a, b, "more"],
    }
    expected = trajectory(straight)
    assert [step for step in of_sources(run_dir) if step in expected] == expected
    assert len(of_sources(run_dir)) == len(expected) + 3


def test_a_checkpoint_that_does_not_know_of_sets_is_gone_on_from_without_a_word(tmp_path: Path) -> None:
    before = dataclasses.asdict(Config())
    del before["validation"]["sets"]
    state = {"config": before, "step": 1}
    run_folder._keep_config(Config(), tmp_path / "config.yaml", state, pytest.fail)
    said: list[str] = []
    added = Config(validation=ValidationConfig(sets=[ValidationSet("wiki", "x")]))
    run_folder._keep_config(added, tmp_path / "config.yaml", state, said.append)
    assert "validation.sets: [] -> [{'name': 'wiki', 'path': 'x'}]" in said[0]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["x", "x"], "validation.sets has 'x' twice; names must differ"),
        (["a"], "validation.sets has 'a', and data.sources has it too; names must differ"),
        (["x y"], "validation.sets: 'x y' cannot be a name; use letters without spaces or slashes"),
        ([""], "validation.sets: '' cannot be a name; use letters without spaces or slashes"),
    ],
)
def test_names_that_could_not_be_told_apart_are_refused(sets: list[str], said: str) -> None:
    chosen = [ValidationSet(name, "x") for name in sets]
    settings = Config(data=DataConfig(sources=[SourceConfig("a", "x")]), validation=ValidationConfig(sets=chosen))
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        config.check(settings)


def test_a_path_with_a_nul_is_refused() -> None:
    settings = Config(
        data=DataConfig(sources=[SourceConfig("a", "x")]),
        validation=ValidationConfig(sets=[ValidationSet("wiki", "a\0b")]),
    )
    with pytest.raises(ValueError, match=r"^validation\.sets: path of wiki is .*; no path holds a NUL$"):
        config.check(settings)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        *OF_ANOTHER_KIND,
        ({"vocab_size": 321}, "its tokenizer has 321 tokens and model.vocab_size is 320"),
        ({"tokens": 20}, "20 tokens are not enough for one sequence"),
    ],
)
def test_a_set_is_refused_for_what_a_sources_split_is_refused_for(
    datasets: Path, wiki: Path, tmp_path: Path, other: dict, words: str
) -> None:
    bad = write_dataset(tmp_path / "bad", other.pop("tokens", 1_000), 10, **other)
    train, sources = opened(datasets / "a" / "train")
    as_split = DataConfig(32, sources=[SourceConfig("a", str(train), validation=str(bad))])
    with pytest.raises(ValueError, match=f"{bad}:? {words}"):
        data.open_sources(as_split, 320)
    with pytest.raises(ValueError, match=f"{bad}:? {words}"):
        data.open_sets([ValidationSet("bad", str(bad))], sources, 32, 320)
    assert list(data.open_sets([ValidationSet("wiki", str(wiki))], sources, 32, 320)) == ["wiki"]


def opened(train: Path) -> tuple[Path, list[data.Source]]:
    return train, data.open_sources(DataConfig(32, sources=[SourceConfig("a", str(train))]), 320)


def test_a_set_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    """By its tokens: what was prepared from elsewhere may have files of the same names."""
    train, sources = opened(write_dataset(tmp_path / "train", 500, 0))
    other = write_dataset(tmp_path / "other", 500, 1)
    with pytest.raises(ValueError, match=rf"validation.sets: x \({train}\) holds what a is trained on"):
        data.open_sets([ValidationSet("x", str(train))], sources, 32, 320)
    assert list(data.open_sets([ValidationSet("x", str(other))], sources, 32, 320)) == ["x"]


def test_a_set_that_is_not_there_or_damaged_is_one_line(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, folder = tmp_path / "run", write_dataset(tmp_path / "wiki", 900, 40)
    with pytest.raises(SystemExit) as missing:
        main(["train", "--config", str(with_sets(datasets, run_dir, {"wiki": tmp_path / "nowhere"}))])
    assert missing.value.code == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    shard = folder / TokenDataset(folder).manifest.shards[-1].path
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit) as damaged:
        main(["train", "--config", str(with_sets(datasets, run_dir, {"wiki": folder}))])
    assert damaged.value.code == 2
    said = capsys.readouterr().err
    assert shard.name in said
    assert f"data-prep verify {folder} names all that is wrong" in said
    done = ["train", "--config", str(with_sets(datasets, run_dir, {"wiki": folder})), "--data.verify", "sizes"]
    assert main([*done, "--train.stop_after_step", "1"]) == 0, "nothing else was wrong"


def test_at_the_end_nobody_waits_for_a_sets_files(
    datasets: Path, wiki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = []
    monkeypatch.setattr(TokenDataset, "stop_waiting", lambda self: stopped.append(self.directory))
    file = with_sets(datasets, tmp_path / "run", {"wiki": wiki})
    assert main(["train", "--config", str(file), "--train.stop_after_step", "1"]) == 0
    assert stopped == [*(datasets / name / split for name in "ab" for split in ("train", "validation")), wiki]


# --- several ranks, and the other commands ---------------------------------------------------------------------------


def test_two_ranks_get_the_losses_of_one(datasets: Path, run_with_sets: tuple[Path, str], tmp_path: Path) -> None:
    """Of the first weights, within the order of the sums; with seven sequences, which do not divide by two."""
    sets = {one["name"]: Path(one["path"]) for one in state(run_with_sets[0])["config"]["validation"]["sets"]}
    file = with_sets(datasets, tmp_path / "run", sets)
    pretrain("train", "--config", file, "--train.stop_after_step", 2, ranks=2)
    assert records(tmp_path / "run", "start")[0]["world_size"] == 2
    first, expected = (records(one, "validation")[0]["losses"] for one in (tmp_path / "run", run_with_sets[0]))
    assert list(first) == ["a", "b", "ruler", "wiki"]
    assert first == pytest.approx(expected, abs=1e-5)
    assert list(json.loads((tmp_path / "run" / "verified.json").read_text()))[-1] == str(sets["wiki"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda sets, folder: [], r"validation.sets = \[\], and rank 0 on first \['wiki'\]"),
        (
            lambda sets, folder: [ValidationSet("wiki", str(write_dataset(folder / "other", 800, 41)))],
            "the validation shards of wiki = sha256:.*, and rank 0 on first sha256",
        ),
        (
            lambda sets, folder: [
                ValidationSet("wiki", str(shutil.copytree(sets[0].path, folder / "a copy of its own")))
            ],
            None,
        ),
    ],
)
def test_ranks_are_validated_on_the_same_data(
    datasets: Path,
    wiki: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[ValidationSet], Path], list[ValidationSet]],
    named: str | None,
) -> None:
    """Which nodes may have in different places."""
    first = config.load(with_sets(datasets, tmp_path / "run", {"wiki": wiki}))
    sets = change(first.validation.sets, tmp_path)
    second = dataclasses.replace(first, validation=dataclasses.replace(first.validation, sets=sets))
    said: list[Any] = []

    def gather(mine: tuple[str, dict[str, Any]]) -> list[Any]:
        said.append(mine[1])
        return [("first", said[0]), ("second", said[-1])]

    monkeypatch.setattr(preparation.ranks, "world_size", lambda: 2)
    monkeypatch.setattr(preparation.ranks, "everywhere", lambda work: work())
    monkeypatch.setattr(preparation.ranks, "gather", gather)

    def check(settings: Config) -> None:
        sources = data.open_sources(settings.data, 320)
        opened = data.open_sets(settings.validation.sets, sources, 32, 320)
        preparation._check_alike(settings, sources, opened)

    check(first)
    if named is None:
        check(second)
        return
    with pytest.raises(ValueError, match=f"rank 1 on second has {named}.*: give all ranks the same configuration"):
        check(second)


def test_the_other_commands_take_such_a_configuration(
    datasets: Path, wiki: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Order and plan need no set's files, and a benchmark none on data of its own."""
    file = str(with_sets(datasets, tmp_path / "run", {"wiki": wiki}))
    missing = str(with_sets(datasets, tmp_path / "other", {"wiki": tmp_path / "nowhere"}))
    assert main(["order", "--config", missing, "--summary"]) in (0, None)
    assert main(["plan", "--config", missing, "--chip", "H100"]) in (0, None)
    assert "epochs         a 0.18, b 0.06" in capsys.readouterr().out
    timing = ["--steps", "1", "--warmup", "1"]
    for kind in ("random", "real"):
        assert main(["bench", "--config", missing, *timing, "--data", kind, "--out", str(tmp_path / kind)]) == 0
    assert main(["doctor", "--config", file, "--seconds", "0.05"]) in (0, None)
    assert "nothing is bad" in capsys.readouterr().out
    assert main(["doctor", "--config", missing, "--seconds", "0.05"]) == 1
    assert str(tmp_path / "nowhere") in "".join(capsys.readouterr().out.split())


def test_the_command_line_takes_sets_and_help_explains_them(
    datasets: Path, wiki: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    sets = json.dumps([{"name": "wiki", "path": str(wiki)}])
    settings = config.parse(["--config", str(file), "--validation.sets", sets])
    assert settings.validation.sets == [ValidationSet("wiki", str(wiki))]
    config.write(settings, tmp_path / "written.yaml")
    assert config.load(tmp_path / "written.yaml") == settings
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--validation.sets" in said
    assert "Data that is only validated on, whatever the mixture, a list of: name" in said


def test_the_facts_that_decide_a_resume_have_no_set(datasets: Path, wiki: Path, tmp_path: Path) -> None:
    settings = config.load(with_sets(datasets, tmp_path / "run", {"wiki": wiki}))
    sources = data.open_sources(settings.data, 320)
    sets = data.open_sets(settings.validation.sets, sources, 32, 320)
    mixture = data.make_mixture(sources, settings.data, settings.seed, settings.train.global_batch_size)
    with_set, without = (going_on.facts(settings, sources, some, mixture) for some in (sets, {}))
    assert with_set.pop("validation") == {**without.pop("validation"), "wiki": sets["wiki"].manifest.fingerprint}
    assert with_set == without
