"""`pretrain export`: the newest or the named checkpoint of a run, checked, or one line that says why not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_config, write_dataset
from hf_folder import TINY, make_model, weights_of, write_run

from data_prep import tokenizer
from pretrain import config, export, hf
from pretrain.__main__ import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, TINY)
    return folder


def test_the_command_exports_the_newest_or_the_named_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = write_run(tmp_path / "run", TINY)
    export.main([str(tmp_path / "run"), "--out", str(tmp_path / "new"), "--check"])
    assert "step 10, " in (said := capsys.readouterr().out)
    assert "transformers agrees" in said
    export.main([str(tmp_path / "run"), "--out", str(tmp_path / "old"), "--step", "9", "--dtype", "bfloat16"])
    for name, step, dtype in (("new", 10, torch.float32), ("old", 9, torch.bfloat16)):
        read_config, weights = hf.load(tmp_path / name)
        assert read_config == config.load(tmp_path / "run" / "config.yaml").model == TINY
        for key, tensor in weights_of(saved[step]).items():
            assert hf.same_bits(weights[key], tensor.to(dtype)), key


def test_check_refuses_what_transformers_computes_otherwise(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.main([str(run), "--out", str(tmp_path / "out")])
    assert export.compare_with_transformers(tmp_path / "out") < 1e-5
    wrong = make_model(TINY)
    wrong.model.rope = wrong.model.rope.roll(1, dims=1)
    monkeypatch.setattr(hf, "load_model", lambda *_: wrong)
    with pytest.raises(ValueError, match="logits differ"):
        export.compare_with_transformers(tmp_path / "out")


def test_a_step_that_a_kill_left_under_its_old_name_is_exported(tmp_path: Path) -> None:
    """Between the two renames of a commit there is nothing else of that step."""
    write_run(tmp_path / "run", TINY, steps=(9, 10))
    folders = tmp_path / "run" / "checkpoints"
    (folders / "step-00000010").rename(folders / "step-00000010.old")
    found = export.export(tmp_path / "run", tmp_path / "out", 10, torch.float32, check=False)
    assert found["step"] == 10
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 8; it keeps: 9, 10$"):
        export.export(tmp_path / "run", tmp_path / "out", 8, torch.float32, check=False)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{run}", "--out", "{new}", "--step", "8"], "no checkpoint of step 8; it keeps: 9, 10"),
        (["{run}/checkpoints", "--out", "{new}"], "no config.yaml"),
        (["{run}", "--out", "{run}"], "Cria did not put there"),
        (["{run}", "--out", "{new}", "--dtype", "int8"], "bfloat16"),
        (["{run}"], "out"),
        (["{run}", "--out", "{new}", "--steps", "9"], "did you mean step?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    run: Path,
    arguments: list[str],
    named: str,
) -> None:
    new = tmp_path_factory.mktemp("new") / "out"
    with pytest.raises(SystemExit) as stopped:
        export.main([argument.format(run=run, new=new) for argument in arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert named in said
    assert said.count("\n") == 1
    assert not new.exists()


def test_a_run_with_a_wrong_configuration_is_refused_in_exports_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("no_such_key: 1\n")
    with pytest.raises(SystemExit):
        export.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith("pretrain export: error: ")


def test_a_corrupt_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", TINY, steps=(3,))
    tensors = sorted((tmp_path / "run" / "checkpoints" / "step-00000003" / "tensors").glob("*.distcp"))
    content = bytearray(tensors[0].read_bytes())
    content[len(content) // 2] ^= 1
    tensors[0].write_bytes(content)
    for arguments in ([], ["--step", "3"]):
        with pytest.raises(SystemExit):
            export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), *arguments])
        assert "step-00000003 is corrupt" in (said := capsys.readouterr().err) or "none is whole" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "exchange"])
def test_a_run_and_an_export_refuse_another_tokenizer(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other = (write_dataset(tmp_path / name, 500, 1, tokenizer=name) for name in "ab")
    tree = tiny_config(tmp_path, tmp_path / "run", train={"max_steps": 1}, optim={"warmup_steps": 1})
    tree["data"]["sources"] = [{"name": "a", "train": str(data)}]
    train = ["train", "--config", str(write_config(tmp_path / "c.yaml", tree))]
    assert main(train) == 0
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").read_text())
    assert state["data"]["tokenizer"] == tokenizer.load(data / "tokenizer").info.fingerprint
    export = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]
    assert main(export) == 0
    for folder, command in ((data / "tokenizer", train), (tmp_path / "run" / "tokenizer", export)):
        if damage == "cut":
            (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:500])
        elif damage == "empty":
            for file in folder.iterdir():
                file.unlink()
        else:
            shutil.copytree(other / "tokenizer", folder, dirs_exist_ok=True)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert str(folder) in said
        assert said.count("\n") == 1


def test_a_run_that_goes_on_with_another_kind_of_tokenizer_can_be_exported(tmp_path: Path) -> None:
    """tokenizer.model of the one before would be taken first."""
    data = write_dataset(tmp_path / "a", 500, 1)
    tree = tiny_config(tmp_path, tmp_path / "run", train={"max_steps": 1}, optim={"warmup_steps": 1})
    tree["data"]["sources"] = [{"name": "a", "train": str(data)}]
    train = ["train", "--config", str(write_config(tmp_path / "c.yaml", tree))]
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "tokenizer" / "tokenizer.model").write_bytes(b"of sentencepiece")
    assert main(train) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
