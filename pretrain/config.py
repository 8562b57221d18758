"""Typed configuration: defaults < YAML < command line.

The way of a setting:

    configs/demo.yaml ─┐
    --optim.max_lr 3e-4 ┴─> parse() ─> Config (frozen, one dataclass a section) ─> check() ─> the one function that needs it
                                         │
                                         └─> write() ─> RUN_DIR/config.yaml, the resolved whole

The keys and their units stand in `pretrain.sections`. What depends on the number of ranks is checked and derived in
`grad_accum_steps`; `data` and `slots`, which the crash report needs without torch, divide again.
"""

import dataclasses
from collections.abc import Iterable
from itertools import pairwise
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from data_prep.shard import write_atomically
from pretrain import left_out
from pretrain.sections import (
    Config,
    DataConfig,
    ModelConfig,
    OpsConfig,
    OptimConfig,
    ParallelConfig,
    RopeScaling,
    StageConfig,
    TrainConfig,
    ValidationSet,
)

_AT_MOST = {"data.num_workers": 1024, "train.global_batch_size": 2**24}
_MODEL_AT_MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 10_000,
    "max_position_embeddings": 2**24,
}
"""A value ten times beyond the largest that anybody trains is a typing error; without these limits it would fail deep inside a
library."""


def parse(
    argv: list[str],
    prog: str = "pretrain train",
    purpose: str = "Train, or go on with, the run that the configuration describes.",
) -> Config:
    """Read `--config FILE` and the overrides in `argv`, and check the result; `prog` and `purpose` are for --help.

    Raises:
        ValueError: with all problems found, one after the other.
        SystemExit: status 2 for an unknown key or a wrong type, 0 after --help; one line is printed.
    """
    import jsonargparse  # slow to import, and only commands need it

    from pretrain import config_file
    from pretrain.cli import Parser

    jsonargparse.set_loader("cria", lambda text: _spread_ops(config_file.read(text)), (yaml.YAMLError,))
    parser = Parser(prog=prog, explained_by="pretrain train", description=purpose, parser_mode="cria")
    parser.add_argument("--config", action=config_file.ConfigFile, help="A YAML file with any of the keys below.")
    parser.add_class_arguments(Config)
    parsed = parser.parse_args(_spread_ops_option(argv))
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type) and not isinstance(parsed[section.name], jsonargparse.Namespace):
            parser.error(f"{section.name} is {parsed[section.name]!r}; it must hold keys, or be left out")
    # instantiate_classes is its name before jsonargparse 4.49.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    values = instantiate(parsed).as_dict()
    del values["config"]
    config = Config(**values)
    check(config)
    return config


def _spread_ops(loaded: Any) -> Any:
    """`model: {ops: torch}` of a YAML file as the keys that it stands for (`OpsConfig.by`)."""
    model = loaded.get("model") if isinstance(loaded, dict) else None
    if isinstance(model, dict) and isinstance(model.get("ops"), str):
        model["ops"] = OpsConfig.by(model["ops"])
    return loaded


def _spread_ops_option(argv: list[str]) -> list[str]:
    """`--model.ops torch`, or `--model.ops=torch`, as the options that it stands for."""
    spread: list[str] = []
    words = iter(argv)
    for word in words:
        name, _, backend = word.partition("=")
        if name == "--model.ops":
            settings = OpsConfig.by(backend or next(words, "nothing"))
            spread += [f"--model.ops.{operation}={by}" for operation, by in settings.items()]
        else:
            spread.append(word)
    return spread


def load(path: Path, prog: str = "pretrain train") -> Config:
    """Read a complete or partial YAML file, e.g. RUN_DIR/config.yaml, and check it; `prog` is who says what is wrong."""
    return parse(["--config", str(path)], prog)


