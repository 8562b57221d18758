"""The Llama family: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU, no biases.

    input_ids (B, T) -> embed_tokens -> L x [h + attention(norm(h)); h + mlp(norm(h))] -> norm -> lm_head -> loss (scalar)

Modules and parameters carry Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`), so that a checkpoint and
an export differ by nothing but the container. A model is built on the meta device, sharded there if it is to be, then
`materialize`d on its device and filled by `init_weights` or from a checkpoint: no rank ever holds it whole.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain import ops
from pretrain.ops import REFERENCE, Linear, Operations
from pretrain.sections import ModelConfig


class KVCache:
    """Keys and values of the tokens seen so far, for generation. Grown by `Attention`, moved on by `Decoder`."""

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype):
        shape = (2, config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.buffer = torch.empty(shape, device=device, dtype=dtype)  # (2, L, B, H_kv, max_length, d)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new k and v, (B, H_kv, T, d) each, and return all so far, (B, H_kv, length + T, d) each.

        Raises:
            ValueError: that is more than max_length tokens.
        """
        end = self.length + k.shape[2]
        if end > self.buffer.shape[4]:
            raise ValueError(f"the cache holds {self.buffer.shape[4]} tokens; {end} are needed")
        self.buffer[0, layer, :, :, self.length : end] = k
        self.buffer[1, layer, :, :, self.length : end] = v
        return self.buffer[0, layer, :, :, :end], self.buffer[1, layer, :, :, :end]


class RMSNorm(nn.Module):
    """`ops.rms_norm` with its weight, (D,)."""

    def __init__(self, config: ModelConfig, operations: Operations):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.rms_norm_eps
        self.operations = operations

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.operations.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and shared key-value heads."""

    def __init__(self, config: ModelConfig, layer: int, operations: Operations):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.operations = operations
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rope: Tensor, mask: Any = None, cache: KVCache | None = None) -> Tensor:
        """x: (B, T, D); rope: (2, T, d) or (2, B, T, d); mask: of `Operations.document_mask`. Returns (B, T, D)."""
        B, T, D = x.shape
        q, k, v = ops.linears(x, self.q_proj, self.k_proj, self.v_proj)
        v = v.contiguous()  # the backward keeps v alone then, not the product of all three
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in (q, k, v))  # (B, H or H_kv, T, d)
        q, k = self.operations.rope(q, k, rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        out = self.operations.attention(q, k, v, causal=T > 1, mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """SwiGLU between two widths."""

    def __init__(self, config: ModelConfig, operations: Operations):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.operations = operations

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.operations.swiglu(x, self.gate_proj, self.up_proj, self.down_proj)


class Layer(nn.Module):
    """One decoder layer; the unit that FSDP shards and, where it does, torch.compile compiles."""

    def __init__(self, config: ModelConfig, layer: int, operations: Operations):
        super().__init__()
        self.input_layernorm = RMSNorm(config, operations)
        self.self_attn = Attention(config, layer, operations)
        self.post_attention_layernorm = RMSNorm(config, operations)
        self.mlp = MLP(config, operations)

    def forward(self, h: Tensor, rope: Tensor, mask: Any = None, cache: KVCache | None = None) -> Tensor:
        """h: (B, T, D); rope: (2, T, d) or (2, B, T, d); mask: of `Operations.document_mask`. Returns (B, T, D)."""
        h = h + self.self_attn(self.input_layernorm(h), rope, mask, cache)
        return h + self.feed_forward(h)

    def feed_forward(self, h: Tensor) -> Tensor:
        """The second half, with its norm: what `parallel.recompute` mlp computes again. (B, T, D) -> (B, T, D)."""
        return self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    """Everything but the output projection."""

    def __init__(self, config: ModelConfig, operations: Operations, dtype: torch.dtype | None, eos_id: int | None):
        super().__init__()
        self.operations, self.dtype, self.eos_id = operations, dtype, eos_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer, operations) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, operations)
        self.rope: Tensor  # (2, max_position_embeddings, d), filled by Llama.materialize
        shape = (2, config.max_position_embeddings, config.head_dim)
        self.register_buffer("rope", torch.empty(shape), persistent=False)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """input_ids: (B, T) int64. Returns the hidden states after the last norm, (B, T, D)."""
        start = 0 if cache is None else cache.length
        T = input_ids.shape[1]
        rope, mask = self.rope[:, start : start + T], None
        if self.eos_id is not None:
            assert cache is None, "text is generated within one document"
            document, position = ops.documents(input_ids, self.eos_id)
            rope, mask = self.rope[:, position], self.operations.document_mask(document)
        weight = self.embed_tokens.weight
        if torch.is_grad_enabled():  # FSDP2 gathers it in bf16, in which a frequent token's gradients would not add up
            weight = weight.float()
        h = nn.functional.embedding(input_ids, weight)
        h = h if self.dtype is None else h.to(self.dtype)  # the type of the residual stream, and so of all products
        for layer in self.layers:
            h = layer(h, rope, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(h)


class Head(Linear):
    """The output projection and the loss, which is taken in here: where FSDP has the weight whole, and reduces its gradient
    while the layers' backward runs.
    """

    def __init__(self, config: ModelConfig, operations: Operations):
        super().__init__(config.hidden_size, config.vocab_size)
        self.operations = operations

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T, D) -> logits (B, T, V); with targets, (B, T): their mean cross-entropy, scalar."""
        return output(self.operations, hidden, self.weight, targets)


