"""What a run keeps in memory and how long its steps take, by arithmetic: the model's own bytes, and published runs."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest
import torch
from conftest import tiny_config, write_config
from torch import Tensor

from pretrain import bench_step, choice, config, parallel, preparation, published, speed
from pretrain.chips import CHIPS
from pretrain.memory import GIB, Layout, kept_bytes, layer_keeps, loss_keeps, memory
from pretrain.model import Llama, count
from pretrain.published import PUBLISHED
from pretrain.sections import ModelConfig, ParallelConfig

ROOT = Path(__file__).parent.parent
TINYLLAMA = config.load(ROOT / "configs" / "tinyllama-1.1b.yaml")
SHAPES = [
    ModelConfig(512, 256, 704, 3, 8, 2, max_position_embeddings=96),
    ModelConfig(640, 192, 512, 4, 3, 3, max_position_embeddings=160, tie_word_embeddings=True),
]


@pytest.mark.parametrize("model", [*SHAPES, TINYLLAMA.model], ids=lambda model: str(model.hidden_size))
def test_parameters_by_arithmetic_are_the_model_s(model: ModelConfig) -> None:
    with torch.device("meta"):
        llama = Llama(model)
    sizes = {name: parameter.numel() for name, parameter in llama.named_parameters()}
    in_layer = {name: size for name, size in sizes.items() if name.startswith("model.layers.0.")}
    products = {name: size for name, size in sizes.items() if "norm" not in name and "embed_tokens" not in name}
    head = 0 if "lm_head.weight" in sizes else sizes["model.embed_tokens.weight"]
    found = count(model)
    assert (found.total, found.layer) == (sum(sizes.values()), sum(in_layer.values()))
    assert found.root == found.total - model.num_hidden_layers * found.layer
    assert found.in_products == sum(products.values()) + head
    assert found.layer_in_products == sum(size for name, size in in_layer.items() if name in products)


def saved_bytes(model: ModelConfig, B: int, layout: Layout) -> int:
    """What our model's forward really keeps for its backward, without weights and the rotary table in fp32."""
    torch.manual_seed(0)
    with torch.device("meta"):
        llama = Llama(model, dtype=torch.bfloat16 if layout.precision == "bf16" else None)
    llama.materialize(torch.device("cpu"))
    llama.init_weights(0)
    computed_again = {key: getattr(layout, key) for key in ("activation_checkpointing", "recompute", "compile")}
    parallel.recompute(llama, ParallelConfig(**computed_again))
    if layout.precision == "bf16" and layout.strategy != "single":
        rope = llama.model.rope
        llama.to(torch.bfloat16).model.rope = rope  # as FSDP2 gathers it
    if layout.compile:
        torch._dynamo.reset()
        for layer in llama.model.layers:  # the partitioner that decides what is kept, without compiling kernels
            layer.compile(dynamic=False, backend="aot_eager_decomp_partition")
    T = model.max_position_embeddings
    not_counted = {p.untyped_storage().data_ptr() for p in (*llama.parameters(), llama.model.rope)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in not_counted:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # holds it, so that no address is used twice
        return tensor

    ids = torch.randint(model.vocab_size, (B, T))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        llama(ids, ids).backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


LAYOUTS = {
    "eager-fp32": Layout("full_shard", 1, 8, precision="fp32", compile=False),
    "eager-bf16": Layout("full_shard", 1, 8, compile=False),
    "compiled-fp32": Layout("full_shard", 1, 8, precision="fp32"),
    "compiled-bf16": Layout("full_shard", 1, 8),
    "compiled-bf16-alone": Layout(),
    "checkpointed-bf16": Layout("full_shard", 1, 8, activation_checkpointing=2, compile=False),
    "elementwise-bf16": Layout("full_shard", 1, 8, recompute="elementwise"),
    "elementwise-eager": Layout("full_shard", 1, 8, recompute="elementwise", compile=False),
    "mlp-bf16": Layout("full_shard", 1, 8, recompute="mlp"),
    "mlp-eager": Layout("full_shard", 1, 8, recompute="mlp", compile=False),
    "mlp-bf16-alone": Layout(recompute="mlp"),
    "elementwise-bf16-alone": Layout(recompute="elementwise"),
    "checkpointed-bf16-alone": Layout(activation_checkpointing=1),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("model", SHAPES, ids=lambda model: str(model.hidden_size))
def test_activations_are_those_that_the_model_keeps(model: ModelConfig, name: str) -> None:
    """Within 1%, by every byte that autograd saves; where nearly nothing is saved, within 2%."""
    T = model.max_position_embeddings
    layout = replace(LAYOUTS[name], micro_batch_size=2, fused_norm=False)
    expected = kept_bytes(model, T, layout) + loss_keeps(model, T, layout)
    if layout.strategy == "single":  # the layers' weights in bf16 are kept too; the plan counts them as parameters
        again = 3 * model.hidden_size * model.intermediate_size if layout.recompute == "mlp" else 0
        again = count(model).layer_in_products if layout.activation_checkpointing else again
        expected += 2 * model.num_hidden_layers * (count(model).layer_in_products - again)
    found = saved_bytes(model, 2, layout)
    assert found > 1e6
    assert expected == pytest.approx(found, rel=0.02 if layout.activation_checkpointing == 1 else 0.01)


def test_activations_grow_with_tokens_not_with_their_square() -> None:
    layout = Layout("full_shard", 2, 8, micro_batch_size=8)
    once, twice = (kept_bytes(TINYLLAMA.model, T, layout) for T in (2048, 4096))
    assert twice == pytest.approx(2 * once, rel=1e-3)
    checkpointed = kept_bytes(TINYLLAMA.model, 2048, replace(layout, activation_checkpointing=1))
    assert checkpointed < once / 10
    half = kept_bytes(TINYLLAMA.model, 2048, replace(layout, activation_checkpointing=2))
    assert half == pytest.approx((once + checkpointed) / 2, rel=1e-3)


def test_micro_batch_16_fits_40_gb_where_the_mlp_is_computed_again() -> None:
    """One A100-40G, compiled; the bytes are those that the setting's docstring names."""
    parts = ("none", "elementwise", "mlp")
    layouts = [Layout(micro_batch_size=16, recompute=part) for part in parts]
    assert [round(sum(layer_keeps(TINYLLAMA.model, layout).values())) for layout in layouts] == [59_528, 40_072, 17_544]
    limit = CHIPS["A100-40G"].memory_gib * GIB
    none, elementwise, mlp = (memory(TINYLLAMA.model, 2048, layout).total for layout in layouts)
    assert mlp < (1 - choice.ROOM) * limit < limit < elementwise < none
    steps = [speed.step_seconds(TINYLLAMA.model, 2048, layout, CHIPS["A100-40G"], speed.A100) for layout in layouts]
    assert steps[0].recomputed == 0 < steps[1].recomputed < steps[2].recomputed
    assert steps[1].seconds < 1.02 * steps[0].seconds


def test_sharding_divides_what_it_says() -> None:
    one, all_, inside = (
        memory(TINYLLAMA.model, 2048, Layout(strategy, nodes, 8, micro_batch_size=8, reduce="micro_step"))
        for strategy, nodes in (("full_shard", 1), ("full_shard", 2), ("hybrid", 2))
    )
    assert one.optimizer == pytest.approx(8 * count(TINYLLAMA.model).total / 8)
    assert all_.optimizer == pytest.approx(one.optimizer / 2)
    assert inside == one
    whole = memory(TINYLLAMA.model, 2048, Layout("full_shard", 1, 8, micro_batch_size=8, grad_accum_steps=2))
    assert whole.gradients - one.gradients == pytest.approx(4 * count(TINYLLAMA.model).total)


def test_tinyllama_fits_as_it_did() -> None:
    """16k tokens a GPU, micro-batch 8 of 2,048, trained on 16 A100-40G: without torch.compile, and as configured."""
    run = PUBLISHED[0]
    assert run.name.startswith("TinyLlama")
    assert run.layout.micro_batch_size * run.seq_len == 16_384
    assert memory(run.model, run.seq_len, run.layout).total < CHIPS["A100-40G"].memory_gib * GIB
    as_configured = choice.configured(TINYLLAMA, 2, 8, CHIPS["A100-40G"])
    assert as_configured.micro_batch_size == 8
    assert memory(TINYLLAMA.model, 2048, as_configured).total < CHIPS["A100-40G"].memory_gib * GIB


def test_tinyllama_takes_90_days_as_it_did() -> None:
    """3T tokens on 16 A100-40G: "90 days", by what its own implementation reached, 24k tokens/s/GPU."""
    run = PUBLISHED[0]
    assert (run.chip, run.layout.world_size, run.tokens_per_sec_per_gpu) == ("A100-40G", 16, 24_000)
    step = speed.step_seconds(run.model, run.seq_len, run.layout, CHIPS[run.chip], speed.A100)
    tokens = run.layout.world_size * run.layout.micro_batch_size * run.layout.grad_accum_steps * run.seq_len
    assert tokens == 2_097_152
    assert 3e12 / tokens * step.seconds / 86400 == pytest.approx(90, rel=0.03)


@pytest.mark.parametrize(("chip", "runs", "sizes"), [("A100-40G", 140, 10), ("H100", 70, 7)])
def test_published_runs_lie_within_the_stated_error(chip: str, runs: int, sizes: int) -> None:
    """The rates are those of the fit, and the error is that of runs left out of it: not less, and not half a point more. No
    length is far off.
    """
    fit, counted, rates = plan_fit(), published.counted(CHIPS[chip]), speed.rates_of(CHIPS[chip])
    assert (len(counted), len({run.size for run in counted})) == (runs, sizes)
    fitted = fit.fit(counted)
    assert fitted._asdict() == {name: getattr(rates, name) for name in fitted._fields}
    left_out = published.nine_of_ten(fit.errors_when_left_out(counted, fitted))
    assert left_out <= rates.fit_error == published.stated_error(CHIPS[chip], compiled=False) < left_out + 0.005 < 0.10
    assert {512, 65_536} <= {run.seq_len for run in counted}
    for seq_len in {run.seq_len for run in counted}:
        assert abs(median(published.error(run) for run in counted if run.seq_len == seq_len)) < 0.05


def test_compiled_tinyllama_is_as_fast_as_it_is_said_to_be() -> None:
    """By 10 to 15% on A100 (its own run: 24k tokens/s/GPU); and on H100 as nanochat's, which is not counted."""
    own = next(run for run in PUBLISHED if run.name.startswith("TinyLlama"))
    assert abs(published.error(own)) < 0.01
    gain = published.predicted(replace(own, layout=replace(own.layout, compile=True))) / published.predicted(own)
    assert 1.10 < gain < 1.15
    (compiled,) = [run for run in PUBLISHED if run.layout.compile]
    assert abs(published.error(compiled)) < speed.COMPILED_ERROR


def test_a_quarter_more_traffic_costs_a_compiled_step_what_is_said() -> None:
    run = next(run for run in PUBLISHED if run.name.startswith("TinyLlama"))
    compiled = replace(run.layout, compile=True)
    for chip, rates in (("A100-40G", speed.A100), ("H100", speed.HOPPER)):
        moved = speed.step_seconds(run.model, 2048, compiled, CHIPS[chip], rates)
        assert moved.memory_bound / 4 / moved.seconds == pytest.approx(speed.COMPILED_ERROR, rel=0.15)


def plan_fit() -> ModuleType:
    """The benchmark's script as a module."""
    spec = importlib.util.spec_from_file_location("plan_fit", ROOT / "benchmarks" / "plan_fit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ligers_swiglu_keeps_no_silu_and_the_compiler_none_either() -> None:
    """The eager step then holds what the compiled one does: 60.4 and 60.1 GiB by the allocator (benchmarks/notes.md)."""
    eager, compiled = (
        Layout(micro_batch_size=16, grad_accum_steps=2, compile=compile, fused_swiglu=not compile)
        for compile in (False, True)
    )
    for layout, allocated in ((eager, 60.44), (compiled, 60.07)):
        planned = memory(TINYLLAMA.model, 2048, layout)
        assert (planned.total - planned.context - planned.fragmentation) / GIB == pytest.approx(allocated, rel=0.01)


def test_what_the_plan_says_of_a_run_is_what_it_says_of_its_layout(tmp_path: Path) -> None:
    tree = tiny_config(tmp_path, tmp_path / "run")
    chosen = bench_step.with_random_data(config.load(write_config(tmp_path / "c.yaml", tree)), tmp_path / "data")
    run = preparation.prepare(chosen, saves=False)
    with run.at_end:
        layout = Layout(micro_batch_size=2, grad_accum_steps=4, precision="fp32", compile=False)
        held = memory(chosen.model, 32, layout)
        assert bench_step._planned_mem_gib(run) == (held.total - held.context - held.fragmentation) / GIB


def test_what_ran_is_not_said_to_be_far_from_fitting() -> None:
    """What others' code held is not ours, which would have been over in a few."""
    counted = [run for run in PUBLISHED if not run.assumed]
    shares = [memory(run.model, run.seq_len, run.layout).total / (CHIPS[run.chip].memory_gib * GIB) for run in counted]
    assert counted[0].name.startswith("TinyLlama")
    assert shares[0] < 0.9
    assert 1.05 < max(shares) <= 1.10
    assert sum(share > 1 for share in shares) <= len(shares) / 10


def test_a_faster_network_and_hybrid_sharding_help_where_they_should() -> None:
    rates, slow = speed.A100, replace(CHIPS["A100-40G"], network_gbits=100)
    exchanged = {
        (strategy, chip.network_gbits): sum(
            speed.communication_seconds(
                TINYLLAMA.model, Layout(strategy, 2, 8, micro_batch_size=8, grad_accum_steps=8), chip, rates
            )
        )
        for strategy in ("full_shard", "hybrid")
        for chip in (slow, CHIPS["A100-40G"])
    }
    assert exchanged["hybrid", 100] < exchanged["full_shard", 100] / 2
    assert exchanged["full_shard", 1600] < exchanged["full_shard", 100] / 10
    assert speed.exposed(2.0, 1.0, rates) == pytest.approx((1 - rates.hidden) * 2.0)
    assert speed.exposed(2.0, 0.1, rates) == pytest.approx(1.9)
    assert speed.communication_seconds(TINYLLAMA.model, Layout(), slow, rates) == (0, 0)


def test_behind_the_last_micro_step_alone_replicas_exchange() -> None:
    """4 bytes a parameter, summed and spread again by a node's 8 ranks of 1/8 each: 4 N bytes, at 70% of 25 Gbit/s."""
    rates = replace(speed.A100, hop_s=0.0)
    layout = Layout("hybrid", 2, 8, micro_batch_size=8, grad_accum_steps=8, gather="step", reduce="micro_step")
    slow, free = (
        speed.step_seconds(TINYLLAMA.model, 2048, layout, replace(CHIPS["A100-40G"], network_gbits=n), rates)
        for n in (25, 1e9)
    )
    alone_s = 4 * count(TINYLLAMA.model).total / (0.7 * 25e9 / 8)
    computing_s = slow.seconds - slow.communication - slow.optimizer
    assert 2.0 < alone_s < computing_s, "a whole step would hide half of it"
    assert slow.communication - free.communication == pytest.approx(alone_s - 2 / 3 * computing_s / 8, rel=0.001)
    once = replace(layout, reduce="step")
    more = speed.communication_seconds(TINYLLAMA.model, once, CHIPS["A100-40G"], speed.A100)[1]
    assert more > speed.communication_seconds(TINYLLAMA.model, layout, CHIPS["A100-40G"], speed.A100)[1]


def test_a_ring_between_nodes_has_steps_that_take_time() -> None:
    """512 GPUs on a network of any width: 22 layers and the rest, each gathered twice and reduced once in a micro-step."""
    rates, wide = speed.HOPPER, replace(CHIPS["H100"], network_gbits=math.inf, link=math.inf)
    for strategy, steps in (("full_shard", 3 * 511), ("hybrid", 2 * 63)):
        layout = Layout(strategy, 64, 8, reduce="micro_step")
        took = sum(speed.communication_seconds(TINYLLAMA.model, layout, wide, rates))
        assert took == pytest.approx(23 * steps * rates.hop_s)
    within = Layout("full_shard", 1, 8, reduce="micro_step")
    assert sum(speed.communication_seconds(TINYLLAMA.model, within, wide, rates)) == 0


def test_replicas_within_a_node_exchange_over_its_links() -> None:
    layout = Layout("hybrid", 1, 8, micro_batch_size=8, grad_accum_steps=16, shard_size=4)
    found = {
        speed.communication_seconds(TINYLLAMA.model, layout, replace(CHIPS["A100-40G"], network_gbits=n), speed.A100)
        for n in (25, 1600)
    }
    assert len(found) == 1


def test_fp32_is_not_planned_at_the_peak_of_bf16() -> None:
    """M3, 6.76 GFLOP a token, at 19.5 TFLOP/s is 2,885 tokens/s."""
    layout = Layout("full_shard", 1, 8, micro_batch_size=2, grad_accum_steps=8, precision="fp32")
    step = speed.step_seconds(TINYLLAMA.model, 2048, layout, CHIPS["A100-40G"], speed.A100)
    assert 1000 < speed.tokens_per_sec_per_gpu(2048, layout, step) < 2885
    found = published.not_covered(TINYLLAMA.model, TINYLLAMA.data, layout, CHIPS["A100-40G"])
    assert found == {"fp32": "no published run is in fp32: its speed is by the datasheet's peak"}


def test_what_the_stated_error_says_nothing_of_is_named() -> None:
    """Nothing where published runs are alike; else each thing that none of them had, and what is known of it."""
    model, data, usual = TINYLLAMA.model, TINYLLAMA.data, Layout("full_shard", 2, 8, micro_batch_size=8)
    a100, h100 = CHIPS["A100-40G"], CHIPS["H100"]
    assert not data.intra_document
    assert published.not_covered(model, data, usual, a100) == published.not_covered(model, data, usual, h100) == {}
    long = replace(data, seq_len=131_072, intra_document=True)
    found = published.not_covered(model, long, replace(usual, precision="fp8"), h100)
    assert list(found) == ["fp8", "sequences of 131,072 tokens", "data.intra_document"]
    assert "no run on H100 that is counted has sequences of more than 65,536 tokens" in " ".join(found.values())
    assert "so small a model" in published.not_covered(SHAPES[0], data, usual, a100)
    assert list(published.not_covered(model, data, replace(usual, nodes=32), a100)) == ["256 GPUs"]
    assert published.not_covered(model, data, replace(usual, nodes=32), h100) == {}
    for strategy, chip in (("hybrid", a100), ("hybrid", h100), ("shard_grad_op", a100)):
        (words,) = published.not_covered(model, data, replace(usual, strategy=strategy), chip)
        assert words.startswith(f"{strategy} over several nodes")
        assert words.endswith(", where one run was 14% slower") == (strategy == "shard_grad_op")
    for strategy, chip in (("hybrid", a100), ("hybrid", h100), ("shard_grad_op", a100), ("shard_grad_op", h100)):
        assert published.not_covered(model, data, replace(usual, strategy=strategy, nodes=1), chip) == {}
    assert published.not_covered(model, data, replace(usual, strategy="shard_grad_op"), h100) == {}