def write(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, at once or not at all."""
    write_atomically(path, as_yaml(config))


def as_yaml(config: Config) -> bytes:
    """The resolved configuration, as `write` writes it."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode()


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's keys as a command line has them, "model.ops.rope" -> "auto"; tree: as `dataclasses.asdict` gives it."""
    keys: dict[str, Any] = {}
    for name, value in tree.items():
        keys |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return keys


def defaults(keys: Iterable[str]) -> dict[str, Any]:
    """The defaults of those of the keys, as `flat` names them, that have one."""
    known = flat(dataclasses.asdict(Config()))
    return {key: known[key] for key in keys if key in known}


def check(config: Config) -> None:
    """Raise one ValueError that names everything in `config` that cannot work on any number of ranks."""
    problems = _check_paths(config)
    problems += [f"model.{problem}" for problem in model_problems(config.model)]
    problems += [
        *_check_data(config.data),
        *_check_sets(config.validation.sets, config.data),
        *_check_optim(config.optim, config.train),
        *left_out.problems(config.train, config.branch_point),
        *_check_parallel(config.parallel),
    ]
    positive = {
        "data.seq_len": config.data.seq_len,
        "train.max_steps": config.train.max_steps,
        "train.global_batch_size": config.train.global_batch_size,
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.log_every": config.train.log_every,
        "train.max_skipped_steps": config.train.max_skipped_steps,
        "validation.max_sequences": config.validation.max_sequences,
    }
    problems += [f"{name} is {value}; it must be at least 1" for name, value in positive.items() if value < 1]
    at_least_zero = {
        "data.num_workers": config.data.num_workers,
        "train.max_hours": config.train.max_hours,
        "train.stop_margin_s": config.train.stop_margin_s,
        "train.max_restarts": config.train.max_restarts,
        "validation.every_steps": config.validation.every_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.every_minutes": config.checkpoint.every_minutes,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "parallel.shard_size": config.parallel.shard_size,
        "parallel.activation_checkpointing": config.parallel.activation_checkpointing,
        "watchdog.limit_s": config.watchdog.limit_s,
        "watchdog.first_step_limit_s": config.watchdog.first_step_limit_s,
        "watchdog.stragglers_every": config.watchdog.stragglers_every,
    }
    problems += [f"{name} is {value}; it must be at least 0" for name, value in at_least_zero.items() if not value >= 0]
    problems += [
        f"{name} is {attrgetter(name)(config)}; it must be at most {most}"
        for name, most in _AT_MOST.items()
        if attrgetter(name)(config) > most
    ]
    if config.data.seq_len > config.model.max_position_embeddings:
        problems.append(
            f"data.seq_len {config.data.seq_len} tokens is longer than model.max_position_embeddings "
            f"{config.model.max_position_embeddings}; set the latter to at least {config.data.seq_len}"
        )
    every, keep = config.checkpoint.every_steps, config.checkpoint.keep_every
    if keep > 0 and (every == 0 or keep % every):
        below = keep // every * every if every else 0
        nearest = " or ".join(str(near) for near in (below, below + every) if near)
        nearest = f"nearest: {nearest}" if every else "set that"
        problems.append(f"checkpoint.keep_every {keep} is not a multiple of checkpoint.every_steps {every}; {nearest}")
    if not problems:
        problems = _check_batch(config.train, world_size=1)
    if problems:
        raise ValueError("; ".join(problems))


def _check_paths(config: Config) -> list[str]:
    paths = {"run_dir": config.run_dir, "resume": config.resume, "init_from": config.init_from}
    for source in config.data.sources:
        paths |= {f"data.sources: train of {source.name}": source.train}
        paths |= {f"data.sources: validation of {source.name}": source.validation}
    paths |= {f"validation.sets: path of {one.name}": one.path for one in config.validation.sets}
    problems = [] if config.run_dir.strip() else ["run_dir is empty; name a folder for the run"]
    return problems + [
        f"{name} is {path!r}; no path holds a NUL" for name, path in paths.items() if "\0" in (path or "")
    ]


def model_problems(model: ModelConfig) -> list[str]:
    """Everything in a shape that cannot be built; each begins with the field's name."""
    sizes = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.type is int}
    problems = [f"{name} is {value}; it must be at least 1" for name, value in sizes.items() if value < 1]
    problems += [
        f"{name} is {sizes[name]}; it must be at most {most}"
        for name, most in _MODEL_AT_MOST.items()
        if sizes[name] > most
    ]
    if problems:
        return problems
    for name in ("rope_theta", "rms_norm_eps"):
        if not (isfinite(getattr(model, name)) and getattr(model, name) > 0):
            problems.append(f"{name} is {getattr(model, name)}; it must be a number above 0")
    D, H, H_kv = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    if D % H:
        problems.append(f"hidden_size {D} is not a multiple of num_attention_heads {H}")
    elif model.head_dim % 2:
        problems.append(
            f"hidden_size {D} / num_attention_heads {H} = {model.head_dim} features a head; "
            "rotary embeddings need an even number"
        )
    if H % H_kv:
        problems.append(f"num_attention_heads {H} is not a multiple of num_key_value_heads {H_kv}")
    if model.rope_scaling is not None:
        problems += [f"rope_scaling.{problem}" for problem in _scaling_problems(model.rope_scaling)]
    return problems


