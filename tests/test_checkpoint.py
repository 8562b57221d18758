"""A checkpoint is whole or it is not one: damage is found, set aside, and the one before is taken."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY_MODEL

from pretrain import checkpoint, retention, saver
from pretrain.model import Llama
from pretrain.optim import make_optimizer
from pretrain.sections import CheckpointConfig, ModelConfig, OptimConfig


def make_state(seed: int) -> tuple[Llama, torch.optim.AdamW]:
    """A model and an optimizer that have taken a step, different for every seed."""
    with torch.device("meta"):
        model = Llama(ModelConfig(**TINY_MODEL))
    model.materialize(torch.device("cpu"))
    model.init_weights(seed)
    optimizer = make_optimizer(model, OptimConfig())
    tokens = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(seed))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    return model, optimizer


def save(run_dir: Path, step: int, model: Llama, optimizer: torch.optim.AdamW, **state: object) -> None:
    writer = saver.Saver(run_dir, CheckpointConfig(keep_last=0), say=lambda line: None)
    writer.save(step, model, optimizer, {"step": step, **state})
    writer.close()


def rewrite_state(folder: Path, content: str) -> None:
    """Another state.json, with which the manifest agrees."""
    (folder / "state.json").write_text(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = checkpoint.describe(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def snapshot(model: Llama, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.tensors_of(model, optimizer).items()}


@pytest.fixture(name="run_dir")
def two_checkpoints(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 5 and 10."""
    for step in (5, 10):
        save(tmp_path, step, *make_state(step), note="kept")
    return tmp_path


def test_what_is_saved_is_what_is_loaded(run_dir: Path) -> None:
    model, optimizer = make_state(99)
    state = checkpoint.load(run_dir / "checkpoints" / "step-00000010", model, optimizer)
    assert state == {
        "step": 10,
        "note": "kept",
        "updates": 1,
        "keep": True,
        "back": None,
        "job": "",
        "last_saves_s": state["last_saves_s"],
    }
    expected = snapshot(*make_state(10))
    loaded = snapshot(model, optimizer)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert all(s["step"] == 1 for s in optimizer.state.values())
    weights = checkpoint.load_weights(run_dir / "checkpoints" / "step-00000010")
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_it_can_be_loaded_before_the_first_step(run_dir: Path) -> None:
    with torch.device("meta"):
        model = Llama(ModelConfig(**TINY_MODEL))
    model.materialize(torch.device("cpu"))
    optimizer = make_optimizer(model, OptimConfig())
    checkpoint.load(run_dir / "checkpoints" / "step-00000005", model, optimizer)
    expected = snapshot(*make_state(5))
    assert all(torch.equal(t, expected[name]) for name, t in snapshot(model, optimizer).items())