def output(operations: Operations, hidden: Tensor, weight: Tensor, targets: Tensor | None) -> Tensor:
    """What `Head` returns, with a weight (V, D) that may be the embedding's."""
    if targets is None:
        return nn.functional.linear(hidden, weight.to(hidden.dtype))
    return operations.cross_entropy(hidden, weight, targets)


class Llama(nn.Module):
    """A Llama-family language model. Its forward returns the loss in training and logits otherwise.

    operations: what it computes with. dtype: the type that it computes in, whatever its weights are kept in; None: theirs.
    eos_id: the token that ends a document, where attention is to stay within documents; None: it sees whole sequences.
    """

    def __init__(
        self,
        config: ModelConfig,
        operations: Operations = REFERENCE,
        dtype: torch.dtype | None = None,
        eos_id: int | None = None,
    ):
        super().__init__()
        self.config, self.operations = config, operations
        self.model = Decoder(config, operations, dtype, eos_id)
        # Tied, there is one parameter and it is the embedding's: nothing to keep equal through sharding and saving.
        self.lm_head = None if config.tie_word_embeddings else Head(config, operations)

    def forward(self, input_ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """With targets: the mean cross-entropy in nats a token, fp32 scalar. Without: logits (B, T, V).

        input_ids, targets: (B, T) int64, T <= max_position_embeddings; targets may hold `ops.IGNORE_INDEX`.
        cache: on its first call T tokens of prompt, then one token a call.
        """
        hidden = self.model(input_ids, cache)
        if self.lm_head is None:
            return output(self.operations, hidden, self.model.embed_tokens.weight, targets)
        return self.lm_head(hidden, targets)

    def materialize(self, device: torch.device) -> None:
        """Give every parameter, sharded or not, memory on `device` (with garbage in it), and compute the rotary table."""
        self.to_empty(device=device)
        config = self.config
        self.model.rope = ops.rope_table(
            config.max_position_embeddings, config.head_dim, config.rope_theta, device, config.rope_scaling
        )

    def init_weights(self, seed: int, device: torch.device | None = None) -> None:
        """TinyLlama's initialisation, the same for every sharding: each parameter is drawn from (seed, its own name).

        Norms are 1. Matrices are normal: embedding and projections with std sqrt(2 / (5 D)), the two that write into the
        residual stream (o_proj, down_proj) with std 1 / (L sqrt(D)): GPT-NeoX-20B (arXiv 2204.06745) has twice that, for two
        branches side by side.

        device: where they are drawn, for each kind draws other numbers; None: where each parameter lies.
        """
        D, L = self.config.hidden_size, self.config.num_hidden_layers
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            std = 1 / (L * math.sqrt(D)) if name.endswith(("o_proj.weight", "down_proj.weight")) else math.sqrt(0.4 / D)
            _fill_normal(parameter, std, seed, name, device or parameter.device)


@torch.no_grad()
def _fill_normal(parameter: Tensor, std: float, seed: int, name: str, device: torch.device) -> None:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.empty(parameter.shape, device=device).normal_(std=std, generator=generator)
    fill(parameter, whole)


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, the same on all ranks, into a parameter; of a sharded one, each rank keeps its part."""
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device)
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters."""

    layer: int
    """Of one layer."""
    layer_in_products: int
    """Of one layer's matrices."""
    root: int
    """Of all that stands outside of the layers."""
    total: int
    """Of the model."""
    in_products: int
    """In matrix products: all but the input embedding and the norms."""


def count(model: ModelConfig) -> Counts:
    """Parameters by arithmetic: q and o D^2 each, k and v D D_kv each, gate, up and down D F each, two norms D."""
    D, F, V, L = model.hidden_size, model.intermediate_size, model.vocab_size, model.num_hidden_layers
    matrices = 2 * D * D + 2 * D * model.num_key_value_heads * model.head_dim + 3 * D * F
    root = V * D * (1 if model.tie_word_embeddings else 2) + D
    layer = matrices + 2 * D
    return Counts(layer, matrices, root, L * layer + root, L * matrices + V * D)
