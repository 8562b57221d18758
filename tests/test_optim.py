"""The schedule's end points, the parameter groups, and the update that is skipped."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain import soundness
from pretrain.model import Llama
from pretrain.optim import clip_gradients, learning_rate, make_optimizer, step_unless
from pretrain.sections import ModelConfig, OptimConfig
from pretrain.skips import Skips

SMALL = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def small_model(device: str = "cpu") -> Llama:
    with torch.device("meta"):
        model = Llama(SMALL)
    model.materialize(torch.device(device))
    model.init_weights(1)
    return model


@pytest.mark.parametrize(("warmup", "steps"), [(2000, 1_430_512), (0, 10), (1, 2), (10, 10), (3, 400)])
def test_schedule_meets_its_end_points(warmup: int, steps: int) -> None:
    config = OptimConfig(max_lr=4e-4, min_lr=4e-5, warmup_steps=warmup)
    at = {step: learning_rate(step, config, steps) for step in {1, max(1, warmup), warmup + 1, steps // 2 + 1, steps}}
    if warmup:
        assert at[1] == pytest.approx(4e-4 / warmup)
        assert at[warmup] == pytest.approx(4e-4)
    if steps > warmup:
        assert at[steps] == pytest.approx(4e-5)
    assert all(4e-5 - 1e-15 <= lr <= 4e-4 + 1e-15 for step, lr in at.items() if step > warmup)


def test_schedule_rises_then_falls_and_is_half_way_in_the_middle() -> None:
    config = OptimConfig(max_lr=1.0, min_lr=0.1, warmup_steps=100)
    lrs = [learning_rate(step, config, 1100) for step in range(1, 1101)]
    assert lrs[:100] == sorted(lrs[:100])
    assert lrs[99:] == sorted(lrs[99:], reverse=True)
    assert lrs[599] == pytest.approx(0.55)  # step 600 is half way from 100 to 1,100


@pytest.mark.parametrize(("decay", "half_way"), [("cosine", 0.5), ("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_the_decay_takes_the_last_steps_alone(decay: Any, half_way: float) -> None:
    config = OptimConfig(max_lr=1.0, min_lr=0.1, warmup_steps=100, lr_decay=decay, lr_decay_steps=200)
    lrs = [learning_rate(step, config, 1100) for step in range(1, 1101)]
    assert lrs[99:900] == [1.0] * 801, "from the warm-up's end to step 900"
    assert lrs[899:] == sorted(lrs[899:], reverse=True)
    assert lrs[900] < 1.0
    assert lrs[999] == pytest.approx(0.1 + 0.9 * half_way)
    assert lrs[-1] == pytest.approx(0.1)
    longer = [learning_rate(step, config, 5000) for step in range(1, 901)]
    assert longer == lrs[:900], "what is trained before the decay is the same in a run of any length"
    whole = replace(config, lr_decay_steps=0)
    assert [learning_rate(step, whole, 1100) for step in range(1, 1101)] == [
        learning_rate(step, replace(config, lr_decay_steps=1000), 1100) for step in range(1, 1101)
    ]


def test_norms_and_the_embedding_are_not_decayed_unless_asked() -> None:
    model = small_model()
    names = {p: name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.1))
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(names)
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name or "embed_tokens" in name else 0.1), name
    everything = make_optimizer(model, OptimConfig(weight_decay=0.1, decay_norms_and_embeddings=True))
    assert [(g["weight_decay"], len(g["params"])) for g in everything.param_groups] == [(0.1, len(names))]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_updates_nothing(bad: float, device: str) -> None:
    """By fused AdamW's own switch, which is another kernel's on each kind of device."""
    model = small_model(device)
    optimizer, skips = make_optimizer(model, OptimConfig()), Skips(10.0, 10, torch.device(device))
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)

    def step(spoil: bool) -> float:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        if spoil:
            model.model.layers[1].mlp.up_proj.weight.grad[3, 4] = bad
        skipped = skips.judge(clip_gradients(model, 1.0))
        step_unless(optimizer, skipped)
        optimizer.zero_grad()
        return skipped.item()

    assert step(spoil=False) == 0
    before = [p.clone() for p in model.parameters()]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    assert step(spoil=True) == 1
    for p, old, old_state in zip(model.parameters(), before, state):
        assert torch.equal(p, old)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in old_state.items())
    assert step(spoil=False) == 0
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before))


@pytest.mark.gpu
def test_judging_an_update_waits_for_nothing_and_a_broken_weight_is_found() -> None:
    """Where only deterministic algorithms are allowed, too; the number that is not finite stands amid many."""
    device = torch.device("cuda")
    skips, norms = Skips(10.0, 10, device), torch.rand(100, device=device) + 1
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        skipped = [skips.judge(norm) for norm in norms.unbind()] + [skips.judge(100 * norms[0])]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert torch.stack(skipped).tolist() == [0.0] * 100 + [1.0]
    tensors = {"a": torch.ones(5, device=device), "b": torch.ones(3_000, 5_000, device=device)}
    assert soundness.problem(tensors) is None
    tensors["b"][1_234, 4_321] = float("nan")
    assert str(soundness.problem(tensors)).startswith("b of rank 0 on ")
