"""Every shipped YAML is complete and loads; TinyLlama's is the whole recipe."""

import dataclasses
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from pretrain import config, plan
from pretrain.disk import checkpoint_bytes
from pretrain.model import count
from pretrain.optim import learning_rate
from pretrain.sections import CheckpointConfig, Config, DataConfig, OpsConfig, SourceConfig, StageConfig

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

PRESETS = {
    "llama-120m": (124_668_672, 2.5e9, 6e-4),
    "llama-360m": (358_667_264, 7.2e9, 3e-4),
    "llama-7b": (6_738_415_616, 1.0e12, 3e-4),
    "llama-13b": (13_015_864_320, 1.0e12, 3e-4),
    "llama-33b": (32_528_943_616, 1.4e12, 1.5e-4),
    "llama-65b": (65_285_660_672, 1.4e12, 1.5e-4),
}
"""Parameters, tokens of the run, learning rate."""
LLAMA_PAPER = {
    "llama-7b": (4096, 32, 32),
    "llama-13b": (5120, 40, 40),
    "llama-33b": (6656, 52, 60),
    "llama-65b": (8192, 64, 80),
}
"""Dimension, heads and layers in table 2 of arXiv 2302.13971."""


def test_there_are_configurations() -> None:
    assert {path.stem for path in CONFIGS} >= {"demo", "tinyllama-1.1b", *PRESETS}


