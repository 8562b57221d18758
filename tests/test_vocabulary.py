"""A tokenizer that is not the shards' is refused before the first step, and again by an export."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_config, write_config, write_dataset

from data_prep import tokenizer, tokenizer_train
from pretrain import vocabulary
from pretrain.__main__ import main

LINES = [f"A cria is a young llama, and the {n} llamas of number {n * n} are old." for n in range(300)]


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tokenizers of either kind and of one size, as data-prep writes them."""
    folders = []
    for number in range(2):
        folder = tmp_path_factory.mktemp("tokenizer")
        (folder / "tokenizer.model").write_bytes(tokenizer_train.train(iter(LINES[number::2]), 300))
        tokenizer.load(folder).save(folder, prepend_bos=False)
        if request.param == "huggingface":
            (folder / "tokenizer.model").unlink()
        folders.append(folder)
    return folders[0], folders[1]


def cut(folder: Path, other: Path) -> None:
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:500])


def nest(folder: Path, other: Path) -> None:
    (folder / "tokenizer.json").write_text("[" * 100_000)


def empty(folder: Path, other: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def exchange(folder: Path, other: Path) -> None:
    shutil.copytree(other, folder, dirs_exist_ok=True)


def exchange_one(folder: Path, other: Path) -> None:
    """What transformers reads is another one's, what data-prep reads is left."""
    shutil.copy(other / "tokenizer.json", folder)


def lose_settings(folder: Path, other: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("damage", [cut, nest, empty, exchange, exchange_one, lose_settings])
def test_the_tokenizer_of_the_shards_is_known_and_no_other_is_taken(
    made: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    own, other = made
    folder = tmp_path / "tokenizer"
    shutil.copytree(own, folder)
    fingerprint = tokenizer.load(own).info.fingerprint
    vocabulary.check(folder, fingerprint)
    damage(folder, other)
    with pytest.raises((ValueError, FileNotFoundError), match=str(folder)):
        vocabulary.check(folder, fingerprint)


@pytest.mark.parametrize("damage", [cut, empty, exchange])
def test_a_run_and_an_export_refuse_another_tokenizer(
    damage: Callable[[Path, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        damage(folder, other / "tokenizer")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert str(folder) in said
        assert said.count("\n") == 1
