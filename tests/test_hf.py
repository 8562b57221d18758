"""To and from Hugging Face: the same model there, the same bytes back, and a name for what cannot be the same."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folder import HEADS, TINY, make_model, shape, weights_of, write_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file

from pretrain import hf, hf_config
from pretrain.folder import MARK, staged
from pretrain.sections import ModelConfig

INPUT_IDS = torch.arange(40).view(2, 20) * 37 % TINY.vocab_size


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(folder: Path, model_config: ModelConfig, tokenizer: Path, **settings: Any) -> dict[str, torch.Tensor]:
    weights = weights_of(make_model(model_config))
    with staged(folder, {}) as staging:
        hf.write(staging, model_config, weights, tokenizer, **settings)
    return weights


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- the same model on both sides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "tied"), HEADS)
def test_transformers_computes_the_same_logits_and_gradients(
    tmp_path: Path, tokenizer: Path, kv_heads: int, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    ours = make_model(shape(kv_heads, tied))
    with staged(tmp_path / "out", {}) as staging:
        hf.write(staging, ours.config, weights_of(ours), tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    logits = theirs(INPUT_IDS).logits
    assert logits.std() > 0.1, "logits that are all alike would prove nothing"
    torch.testing.assert_close(ours(INPUT_IDS), logits, atol=1e-5, rtol=1e-5)

    targets = INPUT_IDS.roll(-1, dims=1)
    ours(INPUT_IDS, targets).backward()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(gradients) == set(weights_of(ours))
    for name, parameter in ours.named_parameters():
        assert gradients[name].abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("kv_heads", "tied"), HEADS)
def test_what_transformers_saved_loads_as_the_same_model(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {name: getattr(TINY, name) for name in names}
    theirs = LlamaForCausalLM(
        LlamaConfig(**given, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=54321.0)
    )
    theirs.save_pretrained(tmp_path)
    ours = hf.load_model(tmp_path, torch.device("cpu"), torch.float32)
    assert ours.config.rope_theta == 54321.0
    assert ours.config.rms_norm_eps == 1e-6, "transformers' default, not Cria's"
    torch.testing.assert_close(ours(INPUT_IDS), theirs(INPUT_IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_export_load_export_is_the_identity(tmp_path: Path, tokenizer: Path, tied: bool, dtype: torch.dtype) -> None:
    model_config = shape(tied=tied)
    weights = {name: tensor.to(dtype) for name, tensor in weights_of(make_model(model_config)).items()}
    with staged(tmp_path / "a", {"step": 7}) as staging:
        hf.write(staging, model_config, weights, tokenizer)
    read_config, read_weights = hf.load(tmp_path / "a")
    assert read_config == model_config
    assert read_weights.keys() == weights.keys()
    assert all(hf.same_bits(read_weights[name], tensor) for name, tensor in weights.items())

    with staged(tmp_path / "b", {"step": 7}) as staging:
        hf.write(staging, read_config, read_weights, tmp_path / "a")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", MARK} <= set(files)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    with safe_open(tmp_path / "a" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_model_is_written_in_parts_and_read_back(tmp_path: Path, tokenizer: Path) -> None:
    weights = write(tmp_path / "out", TINY, tokenizer, max_shard_size=100_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    _, read = hf.load(tmp_path / "out")
    assert read.keys() == weights.keys()
    assert all(hf.same_bits(read[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("special_ids", [True, False])
def test_the_special_ids_are_the_tokenizers(tmp_path: Path, special_ids: bool) -> None:
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    folder = write_tokenizer(tmp_path / "tokenizer", special_ids=special_ids)
    write(tmp_path / "out", TINY, folder)
    expected = (1, 2) if special_ids else (None, None)
    for read in (LlamaConfig.from_pretrained(tmp_path / "out"), GenerationConfig.from_pretrained(tmp_path / "out")):
        assert (read.bos_token_id, read.eos_token_id) == expected
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.bos_token_id, loaded.eos_token_id) == expected
    assert loaded.decode(loaded("a young llama")["input_ids"], skip_special_tokens=True) == "a young llama"


def test_a_bos_that_training_never_saw_is_not_named(tmp_path: Path) -> None:
    """Evaluations put BOS before a text with nothing before it, where there is one, and else EOS."""
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    write(tmp_path / "out", TINY, folder)
    assert hf.special_ids(tmp_path / "out") == (None, (2,))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] is None
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.bos_token_id, loaded.eos_token_id) == (None, 2)


def test_transformers_4_and_5_find_their_own_keys() -> None:
    written = hf_config.to_hf_config(TINY, torch.bfloat16, 1, 2)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == TINY.rope_theta
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    for version_only in ({"rope_parameters"}, {"rope_theta"}):
        assert hf_config.from_hf_config({key: v for key, v in written.items() if key not in version_only}) == TINY


# --- what cannot be the same is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        (
            {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is 500000.0 in rope_scaling and elsewhere",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 12345.0}}, "yarn"),
        ({"rope_parameters": {"rope_theta": 12345.0, "partial_rotary_factor": 0.5}}, "0.5 of each head"),
        ({"rope_theta": 500000.0}, "500000"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "mistral"}, "mistral"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings is 1000000000; it must be at most"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', and must be an object"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], and must be an object"),
        ({"rope_theta": 10**400, "rope_parameters": {}}, "rope_theta is 1000"),
        ({"head_dim": {}}, "head_dim is {}"),
    ],
)
def test_what_cria_cannot_represent_is_named(setting: dict[str, Any], named: str) -> None:
    written = hf_config.to_hf_config(TINY, torch.float32, 1, 2)
    assert hf_config.from_hf_config(written) == TINY
    with pytest.raises(ValueError, match=named):
        hf_config.from_hf_config({**written, **setting})


def test_weights_that_do_not_fit_are_named(tmp_path: Path, tokenizer: Path) -> None:
    weights = write(tmp_path / "out", TINY, tokenizer)
    file = tmp_path / "out" / "model.safetensors"
    norm = "model.norm.weight"

    def refuses(changed: dict[str, torch.Tensor], named: str) -> None:
        save_file(changed, file)
        with pytest.raises(ValueError, match=named):
            hf.load(tmp_path / "out")

    refuses({name: tensor for name, tensor in weights.items() if name != norm}, f"{norm} is missing")
    refuses({**weights, "model.layers.2.self_attn.q_proj.weight": weights[norm].clone()}, "is not a parameter")
    refuses({**weights, norm: torch.ones(7)}, r"shape \(7,\)")
    refuses({**weights, norm: weights[norm].half()}, "must all be float32")
    refuses({**weights, "lm_head.weight": weights["lm_head.weight"].to(torch.int8)}, "lm_head.weight is I8")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        hf.load(tmp_path / "out")


def test_a_tied_head_may_be_stored_only_if_it_is_the_embedding(tmp_path: Path, tokenizer: Path) -> None:
    weights = write(tmp_path / "out", shape(tied=True), tokenizer)
    embedding = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": embedding.clone()}, tmp_path / "out" / "model.safetensors")
    assert hf.load(tmp_path / "out")[1].keys() == weights.keys()
    save_file({**weights, "lm_head.weight": embedding + 1}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match="ties the embeddings"):
        hf.load(tmp_path / "out")


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, tokenizer: Path) -> None:
    write(tmp_path / "out", TINY, tokenizer, max_shard_size=100_000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    change(index, weight_map={"model.norm.weight": "../other/model.safetensors"})
    with pytest.raises(ValueError, match="leads out of its folder"):
        hf.load(tmp_path / "out")


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 5}, {"model.norm.weight": None}])
def test_an_index_of_another_shape_is_named(tmp_path: Path, tokenizer: Path, weight_map: Any) -> None:
    write(tmp_path / "out", TINY, tokenizer, max_shard_size=100_000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    for content in ({"weight_map": weight_map}, {}):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: weight_map is no object of weights"):
            hf.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", "null"])
def test_json_that_is_no_object_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is no JSON object"):
        (hf.load if name == "config.json" else hf.special_ids)(tmp_path)


@pytest.mark.parametrize("ids", ["x", ["x"], [None], -1, True])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
def test_special_ids_that_are_no_ids_are_named(tmp_path: Path, ids: Any, key: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({key: ids}))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {key} is "):
        hf.special_ids(tmp_path)


def test_folders_that_are_no_model_are_named(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        hf.load(tmp_path)
    write(tmp_path / "out", TINY, tokenizer)
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        hf.load(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON object"):
        hf.load(tmp_path / "out")


# --- writing ---------------------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failure_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", TINY, tokenizer)
    before = listing(tmp_path)
    assert before

    def interrupted(weights: dict[str, torch.Tensor], folder: Path, **settings: Any) -> None:
        assert (folder / "config.json").is_file(), "it began to write"
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "save_torch_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", TINY, tokenizer)
    assert listing(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_an_earlier_export_is_replaced_whole(tmp_path: Path, tokenizer: Path) -> None:
    write(tmp_path / "out", TINY, tokenizer, max_shard_size=100_000)
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty", "new"):
        write(tmp_path / name, TINY, tokenizer)
    assert listing(tmp_path / "out") == listing(tmp_path / "empty") == listing(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["empty", "new", "out"]


@pytest.mark.parametrize(("umask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_an_export_is_as_readable_as_the_umask_says(
    tmp_path: Path, tokenizer: Path, umask: int, folder_mode: int, file_mode: int
) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out", TINY, tokenizer)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {file_mode}


def test_a_folder_with_anything_else_is_refused_untouched(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    write(tmp_path / "out", TINY, tokenizer)
    (tmp_path / "out" / "notes.md").write_text("more work")
    (tmp_path / "file").write_text("a file")
    before = listing(tmp_path)
    for name, named in (("thesis", "chapter1.tex"), ("out", "notes.md"), ("file", "is a file")):
        with pytest.raises(ValueError, match=named):
            write(tmp_path / name, TINY, tokenizer)
    assert listing(tmp_path) == before


def test_what_reads_otherwise_than_it_was_meant_is_not_committed(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = hf.save_torch_state_dict

    def flips_a_bit(weights: dict[str, torch.Tensor], folder: Path, **settings: Any) -> None:
        honest(weights, folder, **settings)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    monkeypatch.setattr(hf, "save_torch_state_dict", flips_a_bit)
    with pytest.raises(OSError, match="reads otherwise"):
        write(tmp_path / "out", TINY, tokenizer)
    assert listing(tmp_path) == {}


def test_same_bits_tells_what_equality_does_not() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert hf.same_bits(nan, nan.clone())
    assert not hf.same_bits(zero, -zero)
    assert not hf.same_bits(zero, zero.double())


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    last = hf.tokenizer_facts(tokenizer).vocab_size - 1
    fits, small = (dataclasses.replace(TINY, vocab_size=size) for size in (last + 1, last))
    write(tmp_path / "fits", fits, tokenizer)
    with pytest.raises(ValueError, match=rf"ids up to {last}, but the model has {last} "):
        write(tmp_path / "small", small, tokenizer)
    assert not (tmp_path / "small").exists()


def test_an_incomplete_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    change(folder / "tokenizer_config.json", eos_token={"content": "<end>"})
    with pytest.raises(ValueError, match="'<end>' as eos_token"):
        write(tmp_path / "out", TINY, folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json is missing"):
        write(tmp_path / "out", TINY, folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\x00", b'{"version": "1.0"'])
def test_a_tokenizer_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        write(tmp_path / "out", TINY, folder)


@pytest.mark.parametrize("token", [5, {"x": 1}, ["</s>"]])
def test_a_special_token_that_is_no_text_is_refused(tmp_path: Path, token: Any) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    change(folder / "tokenizer_config.json", eos_token=token)
    with pytest.raises(ValueError, match=r"as eos_token; tokenizer\.json does not have it"):
        write(tmp_path / "out", TINY, folder)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    weights = weights_of(make_model(TINY))
    weights["model.norm.weight"] = torch.full((TINY.hidden_size,), 1e5)
    halves = {name: tensor.half() for name, tensor in weights.items()}
    with (
        pytest.raises(ValueError, match=r"norm\.weight is not finite as torch\.float16"),
        staged(tmp_path / "o", {}) as s,
    ):
        hf.write(s, TINY, halves, tokenizer)