NOT_OF_THE_RECIPE = {
    "stages",
    "sets",
    "allow_change",
    "stop_after_step",
    "leave_out",
    "max_hours",
    "stop_margin_s",
    "max_restarts",
}
"""Keys that a recipe leaves to their defaults: what changes later, and what depends on the site."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads_and_says_all_that_matters(path: Path) -> None:
    """No inheritance: whatever shapes the run stands in the file, not in a default."""
    settings = config.load(path)
    written = yaml.safe_load(path.read_text())
    assert settings.run_dir == written["run_dir"]
    for section in ("model", "data", "train", "optim", "validation", "checkpoint", "parallel"):
        expected = {f.name for f in dataclasses.fields(getattr(settings, section))} - NOT_OF_THE_RECIPE
        assert set(written[section]) == expected, f"{path.name}: {section}"
    total = count(settings.model).total
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


def test_one_word_says_who_computes_all_operations(tmp_path: Path) -> None:
    """A library that has only some of them leaves the others to auto; a file, an option, and a later option for one."""
    demo = ["--config", str(ROOT / "configs" / "demo.yaml")]
    file = tmp_path / "config.yaml"
    everything = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    assert config.parse([*demo, "--model.ops", "auto"]).model.ops == OpsConfig()
    assert set(dataclasses.astuple(config.parse([*demo, "--model.ops=torch"]).model.ops)) == {"torch"}
    for backend, expected in {
        "auto": OpsConfig(),
        "liger": OpsConfig(swiglu="liger", rope="liger", rms_norm="liger", cross_entropy="liger"),
        "flash_attn": OpsConfig(attention="flash_attn", rope="flash_attn", cross_entropy="flash_attn"),
    }.items():
        everything["model"]["ops"] = backend
        file.write_text(yaml.safe_dump(everything))
        assert config.load(file).model.ops == expected
        assert config.parse([*demo, "--model.ops", backend]).model.ops == expected
    but_one = config.parse(["--config", str(file), "--model.ops", "liger", "--model.ops.rope", "torch"])
    assert but_one.model.ops == OpsConfig(swiglu="liger", rope="torch", rms_norm="liger", cross_entropy="liger")
    everything["model"]["ops"] = "trch"
    file.write_text(yaml.safe_dump(everything))
    for wrong in (["--config", str(file)], [*demo, "--model.ops=trch"]):
        with pytest.raises(
            ValueError, match=r"model.ops is trch; .* one of auto, torch, torch_flash, flash_attn, xformers, liger"
        ):
            config.parse(wrong)


def test_tinyllama_is_the_whole_recipe() -> None:
    settings = config.load(ROOT / "configs" / "tinyllama-1.1b.yaml")
    m, o, t = settings.model, settings.optim, settings.train
    assert (m.num_hidden_layers, m.hidden_size, m.num_attention_heads, m.num_key_value_heads) == (22, 2048, 32, 4)
    assert (m.intermediate_size, m.vocab_size, settings.data.seq_len) == (5632, 32000, 2048)
    assert count(m).total == 1_100_048_384
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


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_name_says(name: str) -> None:
    settings = config.load(ROOT / "configs" / f"{name}.yaml")
    m, o, t = settings.model, settings.optim, settings.train
    parameters, tokens, max_lr = PRESETS[name]
    assert count(m).total == parameters
    a_step = t.global_batch_size * settings.data.seq_len
    assert tokens <= t.max_steps * a_step < tokens + a_step
    assert learning_rate(o.warmup_steps, o, t.max_steps) == pytest.approx(max_lr)
    assert learning_rate(t.max_steps, o, t.max_steps) == pytest.approx(max_lr / 10)
    assert max(learning_rate(step, o, t.max_steps) for step in range(1, t.max_steps, 97)) <= max_lr
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert f"model: # {parameters:,} parameters" in text
    assert f"# {t.max_steps:,} steps of {a_step:,} tokens are {t.max_steps * a_step:,} tokens" in text
    if name in LLAMA_PAPER:
        assert (m.hidden_size, m.num_attention_heads, m.num_hidden_layers) == LLAMA_PAPER[name]
        assert m.num_key_value_heads == m.num_attention_heads
        assert (a_step, o.warmup_steps, o.weight_decay, o.max_grad_norm) == (4_194_304, 2000, 0.1, 1.0)
    else:
        assert m.head_dim == 64
        assert m.num_key_value_heads < m.num_attention_heads


@pytest.mark.parametrize(("name", "nodes"), [("tinyllama-1.1b", 2), *((name, 8) for name in PRESETS), ("llama-7b", 1)])
def test_as_it_is_written_a_preset_fits_gpus_of_40_gb(
    name: str, nodes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    plan.main(["--config", str(path), "--chip", "A100-40G", "--nodes", str(nodes)])
    (total,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ total, of 39.4 GiB ")]
    assert total.split("│")[2].strip().startswith("fits: "), total


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_a_comment_counts_is_counted(path: Path) -> None:
    """How many checkpoints stay for good, and of which size."""
    settings, text = config.load(path), path.read_text()
    said = re.search(r"keep_every: \d+ # for good: (\d+) checkpoints? of ([\d.]+) GB", text)
    if settings.checkpoint.keep_every == 0:
        assert said is None
        return
    assert said is not None
    assert int(said[1]) == settings.train.max_steps // settings.checkpoint.keep_every
    assert float(said[2]) == pytest.approx(checkpoint_bytes(settings.model) / 1e9, abs=0.05)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_can_be_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is written, on 64 GPUs where its batch divides, else on eight or one; and with some setting that fits."""
    settings = config.load(path)
    nodes, gpus = max(s for s in ((8, 8), (1, 8), (1, 1)) if settings.train.global_batch_size % (s[0] * s[1] * 16) == 0)
    plan.main(["--config", str(path), "--chip", "H200", "--nodes", str(nodes), "--gpus_per_node", str(gpus)])
    text = capsys.readouterr().out
    assert "as configured" in text
    assert "cannot run" not in text
    assert text.splitlines()[-1].startswith("fits: micro-batch")


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        (
            {"every_steps": 1000, "keep_every": 1500},
            "is not a multiple of checkpoint.every_steps 1000; nearest: 1000 or 2000",
        ),
        ({"every_steps": 1000, "keep_every": 10}, "is not a multiple of checkpoint.every_steps 1000; nearest: 1000$"),
        ({"every_steps": 0, "keep_every": 10}, "is not a multiple of checkpoint.every_steps 0; set that$"),
    ],
)
def test_what_would_never_be_kept_is_refused(checkpoint: dict[str, int], said: str) -> None:
    settings = Config(data=DataConfig(sources=[SourceConfig("a", "x")]), checkpoint=CheckpointConfig(**checkpoint))
    with pytest.raises(ValueError, match=said):
        config.check(settings)


@pytest.mark.parametrize(
    ("weights", "stage", "said"),
    [
        ((1, 0), None, "weight of b is 0, and no stage has it"),
        ((0, 0), {"a": 1, "b": 1}, "all weights are 0"),
        ((1, -1), {"a": 1, "b": 1}, "weight of b is -1; it must be a number of at least 0"),
        ((1, 0), {"a": 1, "b": 1}, None),
    ],
)
def test_a_source_of_weight_0_comes_in_with_a_stage(
    weights: tuple[float, float], stage: dict[str, float] | None, said: str | None
) -> None:
    sources = [SourceConfig(name, "x", weight) for name, weight in zip("ab", weights)]
    stages = [StageConfig(5, stage)] if stage else []
    settings = Config(data=DataConfig(sources=sources, stages=stages))
    with nullcontext() if said is None else pytest.raises(ValueError, match=said):
        config.check(settings)