def _scaling_problems(scaling: RopeScaling) -> list[str]:
    problems = []
    if not (isfinite(scaling.factor) and scaling.factor >= 1):
        problems.append(f"factor is {scaling.factor}; it must be a number of at least 1")
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if not (isfinite(high) and 0 < low < high):
        problems.append(f"low_freq_factor {low} must lie between 0 and high_freq_factor {high}")
    length, most = scaling.original_max_position_embeddings, _MODEL_AT_MOST["max_position_embeddings"]
    if not 1 <= length <= most:
        problems.append(f"original_max_position_embeddings is {length} tokens; it must lie between 1 and {most}")
    return problems


def _check_data(data: DataConfig) -> list[str]:
    if not data.sources:
        return ["data.sources is empty; name at least one source with its folder (data-prep writes them)"]
    names = [source.name for source in data.sources]
    problems = [
        f"data.sources has {name!r} twice; names must differ" for name in sorted(set(names)) if names.count(name) > 1
    ]
    in_a_stage = {name for stage in data.stages for name in stage.weights}
    for source in data.sources:
        if source.weight is not None and not (isfinite(source.weight) and source.weight >= 0):
            problems.append(
                f"data.sources: weight of {source.name} is {source.weight}; it must be a number of at least 0"
            )
        if source.weight == 0 and source.name not in in_a_stage:
            problems.append(f"data.sources: weight of {source.name} is 0, and no stage has it: it would never be seen")
        if not source.name or set(source.name) & set("/ \t\n"):
            problems.append(f"data.sources: {source.name!r} cannot be a name; use letters without spaces or slashes")
    weighted = [source.name for source in data.sources if source.weight is not None]
    if weighted and len(weighted) < len(names):
        problems.append(
            f"data.sources: {', '.join(weighted)} have a weight and the others none; give all of them one, or none"
        )
    if weighted and not any(source.weight for source in data.sources):
        problems.append("data.sources: all weights are 0; give one of them at least a share to begin with")
    return problems + _check_stages(data.stages, names)


def _check_sets(sets: list[ValidationSet], data: DataConfig) -> list[str]:
    names, sources = [one.name for one in sets], {source.name for source in data.sources}
    problems = []
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(f"validation.sets has {name!r} twice; names must differ")
        if name in sources:
            problems.append(f"validation.sets has {name!r}, and data.sources has it too; names must differ")
        if not name or set(name) & set("/ \t\n"):
            problems.append(f"validation.sets: {name!r} cannot be a name; use letters without spaces or slashes")
    return problems


def _check_stages(stages: list[StageConfig], names: list[str]) -> list[str]:
    problems = []
    steps = [1, *(stage.first_step for stage in stages)]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        problems.append(f"data.stages: first_step must rise from above 1; they are {steps[1:]}")
    for stage in stages:
        if unknown := sorted(set(stage.weights) - set(names)):
            problems.append(f"data.stages: {unknown[0]!r} at step {stage.first_step} is not one of the sources {names}")
        if not stage.weights or not all(isfinite(w) and w > 0 for w in stage.weights.values()):
            problems.append(
                f"data.stages: the weights at step {stage.first_step} must be numbers above 0; leave a source out for 0"
            )
    return problems


