"""Llama 3.1's and 3.2's scaled rotary frequencies: transformers' numbers, both forms of config.json, a run from such a folder.

Where they are not asked for, nothing is another than before there were any.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY_MODEL, records, tiny_config, trajectory, write_config
from hf_folder import TINY, make_model, weights_of, write_run, write_tokenizer
from test_checkpoint import rewrite_state
from test_refusals import refused
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from data_prep.shard import TokenDataset
from pretrain import bench_result, checkpoint, config, export, generate, hf, hf_config, ops
from pretrain.__main__ import main
from pretrain.folder import staged
from pretrain.sections import ModelConfig, RopeScaling

CPU = torch.device("cpu")
SCALED = dataclasses.replace(TINY, rope_scaling=RopeScaling(4.0, 0.5, 3.0, 24))
ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
"""SCALED's, as a config.json has it."""

# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [500_000.0, 10_000.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scaling", [RopeScaling(8.0), RopeScaling(32.0), RopeScaling(3.0, 0.7, 9.5, 1000)], ids=str)
def test_the_frequencies_are_transformers(scaling: RopeScaling, head_dim: int, theta: float) -> None:
    """To the last bit, wherever the two agree so before they scale: each has its own way to theta^(-2j / d)."""
    rope = {"rope_type": "llama3", **dataclasses.asdict(scaling), "rope_theta": theta}
    llama = transformers.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=rope)
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](llama, CPU)
    assert attention_factor == 1
    their_plain = 1 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    plain = ops.rope_frequencies(head_dim, theta, None, CPU)
    ours = ops.rope_frequencies(head_dim, theta, scaling, CPU)
    alike = plain == their_plain
    assert alike.float().mean() > 0.5
    assert torch.equal(ours[alike], theirs[alike])
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
    stay, low = ours == plain, ours == plain / scaling.factor
    assert stay.any()
    assert low.any()
    assert not (stay | low).all(), "some lie between"
    assert (ours.diff() < 0).all()


def test_a_table_without_scaling_is_what_it_was() -> None:
    inv_freq = 500_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    angle = torch.outer(torch.arange(300, dtype=torch.float32), inv_freq).repeat(1, 2)
    assert torch.equal(ops.rope_table(300, 64, 500_000.0, CPU), torch.stack((angle.cos(), angle.sin())))


# --- to and from Hugging Face ----------------------------------------------------------------------------------------


def write(folder: Path, weights: dict[str, torch.Tensor], model: ModelConfig = SCALED) -> Path:
    with staged(folder, {}) as staging:
        hf.write(staging, model, weights, write_tokenizer(folder.with_name("tokenizer")))
    return folder


def test_export_load_export_is_the_identity_and_transformers_computes_the_same(tmp_path: Path) -> None:
    ours = make_model(SCALED)
    write(tmp_path / "a", weights_of(ours))
    read, weights = hf.load(tmp_path / "a")
    assert read == SCALED
    write(tmp_path / "b", weights, read)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    input_ids = torch.arange(180).view(2, 90) * 37 % TINY.vocab_size
    logits = theirs(input_ids).logits
    torch.testing.assert_close(ours(input_ids), logits, atol=1e-5, rtol=1e-5)
    assert (make_model(TINY)(input_ids) - logits).abs().max() > 0.1, "it changed nothing"


def test_what_transformers_saved_loads_as_the_same_model(tmp_path: Path) -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {name: getattr(TINY, name) for name in names}
    rope = {**ROPE, "rope_theta": 54321.0}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**given, num_key_value_heads=2, rope_parameters=rope)
    )
    theirs.save_pretrained(tmp_path)
    ours = hf.load_model(tmp_path, CPU, torch.float32)
    assert (ours.config.rope_theta, ours.config.rope_scaling) == (54321.0, SCALED.rope_scaling)
    input_ids = torch.arange(180).view(2, 90) * 37 % TINY.vocab_size
    torch.testing.assert_close(ours(input_ids), theirs(input_ids).logits, atol=1e-5, rtol=1e-5)


