"""config.json of a Llama and our `ModelConfig`: each from the other, with Hugging Face's keys.

    ModelConfig ── to_hf_config ──> config.json ── from_hf_config ──> ModelConfig, or what of it Cria cannot represent

The rotary embedding stands there twice: transformers 4 reads rope_theta and rope_scaling, 5 reads rope_parameters.
"""

import dataclasses
from typing import Any

import torch

from pretrain.config import model_problems
from pretrain.sections import ModelConfig, RopeScaling

_LLAMA3 = "llama3"
"""What transformers calls the scaling of `RopeScaling`; it has others."""


def to_hf_config(model: ModelConfig, dtype: torch.dtype, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """The content of config.json: LlamaConfig's keys, for transformers 4 and 5 alike."""
    dtype_name = str(dtype).removeprefix("torch.")
    scaling = model.rope_scaling
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": _LLAMA3, **dataclasses.asdict(scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **model.shape(),  # our fields have their names
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        # Left out, these two would become LlamaConfig's defaults, 1 and 2: wrong ids for a tokenizer without them.
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        # transformers 4 reads rope_theta, rope_scaling and torch_dtype, 5 reads rope_parameters and dtype.
        **({} if scaling is None else {"rope_scaling": rope}),
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def from_hf_config(config: dict[str, Any]) -> ModelConfig:
    """The shape that a config.json describes.

    Raises:
        ValueError: with everything in it that Cria cannot represent, and every key that is missing or of another type.
    """
    problems = _not_representable(config)
    scaling = _rope_scaling(config, problems)
    # What a LlamaConfig leaves out has transformers' default, which is not always ours.
    defaults = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    values: dict[str, Any] = {**defaults, **config, "rope_theta": _rope_theta(config)}
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    fields = {**_fields(ModelConfig, values, "", problems), "rope_scaling": scaling}
    if not problems:
        problems = model_problems(ModelConfig(**fields))
        D, H, head_dim = fields["hidden_size"], fields["num_attention_heads"], config.get("head_dim")
        if not problems and head_dim is not None and head_dim != D // H:
            problems = [f"head_dim is {head_dim!r}; Cria's is hidden_size / num_attention_heads = {D} / {H}"]
    if problems:
        raise ValueError("not a Llama that Cria can represent: " + "; ".join(problems))
    return ModelConfig(**fields)


def _fields(
    cls: type[ModelConfig] | type[RopeScaling], values: dict[str, Any], place: str, problems: list[str]
) -> dict[str, Any]:
    """The values of a dataclass's fields but the scaling; those that are missing or of another type join the problems."""
    fields: dict[str, Any] = {}
    for field in (f for f in dataclasses.fields(cls) if f.compare and f.name != "rope_scaling"):
        value: Any = values.get(field.name)
        if field.type is float and type(value) is int and abs(value) < 2**53:
            value = float(value)  # JSON writers drop the ".0"
        if type(value) is not field.type:
            problems.append(
                f"{place}{field.name} is {value!r}, and must be {getattr(field.type, '__name__', field.type)}"
            )
        fields[field.name] = value
    return fields


def _rope_theta(config: dict[str, Any]) -> Any:
    return _rope(config, "rope_parameters").get("rope_theta", config.get("rope_theta", 10000.0))


def _rope(config: dict[str, Any], key: str) -> dict[str, Any]:
    rope = config.get(key)
    return rope if isinstance(rope, dict) else {}  # anything else `_not_representable` names


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_scaling(config: dict[str, Any], problems: list[str]) -> RopeScaling | None:
    """Llama 3's scaling, from rope_scaling, rope_parameters or, where they agree, both; what cannot be joins the problems."""
    found: dict[str, RopeScaling | None] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = _rope(config, key)
        if rope:
            found[key] = None
        if _rope_type(rope) != _LLAMA3:
            continue
        scaling = found[key] = RopeScaling(**_fields(RopeScaling, rope, f"{key}.", problems))
        # Where these stand outside of it, transformers takes them.
        outside = {
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "partial_rotary_factor": 1.0,
        }
        problems += [
            f"{name} is {config[name]!r}, and with {key} must be {value!r}"
            for name, value in outside.items()
            if config.get(name, value) != value
        ]
    first, *others = found.values() or [None]
    if any(other != first for other in others):
        said = " and ".join(f"{key} is {config[key]!r}" for key in found)
        problems.append(f"{said}; they must say the same")
    return first


def _not_representable(config: dict[str, Any]) -> list[str]:
    """Settings that change what the model computes, away from what `pretrain.model` computes."""
    needed = {
        "model_type": ("llama", None),
        "hidden_act": ("silu", "silu"),
        "attention_bias": (False, False),
        "mlp_bias": (False, False),
        "attention_dropout": (0.0, 0.0),
        "quantization_config": (None, None),
    }
    problems = [
        f"{key} is {config.get(key, default)!r}, and must be {value!r}"
        for key, (value, default) in needed.items()
        if config.get(key, default) != value
    ]
    for key in ("rope_scaling", "rope_parameters"):
        rope = _rope(config, key)
        if not isinstance(config.get(key), dict | None):
            problems.append(f"{key} is {config[key]!r}, and must be an object")
        kind = _rope_type(rope)
        if kind not in ("default", _LLAMA3):
            problems.append(
                f"{key} asks for {kind!r} rotary embeddings; Cria's are not scaled, or scaled as {_LLAMA3!r}"
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(f"{key} rotates {rope['partial_rotary_factor']} of each head; Cria rotates all of it")
    theta = _rope_theta(config)
    for place, said in (("", config), (" in rope_scaling", _rope(config, "rope_scaling"))):
        if said.get("rope_theta", theta) != theta:
            problems.append(f"rope_theta is {said['rope_theta']}{place} and elsewhere {theta}")
    return problems