def _check_optim(optim: OptimConfig, train: TrainConfig) -> list[str]:
    problems = []
    if not (isfinite(train.z_loss) and train.z_loss >= 0):
        problems.append(f"train.z_loss is {train.z_loss}; it must be a number of at least 0")
    for name in ("max_lr", "min_lr", "weight_decay", "skip_grad_norm_above"):
        if not (isfinite(getattr(optim, name)) and getattr(optim, name) >= 0):
            problems.append(f"optim.{name} is {getattr(optim, name)}; it must be a number of at least 0")
    if optim.min_lr > optim.max_lr:
        problems.append(f"optim.min_lr {optim.min_lr} must lie between 0 and optim.max_lr {optim.max_lr}")
    if not 0 <= train.stop_after_step <= train.max_steps:
        problems.append(
            f"train.stop_after_step {train.stop_after_step} must lie between 0 and train.max_steps {train.max_steps}"
        )
    if not 0 <= optim.warmup_steps <= train.max_steps:
        problems.append(
            f"optim.warmup_steps {optim.warmup_steps} must lie between 0 and train.max_steps {train.max_steps}"
        )
    elif not 0 <= optim.lr_decay_steps <= train.max_steps - optim.warmup_steps:
        problems.append(
            f"optim.lr_decay_steps {optim.lr_decay_steps} must lie between 0 and the {train.max_steps - optim.warmup_steps} "
            f"that train.max_steps {train.max_steps} has after optim.warmup_steps {optim.warmup_steps}"
        )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            problems.append(f"optim.{name} is {getattr(optim, name)}; it must lie in [0, 1)")
    if 0 < optim.skip_grad_norm_above <= 1:
        problems.append(
            f"optim.skip_grad_norm_above is {optim.skip_grad_norm_above} times the usual norm; it must be above 1, or 0 for none"
        )
    for name in ("eps", "max_grad_norm"):  # without eps, a weight that has had no gradient yet becomes 0 / 0
        if not (isfinite(getattr(optim, name)) and getattr(optim, name) > 0):
            problems.append(f"optim.{name} is {getattr(optim, name)}; it must be a number above 0")
    return problems


def _check_parallel(parallel: ParallelConfig) -> list[str]:
    problems = []
    strategy = f"parallel.strategy is {parallel.strategy}"
    if parallel.shard_size and parallel.strategy not in ("auto", "hybrid"):
        problems.append(f"parallel.shard_size is {parallel.shard_size} and {strategy}; set it to 0, or take hybrid")
    if (parallel.strategy == "full_shard" and parallel.gather not in ("auto", "layer")) or (
        parallel.strategy == "shard_grad_op" and parallel.gather == "layer"
    ):
        problems.append(
            f"parallel.gather is {parallel.gather} and {strategy}; full_shard gathers a layer, shard_grad_op a "
            "micro_step or a step"
        )
    if parallel.cpu_offload and parallel.strategy == "single":
        problems.append(f"parallel.cpu_offload is true and {strategy}, which is not sharded; take full_shard")
    return problems


def grad_accum_steps(train: TrainConfig, world_size: int) -> int:
    """Forward passes a rank makes in one optimizer step: global_batch_size / (micro_batch_size x world_size).

    Raises:
        ValueError: when that is not whole, with the nearest batch sizes that are.
    """
    for problem in _check_batch(train, world_size):
        raise ValueError(problem)
    return train.global_batch_size // (train.micro_batch_size * world_size)


def _check_batch(train: TrainConfig, world_size: int) -> list[str]:
    unit = train.micro_batch_size * world_size
    below = train.global_batch_size // unit * unit
    if below == train.global_batch_size:
        return []
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    return [
        f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
        f"{train.micro_batch_size} x world_size {world_size} = {unit} sequences; nearest: {nearest}"
    ]