def test_each_form_of_config_json_is_read() -> None:
    """That of transformers 4, as Llama 3.1 and 3.2 were published; that of 5; both; a whole number for a float."""
    both = hf_config.to_hf_config(SCALED, torch.bfloat16, 1, 2)
    assert both["rope_scaling"] == ROPE
    assert both["rope_parameters"] == {**ROPE, "rope_theta": TINY.rope_theta}
    four = {key: value for key, value in both.items() if key != "rope_parameters"}
    five = {key: value for key, value in both.items() if key not in ("rope_scaling", "rope_theta")}
    old = {
        **four,
        "rope_scaling": {**{k: v for k, v in ROPE.items() if k != "rope_type"}, "type": "llama3", "factor": 4},
    }
    for form in (both, four, five, old, {**five, "rope_scaling": None}, {**four, "rope_parameters": {}}):
        assert hf_config.from_hf_config(form) == SCALED
    plain = hf_config.to_hf_config(TINY, torch.bfloat16, 1, 2)
    assert "rope_scaling" not in plain
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": TINY.rope_theta}


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, r"rope_parameters is .*'default'.* must say the same"),
        ({"rope_scaling": {**ROPE, "factor": 8.0}}, "'factor': 8.0.*'factor': 4.0.* must say the same"),
        ({"rope_scaling": {**ROPE, "rope_type": "longrope"}}, "rope_scaling asks for 'longrope' rotary embeddings"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is None, and must be float"),
        (
            {"rope_scaling": {**ROPE, "high_freq_factor": "4"}},
            "rope_scaling.high_freq_factor is '4', and must be float",
        ),
        ({"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}}, "rope_scaling rotates 0.5 of each head"),
        ({"rope_scaling": {**ROPE, "rope_theta": 5.0}}, "rope_theta is 5.0 in rope_scaling and elsewhere 12345.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and with rope_scaling must be 1.0"),
        (
            {"original_max_position_embeddings": 96},
            "original_max_position_embeddings is 96, and with rope_scaling must be 24",
        ),
        (
            {key: {**ROPE, "original_max_position_embeddings": 2.5} for key in ("rope_scaling", "rope_parameters")},
            "rope_parameters.original_max_position_embeddings is 2.5, and must be int",
        ),
        (
            {key: {**ROPE, "factor": 0.25} for key in ("rope_scaling", "rope_parameters")},
            "rope_scaling.factor is 0.25; it must be a number of at least 1",
        ),
    ],
)
def test_what_cannot_be_the_same_is_named(setting: dict[str, Any], named: str) -> None:
    written = hf_config.to_hf_config(SCALED, torch.float32, 1, 2)
    with pytest.raises(ValueError, match=named):
        hf_config.from_hf_config({**written, **setting})


def test_a_run_is_exported_checked_and_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", SCALED)
    export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--check"])
    assert "transformers agrees" in capsys.readouterr().out
    assert hf.load(tmp_path / "out")[0] == SCALED
    generate.main([str(tmp_path / "out"), "--prompt", "a young", "--max_new_tokens", "60"])
    assert "+ 60 tokens" in capsys.readouterr().err


# --- a run -----------------------------------------------------------------------------------------------------------


def llama_32(folder: Path) -> Path:
    """A folder as Llama 3.2's is published, in miniature: bfloat16, tied, base 500000, no rope_parameters."""
    shape = {**TINY_MODEL, "max_position_embeddings": 64, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
    scaling = {**ROPE, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, tie_word_embeddings=True, rope_scaling=dict(scaling), initializer_range=0.2)
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert written.pop("rope_parameters") == {**scaling, "rope_theta": 500_000.0}
    (folder / "config.json").write_text(json.dumps({**written, "rope_theta": 500_000.0, "rope_scaling": scaling}))
    return folder


def test_init_from_a_llama_3_2_trains_goes_on_and_is_exported_as_one(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = llama_32(tmp_path / "llama")
    theirs = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    capsys.readouterr()
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 4}, optim={"max_lr": 1e-3, "warmup_steps": 1})
    tree["model"] = {**TINY_MODEL, "rope_theta": 500_000.0, "tie_word_embeddings": True}
    start = ["train", "--config", write_config(tmp_path / "c.yaml", tree), "--init_from", source]
    line = refused(capsys, *start)
    assert "rope_scaling = {'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max" in line
    assert "the configuration says model.rope_scaling = None: give the model its shape" in line
    scaled = ["--model.rope_scaling.factor", "32", "--model.rope_scaling.original_max_position_embeddings", "24"]
    assert main([*map(str, start), *scaled, "--checkpoint.every_steps", "2"]) == 0
    first, *_, last = records(tmp_path / "run", "validation").values()
    spread = TokenDataset(datasets / "a" / "validation").sequences([0, 4, 8, 13, 17, 22, 26], 32)
    expected = theirs(torch.from_numpy(spread[:, :-1])).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(expected, torch.from_numpy(spread[:, 1:]).flatten())
    assert first["losses"]["a"] == pytest.approx(loss.item(), abs=1e-5), "it begins with that very model"
    assert all(last["losses"][name] < loss for name, loss in first["losses"].items())

    state = checkpoint.read_state(checkpoint.latest(tmp_path / "run", pytest.fail))
    scaling = RopeScaling(32.0, original_max_position_embeddings=24)
    assert state["model"]["rope_scaling"] == dataclasses.asdict(scaling)
    run_config = tmp_path / "run" / "config.yaml"
    assert ModelConfig.of_shape(state["model"]) == config.load(run_config).model
    assert config.load(run_config).model.rope_scaling == scaling
    line = refused(capsys, "train", "--config", run_config, "--model.rope_scaling", "null")
    assert "was trained with model rope_scaling = {'factor': 32.0," in line
    assert "and the configuration says None" in line
    before = trajectory(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert main(["train", "--config", str(run_config)]) == 0
    assert "resumed after step 2" in capsys.readouterr().out
    assert trajectory(tmp_path / "run") == before

    export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"])
    written, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    for key in ("rope_scaling", "rope_theta", "tie_word_embeddings", "dtype"):
        assert written[key] == original[key], key


def test_a_checkpoint_of_before_goes_on(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that knows no rope_scaling: what is saved without any does not say so either."""
    name = "checkpoints/step-00000010"
    shutil.copytree(straight / name, tmp_path / "run" / name)
    state = checkpoint.read_state(tmp_path / "run" / name)
    assert state["model"].keys() == {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings"),
    }
    assert state["config"]["model"].pop("rope_scaling") is None
    rewrite_state(tmp_path / "run" / name, json.dumps(state))
    words = ["train", "--config", straight / "config.yaml", "--run_dir", tmp_path / "run"]
    assert "rope_scaling = None and the configuration says {" in refused(
        capsys, *words, "--model.rope_scaling.factor", 8
    )
    assert main(list(map(str, words))) == 0
    said = capsys.readouterr().out
    assert "resumed after step 10" in said
    assert "rope_scaling" not in said
    expected = [entry for entry in trajectory(straight) if entry[0] > 10]
    assert [entry for entry in trajectory(tmp_path / "run") if entry[0] > 10] == expected


def test_a_configuration_with_scaling_is_written_and_read_as_it_is(tmp_path: Path) -> None:
    tree = tiny_config(Path("/nowhere"), tmp_path / "run")
    plain = config.load(write_config(tmp_path / "plain.yaml", tree))
    assert plain.model.rope_scaling is None
    tree["model"] = {**tree["model"], "rope_scaling": {"factor": 16, "high_freq_factor": 5.0}}
    settings = config.load(write_config(tmp_path / "c.yaml", tree))
    assert settings.model.rope_scaling == RopeScaling(16.0, high_freq_factor=5.0)
    config.write(settings, tmp_path / "again.yaml")
    assert config.load(tmp_path / "again.yaml") == settings
    assert "model.rope_scaling.factor" in config.flat(dataclasses.asdict(settings))
    assert "rope_scaling" not in bench_result.subject(plain, 1)["model"], "older results are compared without a word"
    assert bench_result.subject(settings, 1)["model"]["rope_scaling"]["factor"] == 16


@pytest.mark.parametrize(
    ("scaling", "problem"),
    [
        (RopeScaling(0.5), "rope_scaling.factor is 0.5; it must be a number of at least 1"),
        (RopeScaling(float("nan")), "rope_scaling.factor is nan"),
        (RopeScaling(8.0, 4.0, 4.0), "rope_scaling.low_freq_factor 4.0 must lie between 0 and high_freq_factor 4.0"),
        (RopeScaling(8.0, 0.0), "rope_scaling.low_freq_factor 0.0 must lie between 0 and high_freq_factor 4.0"),
        (RopeScaling(8.0, 1.0, float("inf")), "rope_scaling.low_freq_factor 1.0 must lie"),
        (RopeScaling(8.0, float("nan")), "rope_scaling.low_freq_factor nan must lie"),
        (RopeScaling(8.0, 1.0, 4.0, 0), "rope_scaling.original_max_position_embeddings is 0 tokens; it must lie"),
        (RopeScaling(8.0, 1.0, 4.0, 10**9), "original_max_position_embeddings is 1000000000 tokens; it must lie"),
    ],
)
def test_a_scaling_that_cannot_be_is_one_problem(scaling: RopeScaling, problem: str) -> None:
    (said,) = config.model_problems(dataclasses.replace(TINY, rope_scaling=scaling))
    assert said.startswith("rope_scaling.")
    assert problem in said
