"""One peer's training step, in a process, and perhaps an environment, of its own: the other side of `bench_peers`.

    SPEC.json (peer, options) ─> its model with the given weights ─> the given batches ─> forward, backward, clip, AdamW ─> OUT

Only torch, safetensors and the peer are needed. The loop is the plain one that each peer's own trainer amounts to on one
device: fp32 weights, bf16 autocast where asked for, fused AdamW, clipping without a synchronisation.
"""

import importlib.metadata
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain import bench_timing

Loss = Callable[[Tensor, Tensor], Tensor]
"""input_ids, targets, (B, T) int64 each -> mean cross-entropy in nats a token, a scalar."""

Spec = dict[str, Any]


def transformers_llama(spec: Spec) -> tuple[nn.Module, Loss]:
    """The LlamaForCausalLM of transformers, with SDPA; `liger`: with Liger's kernels, given by their names."""
    import transformers

    if spec["options"].get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(**spec["options"]["liger"])
    model = transformers.LlamaForCausalLM.from_pretrained(spec["folder"], attn_implementation="sdpa").float()
    forward = _maybe_compiled(model, spec)
    # The labels are shifted already; left to itself, the model would compute one position more than is counted.
    return (
        model,
        lambda ids, targets: forward(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss,
    )


def tinyllama(spec: Spec) -> tuple[nn.Module, Loss]:
    """Stand-in for TinyLlama's own code, whose kernels are no longer published: eager, SDPA's flash backend, Liger's kernels."""
    kernels = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": True}
    model, plain = transformers_llama({**spec, "options": {"liger": {**kernels, "fused_linear_cross_entropy": False}}})

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return plain(ids, targets)

    return model, loss


def litgpt(spec: Spec) -> tuple[nn.Module, Loss]:
    """The GPT and chunked cross-entropy of litgpt; `chunk_size` tokens at a time (its default is 128; 0: all at once)."""
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    hf = _untied(spec)
    scaling = hf.get("rope_scaling")
    config = Config(
        name="cria-bench",
        block_size=hf["max_position_embeddings"],
        n_layer=hf["num_hidden_layers"],
        n_embd=hf["hidden_size"],
        n_head=hf["num_attention_heads"],
        n_query_groups=hf["num_key_value_heads"],
        intermediate_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        padded_vocab_size=hf["vocab_size"],
        rope_base=int(hf["rope_theta"]),
        rope_adjustments=scaling and {**scaling, "original_max_seq_len": scaling["original_max_position_embeddings"]},
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=hf["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
    )
    with torch.device(spec["device"]):  # where it is initialised for nothing, but sooner
        model, state = GPT(config), dict[str, Tensor]()
    copy_weights_hf_llama(config, {}, state, _weights(spec))
    model.load_state_dict(state)
    forward, chunk_size = _maybe_compiled(model, spec), spec["options"]["chunk_size"]
    return model, lambda ids, targets: chunked_cross_entropy(forward(ids), targets, chunk_size=chunk_size)


def torchtitan(spec: Spec) -> tuple[nn.Module, Loss]:
    """The Llama 3 of torchtitan 0.2, its RoPE scaled only where ours is; compiled as it does, each layer and the loss."""
    # Its package imports its reading of data too, which is not used.
    if importlib.util.find_spec("datasets") is None:
        sys.modules |= {name: MagicMock() for name in ("datasets", "datasets.distributed")}
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs
    from torchtitan.models.llama3.model.args import RoPEScalingArgs
    from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

    hf = _untied(spec)
    scaling = hf.get("rope_scaling", {"factor": 1.0})
    names = {"factor": "scaling_factor"}  # the others are called alike
    args = TransformerModelArgs(
        dim=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf["num_key_value_heads"],
        vocab_size=hf["vocab_size"],
        ffn_dim_multiplier=hf["intermediate_size"] / (4 * hf["hidden_size"]),  # below the width, which is then reached
        multiple_of=hf["intermediate_size"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=hf["rope_theta"],
        rope_scaling_args=RoPEScalingArgs(**{names.get(k, k): v for k, v in scaling.items() if k != "rope_type"}),
        max_seq_len=hf["max_position_embeddings"],
    )
    with torch.device(spec["device"]):
        model = Transformer(args)
    model.load_state_dict(Llama3StateDictAdapter(args, None).from_hf(_weights(spec)))
    loss_sum = cross_entropy_loss
    if spec["options"].get("compile"):
        for layer in model.layers.values():
            layer.compile(fullgraph=True)
        loss_sum = torch.compile(loss_sum)
    return model, lambda ids, targets: loss_sum(model(ids), targets) / targets.numel()


def causal_lm(spec: Spec) -> tuple[nn.Module, Loss]:
    """Any of transformers' causal language models, from the configuration in `options`, with random weights."""
    import transformers

    options = dict(spec["options"]["config"])
    with torch.device(spec["device"]):
        config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
        model = transformers.AutoModelForCausalLM.from_config(config).float()
    forward = _maybe_compiled(model, spec)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = forward(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return model, loss


BUILDERS = {
    "transformers": transformers_llama,
    "tinyllama": tinyllama,
    "litgpt": litgpt,
    "torchtitan": torchtitan,
    "causal_lm": causal_lm,
}


def _maybe_compiled(model: nn.Module, spec: Spec) -> Callable[..., Any]:
    """As `compile` says: whole (True), each of transformers' layers ("layers"), or not at all."""
    if spec["options"].get("compile") == "layers":
        for layer in model.get_submodule("model.layers").children():
            layer.compile()
        return model
    return torch.compile(model) if spec["options"].get("compile") else model


def _weights(spec: Spec) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(Path(spec["folder"]) / "model.safetensors").items()}


def _untied(spec: Spec) -> dict[str, Any]:
    hf = json.loads((Path(spec["folder"]) / "config.json").read_text())
    if hf["tie_word_embeddings"]:
        raise ValueError("this peer is not compared on tied embeddings")
    return hf


def make_optimizer(model: nn.Module, spec: Spec) -> torch.optim.AdamW:
    """Fused AdamW; norms, biases and embeddings are not decayed."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decayed = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in model.parameters() if p.ndim < 2 or id(p) in embeddings]
    optim = spec["optim"]
    groups = [{"params": decayed, "weight_decay": optim["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    betas = (optim["beta1"], optim["beta2"])
    return torch.optim.AdamW(groups, lr=optim["max_lr"], betas=betas, eps=optim["eps"], fused=True)


def time_steps(spec: Spec) -> dict[str, Any]:
    """Train on the batches, and return the row's figures."""
    device = torch.device(spec["device"])
    bench_timing.limit_memory(device, spec["memory_limit_gib"])
    model, loss_of = BUILDERS[spec["peer"]](spec)
    model.to(device).train()
    if spec["options"].get("bf16_residual"):
        for embedding in (module for module in model.modules() if isinstance(module, nn.Embedding)):
            embedding.register_forward_hook(lambda module, ids, hidden: hidden.to(torch.bfloat16))
    optimizer = make_optimizer(model, spec)
    batches = load_file(spec["batches"])["batches"].to(device)  # (steps, global_batch_size, T + 1)
    micro_batch_size = spec["micro_batch_size"]
    assert batches.shape[1] % micro_batch_size == 0
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=spec["precision"] == "bf16")
    timer, losses, norms = bench_timing.Timer(device, spec["in_turns"]), [], []

    def step(number: int) -> None:
        micro_batches = batches[number].long().split(micro_batch_size)
        loss_sum = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = spec["lrs"][number]
        for batch in micro_batches:
            with autocast:
                loss = loss_of(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) / len(micro_batches)
            loss.backward()
            loss_sum += loss.detach()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), spec["optim"]["max_grad_norm"], foreach=True))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum)

    for number in timer.steps(spec["warmup"], timed=False):
        step(number)
    for number in timer.steps(len(batches) - spec["warmup"], timed=True):
        step(number + spec["warmup"])
    seconds = timer.seconds()
    step_time_s = statistics.median(seconds)
    used = bench_timing.memory(device)
    return {
        "problem": bench_timing.over_limit(device, used["peak_mem_gib"], spec["memory_limit_gib"]),
        "tokens_per_sec_per_gpu": batches[0, :, 1:].numel() / step_time_s,
        "step_time_s": step_time_s,
        "step_time_spread_pct": 100 * (max(seconds) - min(seconds)) / step_time_s,
        **used,
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
        "first_grad_norm": norms[0].item(),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "note": f"{spec['package']} {importlib.metadata.version(spec['package'])}, torch {torch.__version__}",
    }


def main(spec_file: Path, out: Path) -> None:
    """Time what the specification says; memory that ran out is a row with a `problem`."""
    try:
        row = time_steps(json.loads(spec_file.read_text()))
    except (RuntimeError, MemoryError) as error:
        problem = bench_timing.out_of_memory(error)
        if problem is None:
            raise
        row = {"problem": problem}
    out.write_text(json.dumps(row))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