FILES = ["tensors/__0_0.distcp", "tensors/.metadata", "state.json", "manifest.json"]


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "truncate":
        del data[-1:]
    elif how == "zero":
        data[len(data) // 3 : len(data) // 3 + 64] = bytes(64)
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "truncate", "zero", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_taken(run_dir: Path, name: str, how: str) -> None:
    folders = run_dir / "checkpoints"
    damage(folders / "step-00000010" / name, how)
    warnings: list[str] = []
    assert checkpoint.latest(run_dir, warnings.append) == folders / "step-00000005"
    assert (folders / "step-00000010").exists(), "reading sets nothing aside"
    assert checkpoint.find(run_dir, warnings.append) == folders / "step-00000005"
    assert len(warnings) == 2
    assert all("step-00000010 is corrupt" in warning for warning in warnings)
    if name != "manifest.json":
        assert name in warnings[0]
    assert sorted(p.name for p in folders.iterdir()) == ["corrupt-step-00000010.1", "step-00000005"]


@pytest.mark.parametrize("how", ["a file", "a manifest that is a folder"])
def test_what_is_no_folder_of_a_checkpoint_at_all_is_set_aside_too(run_dir: Path, how: str) -> None:
    newest = run_dir / "checkpoints" / "step-00000010"
    if how == "a file":
        shutil.rmtree(newest)
        newest.write_text("")
    else:
        (newest / "manifest.json").unlink()
        (newest / "manifest.json").mkdir()
    said: list[str] = []
    assert checkpoint.find(run_dir, said.append) == newest.with_name("step-00000005")
    assert "it is set aside as corrupt-step-00000010.1" in said[0]


def test_a_shard_of_another_checkpoint_is_found(run_dir: Path) -> None:
    folders = run_dir / "checkpoints"
    shutil.copy(folders / "step-00000005" / FILES[0], folders / "step-00000010" / FILES[0])
    assert FILES[0] in str(checkpoint.verify(folders / "step-00000010"))


def test_what_is_not_committed_is_not_looked_at(run_dir: Path) -> None:
    folders = run_dir / "checkpoints"
    shutil.copytree(folders / "step-00000010", folders / ".staging-step-00000015")
    shutil.copytree(folders / "step-00000010", folders / ".deleting-step-00000020")
    assert checkpoint.find(run_dir, pytest.fail) == folders / "step-00000010"
    save(run_dir, 15, *make_state(15))
    assert checkpoint.find(run_dir, pytest.fail) == folders / "step-00000015"
    assert not (folders / ".staging-step-00000015").exists()


def test_the_newest_is_the_largest_number(tmp_path: Path) -> None:
    for step in (960_000, 99_999_999, 100_000_000):  # in a list of names the last stands first
        save(tmp_path, step, *make_state(1))
    assert checkpoint.find(tmp_path, pytest.fail).name == "step-100000000"


def test_pruning_keeps_the_newest_and_what_was_to_be_kept(tmp_path: Path) -> None:
    def there() -> list[int]:
        return sorted(step for step, _ in checkpoint.committed(tmp_path))

    def save_many(last: int, settings: CheckpointConfig) -> None:
        first = max([0, *there()]) + 1
        writer = saver.Saver(tmp_path, settings, say=lambda line: None, step=first - 1)
        for step in range(first, last + 1):
            writer.save(step, *make_state(1), {"step": step})
        writer.close()

    save_many(4, CheckpointConfig(every_steps=1, keep_last=9))
    assert retention.prune(tmp_path, CheckpointConfig(every_steps=1, keep_last=0)) == []
    assert retention.prune(tmp_path, CheckpointConfig(every_steps=1, keep_last=1, keep_every=2)) == [
        "step-00000003",
        "step-00000001",
    ]
    retention.prune(tmp_path, CheckpointConfig(every_steps=1, keep_last=1))
    assert there() == [4], "2 was none to be kept when it was saved"
    save_many(8, CheckpointConfig(every_steps=1, keep_last=1, keep_every=3))
    assert there() == [6, 8]
    save_many(9, CheckpointConfig(every_steps=1, keep_last=0))
    save_many(11, CheckpointConfig(every_steps=1, keep_last=1, keep_every=5))
    assert there() == [6, 9, 10, 11], "what was saved to be kept, or while all were, stays"
    save_many(13, CheckpointConfig(every_steps=1, keep_last=1))
    assert there() == [6, 9, 10, 13]


def test_a_file_of_somebody_elses_in_a_checkpoint_is_no_damage(run_dir: Path) -> None:
    """NFS makes .nfs files of its own accord; nothing reads them."""
    folder = checkpoint.latest(run_dir, pytest.fail)
    (folder / "NOTES.txt").write_text("the good one")
    (folder / "tensors" / ".nfs0001").touch()
    assert checkpoint.verify(folder) is None
    (folder / "state.json").rename(folder / "state.json~")
    assert checkpoint.verify(folder) == "state.json is missing"


def test_a_step_saved_again_replaces_and_keeps_the_old_one(run_dir: Path) -> None:
    save(run_dir, 10, *make_state(77))
    folders = run_dir / "checkpoints"
    assert sorted(p.name for p in folders.iterdir()) == ["replaced-step-00000010.1", "step-00000005", "step-00000010"]
    assert checkpoint.verify(folders / "step-00000010") is None
    expected = dict(make_state(77)[0].named_parameters())
    assert all(torch.equal(t, expected[n]) for n, t in checkpoint.load_weights(folders / "step-00000010").items())


def test_a_run_begun_again_from_an_earlier_checkpoint_leaves_the_later_ones_behind(run_dir: Path) -> None:
    """Else the next start would go on from what was abandoned, and pruning would take the new ones for old."""
    for step in (15, 20):
        save(run_dir, step, *make_state(step))
    writer = saver.Saver(run_dir, CheckpointConfig(keep_last=2), say=lambda line: None)
    writer.save(10, *make_state(77), {"step": 10})
    writer.close()
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    replaced = [f"replaced-step-000000{step}.1" for step in (10, 15, 20)]
    assert left == [*replaced, "step-00000005", "step-00000010"]


def test_a_kill_while_a_step_is_replaced_leaves_one_of_the_two(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, seen = os.rename, []

    def watched(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).parent.name == "checkpoints":
            seen.append(checkpoint.latest(run_dir, pytest.fail).name)  # what a start would find after a kill here

    monkeypatch.setattr(saver.os, "rename", watched)
    writer = saver.Saver(run_dir, CheckpointConfig(), say=lambda line: None)
    writer.save(10, *make_state(77), {"step": 10})
    assert writer.wait() is None
    assert seen == ["step-00000010.old", "step-00000010", "step-00000010"]
    monkeypatch.undo()
    rename(run_dir / "checkpoints" / "step-00000010", run_dir / "checkpoints" / "step-00000010.old")
    writer.save(10, *make_state(78), {"step": 10})
    writer.close()
    expected = dict(make_state(78)[0].named_parameters())
    saved = checkpoint.load_weights(checkpoint.find(run_dir, pytest.fail))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())
    assert not list((run_dir / "checkpoints").glob("*.old"))


def test_a_manifest_that_is_not_ours_is_refused(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "step-00000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 99}))
    assert "is of version 99" in str(checkpoint.verify(path.parent))
    path.write_text("[]")
    assert "cannot be read" in str(checkpoint.verify(path.parent))
    path.write_text(json.dumps({**manifest, "format": "cria-checkpoinu"}))  # a bit of it
    assert checkpoint.find(run_dir, warn=print) == run_dir / "checkpoints" / "step-00000005"


def test_a_state_says_by_name_what_it_lacks(run_dir: Path) -> None:
    """A checkpoint that is whole by its manifest, of another version or made by hand."""
    folder = run_dir / "checkpoints" / "step-00000010"
    rewrite_state(folder, '{"step": 10}')
    assert checkpoint.verify(folder) is None
    assert checkpoint.read_state(folder)["step"] == 10
    assert checkpoint.updates(run_dir) == 1, "of the one before"
    with pytest.raises(
        ValueError, match=rf"^{folder}/state.json has no updates: .*--init_from {folder} and another run_dir$"
    ):
        checkpoint.load(folder, *make_state(99))


@pytest.mark.parametrize("content", ["null", "[]", "3", '"x"', "{", "[" * 100_000, "\x00"])
def test_json_that_is_no_mapping_is_as_good_as_none(run_dir: Path, content: str) -> None:
    folder = run_dir / "checkpoints" / "step-00000010"
    rewrite_state(folder, content)
    with pytest.raises(ValueError, match=rf"^{folder}/state.json cannot be read"):
        checkpoint.read_state(folder)
    (folder / "manifest.json").write_text(content)
    assert "its manifest cannot be read" in str(checkpoint.verify(folder))


def test_a_run_without_checkpoints_says_what_to_do(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, pytest.fail) is None
    with pytest.raises(FileNotFoundError, match="pretrain train"):
        checkpoint.latest(tmp_path, pytest.fail)


def test_an_index_that_names_anything_else_is_not_opened(run_dir: Path) -> None:
    """DCP's index is a pickle; a crafted one whose checksum was adjusted still runs nothing."""
    folder = run_dir / "checkpoints" / "step-00000010"
    replace_index(folder, Harmful(run_dir / "harmed"))
    with pytest.raises(pickle.UnpicklingError, match="has no place there"):
        checkpoint.load_weights(folder)
    assert not (run_dir / "harmed").exists()
    pickle.loads((folder / "tensors" / ".metadata").read_bytes())
    assert (run_dir / "harmed").exists(), "the pickle was harmless anyway"


def replace_index(folder: Path, index: object) -> None:
    """With checksums as they must be: the manifest is no secret."""
    (folder / "tensors" / ".metadata").write_bytes(pickle.dumps(index))
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in (folder / "tensors").iterdir():
        manifest["files"][f"tensors/{path.name}"] = checkpoint.describe(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(folder) is None


@pytest.mark.parametrize("way", ["bytes", "elsewhere"])
def test_an_index_leads_to_tensors_in_its_own_folder_alone(run_dir: Path, way: str) -> None:
    """What an index calls bytes, DCP unpickles; and a path may lead anywhere."""
    folder = run_dir / "checkpoints" / "step-00000010"
    index = pickle.loads((folder / "tensors" / ".metadata").read_bytes())
    name, (at, place) = "model.model.norm.weight", next(iter(index.storage_data.items()))
    file = folder / "tensors" / place.relative_path
    harm = pickle.dumps(Harmful(run_dir / "harmed"))
    if way == "bytes":
        index.state_dict_metadata[name] = dcp.metadata.BytesStorageMetadata()
        index.storage_data = {k: v for k, v in index.storage_data.items() if k.fqn != name}
        whole = dataclasses.replace(place, offset=file.stat().st_size, length=len(harm))
        index.storage_data[dcp.metadata.MetadataIndex(name)] = whole
        file.write_bytes(file.read_bytes() + harm)
    else:
        index.storage_data[at] = dataclasses.replace(place, relative_path=f"../../../{file.name}")
        shutil.copy(file, run_dir / file.name)
    replace_index(folder, index)
    model, optimizer = make_state(3)
    for load in (lambda: checkpoint.load_weights(folder), lambda: checkpoint.load(folder, model, optimizer)):
        with pytest.raises(
            pickle.UnpicklingError, match="has no place there" if way == "bytes" else "leads to ../../../"
        ):
            load()
    assert not (run_dir / "harmed").exists()


class Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_save_clears_what_a_killed_one_left_half_deleted(run_dir: Path) -> None:
    folders = run_dir / "checkpoints"
    shutil.copytree(folders / "step-00000005", folders / ".deleting-step-00000001")
    save(run_dir, 15, *make_state(15))
    assert sorted(path.name for path in folders.iterdir()) == ["step-00000005", "step-00000010", "step-00000015"]


def test_a_checkpoint_under_another_steps_name_is_not_taken(run_dir: Path) -> None:
    folders, said = run_dir / "checkpoints", []
    shutil.copytree(folders / "step-00000010", folders / "step-00000020")
    assert checkpoint.latest(run_dir, said.append) == folders / "step-00000010"
    assert "step-00000020 is corrupt (its manifest is that of step 10)" in said[0]


def test_a_newer_versions_checkpoint_is_refused_and_stays_where_it_is(run_dir: Path) -> None:
    """It is whole for who can read it: to set it aside and go on from an older one would lose steps."""
    newest = run_dir / "checkpoints" / "step-00000010"
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, "version": checkpoint.VERSION + 1}))
    with pytest.raises(ValueError, match=r"step-00000010: .*version .*go on with the version of Cria that wrote it"):
        checkpoint.find(run_dir, pytest.fail)
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-00000005", "step-00000010"]
