"""Every shipped YAML is complete and loads; TinyLlama's is the whole recipe."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from pretrain import config
from pretrain.model import num_parameters
from pretrain.optim import learning_rate

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configurations() -> None:
    assert {path.stem for path in CONFIGS} >= {"demo", "tinyllama-1.1b"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads_and_says_all_that_matters(path: Path) -> None:
    """No inheritance: whatever shapes the run stands in the file, not in a default."""
    settings = config.load(path)
    written = yaml.safe_load(path.read_text())
    assert settings.run_dir == written["run_dir"]
    for section in ("model", "data", "train", "optim", "validation", "checkpoint", "parallel"):
        expected = {f.name for f in dataclasses.fields(getattr(settings, section))} - {"stages", "allow_change"}
        assert set(written[section]) == expected, f"{path.name}: {section}"
    total, _ = num_parameters(settings.model)
    assert total > 1_000_000


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_written_is_what_is_read(path: Path, tmp_path: Path) -> None:
    settings = config.load(path)
    config.write(settings, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == settings


def test_command_line_over_yaml_over_defaults() -> None:
    demo = str(ROOT / "configs" / "demo.yaml")
    settings = config.parse(["--config", demo, "--optim.max_lr", "3e-3", "--train.max_steps", "77"])
    assert settings.optim.max_lr == 3e-3
    assert settings.train.max_steps == 77
    assert settings.model.hidden_size == yaml.safe_load(Path(demo).read_text())["model"]["hidden_size"]
    assert settings.optim.beta2 == config.OptimConfig().beta2


def test_tinyllama_is_the_whole_recipe() -> None:
    settings = config.load(ROOT / "configs" / "tinyllama-1.1b.yaml")
    m, o, t = settings.model, settings.optim, settings.train
    assert (m.num_hidden_layers, m.hidden_size, m.num_attention_heads, m.num_key_value_heads) == (22, 2048, 32, 4)
    assert (m.intermediate_size, m.vocab_size, settings.data.seq_len) == (5632, 32000, 2048)
    assert num_parameters(m)[0] == 1_100_048_384
    assert t.global_batch_size * settings.data.seq_len == 2_097_152
    assert 3e12 <= t.max_steps * t.global_batch_size * settings.data.seq_len < 3e12 + 2_097_152
    assert (o.beta1, o.beta2, o.weight_decay, o.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert learning_rate(2000, o, t.max_steps) == pytest.approx(4e-4)
    assert learning_rate(t.max_steps, o, t.max_steps) == pytest.approx(4e-5)
    assert {s.name: s.weight for s in settings.data.sources} == {"slimpajama": 7, "starcoder": 3}
    assert settings.parallel.precision == "bf16"
    assert config.grad_accum_steps(t, world_size=16) == 8
    with pytest.raises(
        ValueError, match=r"1024 is not a multiple .* 8 x world_size 48 = 384 sequences; nearest: 768 or 1152"
    ):
        config.grad_accum_steps(t, world_size=48)
