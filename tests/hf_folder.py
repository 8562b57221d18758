"""Small models, tokenizers and runs on disk, for the tests of export, generation and their commands."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

from data_prep.shard import folder_fingerprint
from pretrain import config, saver
from pretrain.model import Llama
from pretrain.sections import CheckpointConfig, Config, DataConfig, ModelConfig, SourceConfig

TEXT = "A cria is a young llama. def cria(n): return n * 'llama'\n the young llama is a cria " * 20

TINY = ModelConfig(
    vocab_size=352,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    rope_theta=12345.0,
)

HEADS = [(4, False), (2, False), (1, False), (2, True)]
"""Key-value heads of 4 (multi-head, grouped-query, multi-query), and whether the embeddings are tied."""


def shape(num_key_value_heads: int = 2, tied: bool = False) -> ModelConfig:
    """TINY with other heads and embeddings."""
    return dataclasses.replace(TINY, num_key_value_heads=num_key_value_heads, tie_word_embeddings=tied)


def write_tokenizer(folder: Path, vocab_size: int = 340, special_ids: bool = True) -> Path:
    """A Hugging Face tokenizer folder with a byte-fallback BPE of Llama's kind: 3 + 256 ids, then merges."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    named = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*named, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] in named]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if special_ids:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [bos])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    if special_ids:
        settings |= {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_model(model_config: ModelConfig, seed: int = 0) -> Llama:
    """A model whose layers matter: without training, the initial ones hardly move the residual stream."""
    with torch.device("meta"):
        model = Llama(model_config)
    model.materialize(torch.device("cpu"))
    model.init_weights(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
            elif "layers" in name:
                parameter.mul_(4)
    return model


def weights_of(model: Llama) -> dict[str, torch.Tensor]:
    """Its parameters by name, detached."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write_run(run_dir: Path, model_config: ModelConfig, steps: tuple[int, ...] = (9, 10)) -> dict[int, Llama]:
    """A run folder with configuration, tokenizer and real checkpoints; returns the model of each step."""
    run_dir.mkdir(parents=True)
    data = DataConfig(seq_len=32, sources=[SourceConfig(name="prose", train="data/prose")])
    config.write(Config(run_dir=str(run_dir), model=model_config, data=data), run_dir / "config.yaml")
    tokenizer = folder_fingerprint(write_tokenizer(run_dir / "tokenizer"))
    saved = {}
    for step in steps:
        model = make_model(model_config, seed=step)
        writer = saver.Saver(run_dir, CheckpointConfig(keep_last=0), say=lambda line: None)
        facts = {"model": model_config.shape(), "data": {"tokenizer": tokenizer}}
        writer.save(step, model, torch.optim.AdamW(model.parameters()), {"step": step, **facts})
        writer.close()
        saved[step] = model
    return saved
