"""The mean of a run's checkpoints: what it is, what it says of itself, and what has none."""

import dataclasses
import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_folder import TINY, shape, weights_of, write_run
from test_checkpoint import Harmful, replace_index

from pretrain import checkpoint, export, hf, snapshot
from pretrain.model import Llama

STEPS = (9, 10, 12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Llama]]:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    return run_dir, write_run(run_dir, TINY, STEPS)


@pytest.fixture
def run(saved: tuple[Path, dict[int, Llama]], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(saved[0], tmp_path / "run")


@pytest.mark.parametrize("steps", [[9, 10, 12], [12, 9], [12, 9, 10]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_is_that_of_the_weights(
    saved: tuple[Path, dict[int, Llama]],
    tmp_path: Path,
    steps: list[int],
    dtype: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rounded once: to the bit the nearest number of the export's type, whatever the order of the checkpoints."""
    run_dir, models = saved
    export.main([str(run_dir), "--average", str(steps), "--out", str(tmp_path / "mean"), "--dtype", dtype, "--check"])
    said = capsys.readouterr().out
    assert f"mean of steps {', '.join(map(str, steps[:-1]))} and {steps[-1]}, " in said
    assert "transformers agrees" in said
    _, mean = hf.load(tmp_path / "mean")
    for name, tensor in mean.items():
        each = torch.stack([weights_of(models[step])[name].double() for step in sorted(steps)])
        assert hf.same_bits(tensor, each.mean(0).to(getattr(torch, dtype))), name
        if tensor.ndim > 1:  # the norms of these models are the same
            assert not torch.equal(tensor.double(), each[0].to(tensor.dtype).double()), "this shows nothing"


def test_the_mean_of_equal_checkpoints_is_the_checkpoint(run: Path) -> None:
    """Thirds have no finite binary fraction, and fp32 would round three times."""
    folders = [run / "checkpoints" / f"step-{step:08d}" for step in STEPS]
    expected = checkpoint.load_weights(folders[0])
    for folder in folders[1:]:
        shutil.rmtree(folder / "tensors")
        shutil.copytree(folders[0] / "tensors", folder / "tensors")
        reseal(folder)
    mean = snapshot.mean(folders).weights
    assert mean.keys() == expected.keys()
    assert all(hf.same_bits(mean[name].float(), tensor) for name, tensor in expected.items())


def test_the_mean_says_what_it_is_of(saved: tuple[Path, dict[int, Llama]], tmp_path: Path) -> None:
    run_dir, _ = saved
    export.main([str(run_dir), "--average", "[12,9]", "--out", str(tmp_path / "mean")])
    made_of = json.loads((tmp_path / "mean" / "cria.json").read_text())
    folders = [run_dir / "checkpoints" / f"step-{step:08d}" for step in (12, 9)]
    assert (made_of["run"], made_of["steps"]) == ("run", [12, 9])
    assert made_of["checkpoints"] == [snapshot.seal(folder) for folder in folders]
    assert len(set(made_of["checkpoints"])) == 2
    assert "step" not in made_of


def test_the_mean_may_be_one_over_several_runs(
    saved: tuple[Path, dict[int, Llama]], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of branches; one checkpoint by its step and by its path is one."""
    run_dir, models = saved
    other = run.rename(tmp_path / "branch")
    words = [str(run_dir), "--out", str(tmp_path / "mean"), "--average"]
    export.main([*words, f"[9,{other}/checkpoints/step-00000012,{other}/checkpoints/step-00000009]"])
    assert "mean of steps 9 of run, 12 of branch and 9 of branch, " in capsys.readouterr().out
    made_of = json.loads((tmp_path / "mean" / "cria.json").read_text())
    assert (made_of["steps"], made_of["runs"]) == ([9, 12, 9], [str(run_dir), str(other), str(other)])
    _, mean = hf.load(tmp_path / "mean")
    for name, tensor in mean.items():
        a, b = (weights_of(models[step])[name].double() for step in (9, 12))
        assert hf.same_bits(tensor, ((2 * a + b) / 3).float()), name
    with pytest.raises(SystemExit):
        export.main([*words, f"[9,{run_dir}/checkpoints/step-00000009]"])
    assert "name at least two checkpoints, and each once" in capsys.readouterr().err


def test_a_mean_takes_the_memory_of_two_models_at_any_number(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a checkpoint is read, nothing is left of the one before but what was added to the sum."""
    alive: list[weakref.ref] = []
    most: list[int] = []
    load = checkpoint.load_weights

    def counted(folder: Path) -> dict[str, torch.Tensor]:
        most.append(sum(reference() is not None for reference in alive))
        weights = load(folder)
        alive.extend(weakref.ref(tensor) for tensor in weights.values())
        return weights

    monkeypatch.setattr(checkpoint, "load_weights", counted)
    snapshot.mean(snapshot.named(run, list(STEPS)))
    assert most == [0, 0, 0]
    assert len(alive) == len(STEPS) * len(dict(Llama(TINY).named_parameters()))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("[9]", "--average is [9]; name at least two checkpoints, and each once"),
        ("[]", "--average is []; name at least two checkpoints"),
        ("[9,10,9]", "--average is [9, 10, 9]; name at least two checkpoints, and each once"),
        ("[8,9,11]", "has no checkpoint of step 8, 11; it keeps: 9, 10, 12"),
        ("[9,x]", "x is no checkpoint; name one of those in a run's checkpoints/"),
        ("9", "Expected a list"),
    ],
)
def test_steps_that_have_no_mean_are_refused(
    saved: tuple[Path, dict[int, Llama]], tmp_path: Path, steps: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        export.main([str(saved[0]), "--average", steps, "--out", str(tmp_path / "mean")])
    line = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.removeprefix("--") in line
    assert line.count("\n") == 1
    assert not (tmp_path / "mean").exists()


def damage_tensors(run: Path) -> None:
    file = next((run / "checkpoints" / "step-00000012" / "tensors").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_shape(run: Path) -> None:
    rewrite_state(run, model=dataclasses.replace(TINY, rope_theta=5.0).shape())


def change_heads(run: Path) -> None:
    """A state that is whole and says something else than what was saved."""
    rewrite_state(run, model=shape(num_key_value_heads=1).shape())


def change_tokenizer(run: Path) -> None:
    rewrite_state(run, data={"tokenizer": "sha256:0123456789abcdef"})


def make_index_harmful(run: Path) -> None:
    replace_index(run / "checkpoints" / "step-00000012", Harmful(run / "harmed"))


def rewrite_state(run: Path, **changes: object) -> None:
    folder = run / "checkpoints" / "step-00000012"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **changes}))
    reseal(folder)


def reseal(folder: Path) -> None:
    """A manifest of what is there now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = checkpoint.describe(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(folder) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damage_tensors, "step-00000012 is corrupt (tensors/__0_0.distcp has another checksum)"),
        (change_shape, "rope_theta 5.0 and 12345.0: models of other shapes have no mean"),
        (change_heads, "the weights do not fit the configuration"),
        (change_tokenizer, "tokenizers sha256:0123456789ab and sha256:"),
        (make_index_harmful, "has no place there"),
    ],
)
def test_a_checkpoint_that_is_not_like_the_others_is_named(
    run: Path, tmp_path: Path, change: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run)
    with pytest.raises(SystemExit) as stopped:
        export.main([str(run), "--average", "[9,10,12]", "--out", str(tmp_path / "mean")])
    line = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in line
    assert line.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["run"], "nothing is left of it"
    assert not (run / "harmed").exists()


def test_ctrl_c_while_tensors_are_read_is_ctrl_c(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP makes an error of its own out of whatever is raised in it."""
    read = checkpoint.Reader.read_data

    def interrupted(*args: object) -> None:
        read(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Reader, "read_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        snapshot.take(run / "checkpoints" / "step-00000009")


def test_a_checkpoint_that_was_saved_anew_meanwhile_is_not_taken_for_the_first(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder name, other weights: what was verified is not what was read."""
    folder, load = run / "checkpoints" / "step-00000009", checkpoint.load_weights

    def replaced(path: Path) -> dict[str, torch.Tensor]:
        shutil.rmtree(folder)
        shutil.copytree(run / "checkpoints" / "step-00000010", folder)
        return load(path)

    monkeypatch.setattr(checkpoint, "load_weights", replaced)
    with pytest.raises(snapshot.Gone, match="step-00000009 was deleted or replaced"):
        snapshot.take(folder)
