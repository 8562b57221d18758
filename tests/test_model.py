"""It is a Llama: the same logits, gradients and training as transformers' model; TinyLlama's size and initialisation."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from pretrain.model import KVCache, Llama, count
from pretrain.ops import IGNORE_INDEX
from pretrain.sections import ModelConfig, RopeScaling

CPU = torch.device("cpu")

SCALED = RopeScaling(8.0, low_freq_factor=0.25, original_max_position_embeddings=32)
"""Of four frequencies with base 5000 one stays, one lies in the passage and two are low."""


def make_pair(
    heads_kv: int = 2, tied: bool = False, scaling: RopeScaling | None = None
) -> tuple[Llama, transformers.LlamaForCausalLM]:
    """Our model and transformers' with the same random weights, large enough that every term matters."""
    config = ModelConfig(
        vocab_size=515,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=heads_kv,
        max_position_embeddings=64,
        rope_theta=5000.0,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        ours = Llama(config)
    ours.materialize(CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in ours.parameters():  # norms too: a weight of 1 would hide a norm that is left out
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if p.ndim > 1 else 0.3) + (p.ndim == 1))
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=515,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=heads_kv,
            max_position_embeddings=64,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=tied,
            rope_parameters={**rope, "rope_theta": 5000.0},
        )
    )
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])
    return ours, theirs


@pytest.mark.parametrize(
    ("heads_kv", "tied", "scaling"),
    [*((heads, tied, None) for heads in (8, 2, 1) for tied in (False, True)), (2, True, SCALED), (8, False, SCALED)],
)
def test_logits_and_gradients_are_transformers(heads_kv: int, tied: bool, scaling: RopeScaling | None) -> None:
    """With scaled rotary frequencies too, on both sides of the original length."""
    ours, theirs = make_pair(heads_kv, tied, scaling)
    tokens = torch.randint(0, 515, (3, 50), generator=torch.Generator().manual_seed(1))
    input_ids, targets = tokens[:, :-1], tokens[:, 1:]
    expected = theirs(input_ids).logits
    torch.testing.assert_close(ours(input_ids), expected, atol=1e-5, rtol=0)

    ours(input_ids, targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    reference = dict(theirs.named_parameters())
    compared = 0
    for name, p in ours.named_parameters():
        assert p.grad.abs().max() > 1e-6, f"{name} has no gradient"
        torch.testing.assert_close(p.grad, reference[name].grad, atol=1e-4, rtol=0)
        compared += 1
    assert compared == len(reference)
    if scaling is not None:
        unscaled, _ = make_pair(heads_kv, tied)
        assert (unscaled(input_ids) - expected).abs().max() > 0.1, "it changed nothing"


def test_within_documents_each_is_computed_as_if_alone() -> None:
    """Logits and gradients of three documents in one sequence are those of three sequences: nothing leaks, nothing is lost."""
    whole, _ = make_pair()
    with torch.device("meta"):
        apart = Llama(whole.config, eos_id=2)
    apart.materialize(CPU)
    apart.load_state_dict(whole.state_dict())
    generator = torch.Generator().manual_seed(5)
    lengths = [7, 1, 22]
    parts = [
        torch.cat((torch.randint(3, 515, (2, n - 1), generator=generator), torch.full((2, 1), 2)), 1) for n in lengths
    ]
    packed, targets = torch.cat(parts, 1), torch.randint(0, 515, (2, sum(lengths)), generator=generator)
    logits = apart(packed)
    torch.testing.assert_close(logits, torch.cat([whole(part) for part in parts], 1), atol=1e-5, rtol=0)
    assert (logits - whole(packed)).abs().max() > 0.1, "the documents were near enough to one"

    apart(packed, targets).backward()
    for part, expected in zip(parts, targets.split(lengths, 1)):
        (whole(part, expected) * part.shape[1] / sum(lengths)).backward()
    for (name, p), q in zip(apart.named_parameters(), whole.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=0, msg=name)

    packed[:, :7] = torch.randint(3, 515, (2, 7), generator=generator)
    packed[:, 6] = 2
    assert torch.equal(apart(packed)[:, 7:], logits[:, 7:]), "what stands in one document changed another"


def test_tinyllama_has_its_parameters() -> None:
    sizes = count(ModelConfig())
    assert sizes.total == 1_100_048_384
    assert sizes.in_products == 1_034_420_224


def test_tied_embeddings_are_counted_once_and_stand_in_a_product() -> None:
    config = ModelConfig(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = ModelConfig(**{**vars(config), "num_key_value_heads": 2})
    sizes, tied = count(config), count(ModelConfig(**{**vars(config), "tie_word_embeddings": True}))
    assert sizes.total - tied.total == 100 * 8
    assert sizes.in_products == tied.in_products


def test_initialisation_is_tinyllamas() -> None:
    """The standard deviations of TinyLlama's initialisation, each within five standard errors of its estimate."""
    config = ModelConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=8
    )
    with torch.device("meta"):
        model = Llama(config)
    model.materialize(CPU)
    model.init_weights(seed=1)
    seen = set()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 1 / math.sqrt(256) / 5 if residual else math.sqrt(2.0 / 5 / 256)
        assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel())), name
        assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
        seen.add(tuple(p.flatten()[:4].tolist()))
    assert len(seen) == sum(p.ndim > 1 for p in model.parameters()), "two parameters hold the same numbers"


def test_initialisation_follows_the_seed() -> None:
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )

    def weights(seed: int) -> torch.Tensor:
        with torch.device("meta"):
            model = Llama(config)
        model.materialize(CPU)
        model.init_weights(seed)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])

    assert torch.equal(weights(1), weights(1))
    assert not torch.isclose(weights(1), weights(2)).any(dim=0).all()


def test_ignored_targets_do_not_count() -> None:
    ours, _ = make_pair()
    tokens = torch.randint(0, 515, (4, 20), generator=torch.Generator().manual_seed(2))
    masked = tokens[:, 1:].clone()
    masked[2:] = IGNORE_INDEX
    torch.testing.assert_close(ours(tokens[:, :-1], masked), ours(tokens[:2, :-1], tokens[:2, 1:]))


def test_cached_logits_are_the_uncached_ones() -> None:
    ours, _ = make_pair()
    tokens = torch.randint(0, 515, (2, 30), generator=torch.Generator().manual_seed(4))
    expected = ours(tokens)
    cache = KVCache(ours.config, batch_size=2, max_length=30, device=CPU, dtype=torch.float32)
    pieces = [ours(tokens[:, :11], cache=cache)] + [ours(tokens[:, t : t + 1], cache=cache) for t in range(11, 30)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="holds 30 tokens; 31"):
        ours(tokens[:, :1], cache=cache)
