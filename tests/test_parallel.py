"""Sharding changes where the weights lie and nothing else: not the initial weights, not the norm, not the run.

All worlds of 1 to 4 ranks are made by one process (`ranks.py`), once for all tests here.
"""

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import forks
import pytest
import torch
from conftest import TINY_MODEL, records, tiny_config, write_config
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import checkpoint, config, parallel, preparation, sharding, trainer
from pretrain.sections import ParallelConfig

MODEL = {
    "vocab_size": 600,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
TIED = {"tie_word_embeddings": True}
STRATEGIES = ("full_shard", "shard_grad_op", "hybrid")
VARIANTS = [(3, 0.5, 1), (3, 1e9, 0), (1, 0.5, 0), (1, 1e9, 2)]
"""(micro-steps on four ranks, max_grad_norm, activation_checkpointing): each two of them on and off together."""
OTHERWISE = {
    "offloaded": {"strategy": "full_shard", "cpu_offload": True},
    "reduced-often": {"strategy": "full_shard", "reduce": "micro_step"},
    "gathered-often": {"strategy": "shard_grad_op", "gather": "micro_step", "reduce": "micro_step"},
    "exchanged-once": {"strategy": "hybrid", "gather": "step", "reduce": "step"},
}
COUNTED = {**{name: {"strategy": name} for name in STRATEGIES}, **OTHERWISE}
del COUNTED["offloaded"]
IN_BF16 = {f"{name}-bf16": {"strategy": name, "precision": "bf16"} for name in STRATEGIES}


@dataclass
class Worlds:
    """What the ranks left."""

    folder: Path

    def facts(self, name: str) -> dict:
        return json.loads((self.folder / name / "facts.json").read_text())

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / name / "weights.pt")


@pytest.fixture(scope="module")
def worlds(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Worlds of 1, 2, 3 and 4 ranks, the last on two nodes; the names of what they leave end with the number of ranks."""
    folder = tmp_path_factory.mktemp("worlds")

    tree = tiny_config(datasets, folder, data={"verify": "sizes"}, validation={"every_steps": 3})
    tree["train"] |= {"max_steps": 3, "global_batch_size": 12}
    # AdamW moves a weight whose gradient is no more than its rounding by as much as any other: here it does not.
    tree["optim"] |= {"warmup_steps": 1, "eps": 1e-6}
    common = config.load(write_config(folder / "common.yaml", tree))  # once: parsing costs more than a step

    def run(name: str, parallel: dict, micro_batch: int, clip: float, shape: dict | None = None) -> config.Config:
        return replace(
            common,
            run_dir=str(folder / name),
            model=replace(common.model, **(shape or {})),
            parallel=replace(common.parallel, **parallel),
            train=replace(common.train, micro_batch_size=micro_batch),
            optim=replace(common.optim, max_grad_norm=clip, warmup_steps=1),
        )

    def steps(name: str, parallel: dict, micro_batch: int, clip: float, shape: dict | None = None) -> list:
        return ["stepped", folder / f"steps-{name}", run(f"run-{name}", parallel, micro_batch, clip, shape)]

    def build(name: str, **settings: object) -> list:
        return ["built", folder / name, MODEL, settings]

    checkpoints = [folder / f"whole-{s}" / "checkpoints" / "step-00000003" for s in ("single", *STRATEGIES)]
    one = [build("built-1"), ["trained", run("whole-single", {}, 2, 0.5)]]
    one += [steps("clipped-1", {}, 2, 0.5), steps("recomputed-1", {"activation_checkpointing": 1}, 12, 1e9)]
    one += [steps("alone-1", {"strategy": "full_shard"}, 2, 0.5), steps("tied-1", {}, 2, 0.5, TIED)]
    two = [build("built-2"), steps("offloaded-2", OTHERWISE["offloaded"], 1, 0.5)]
    two += [steps("full_shard-2", {"strategy": "full_shard", "recompute": "elementwise"}, 1, 0.5)]
    two += [steps("shard_grad_op-2", {"strategy": "shard_grad_op", "activation_checkpointing": 1}, 1, 0.5)]
    two += [steps("hybrid-2", {"strategy": "hybrid", "shard_size": 1, "recompute": "mlp"}, 1, 0.5)]
    two += [steps("tied-2", {"strategy": "full_shard"}, 1, 0.5, TIED)]
    two += [["trained", run("whole-tied", {"strategy": "full_shard"}, 1, 0.5, TIED)]]
    three = [build("built-3")]
    four = [build("built-4"), build("full-4", strategy="full_shard")]
    for strategy in STRATEGIES:
        for number, (micro_steps, clip, recomputed) in enumerate(VARIANTS):
            settings = {"strategy": strategy, "activation_checkpointing": recomputed}
            if number == 0:
                four += [["trained", run(f"whole-{strategy}", settings, 3 // micro_steps, clip)]]
            else:
                four += [steps(f"{strategy}-{number}-4", settings, 3 // micro_steps, clip)]
    four += [steps(f"{name}-4", settings, 1, 0.5) for name, settings in OTHERWISE.items() if name != "offloaded"]
    four += [
        ["counted", folder / f"counted-{name}", TINY_MODEL, settings] for name, settings in (COUNTED | IN_BF16).items()
    ]
    four += [["unlike", TINY_MODEL, {"strategy": "hybrid", "cpu_offload": offload}] for offload in (False, True)]
    again = [["resharded", TINY_MODEL, {"strategy": strategy}, checkpoints] for strategy in STRATEGIES]
    tied = [TINY_MODEL | TIED, {}, [folder / "whole-tied" / "checkpoints" / "step-00000003"]]
    plan = [
        (1, 1, one),
        (2, 2, two),
        (3, 3, three),
        (4, 2, [*four, *again, ["resharded", *tied]]),
        (1, 1, [["resharded", TINY_MODEL, {}, checkpoints], ["resharded", *tied]]),
    ]
    jobs = folder / "worlds.pickle"
    jobs.write_bytes(pickle.dumps(plan))
    script = str(Path(__file__).parent / "ranks.py")
    done = subprocess.run([sys.executable, script, str(jobs)], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-10_000:]
    return Worlds(folder)


def test_more_than_one_rank_is_sharded(worlds: Worlds) -> None:
    assert worlds.facts("built-1")["sharding"]["strategy"] == "single"
    assert worlds.facts("built-1")["sharded"] == 0
    for name, strategy, shard_size in (
        ("built-2", "full_shard", 2),
        ("built-3", "full_shard", 3),
        ("built-4", "hybrid", 2),  # two nodes of two ranks
        ("full-4", "full_shard", 4),
    ):
        facts = worlds.facts(name)
        assert (facts["sharding"]["strategy"], facts["sharding"]["shard_size"]) == (strategy, shard_size)
        assert facts["sharded"] == facts["parameters"] > 20
        assert facts["timeouts"] == ["1:00:00"], "of all groups, a node's and those across nodes included"
        assert facts["held_bytes"] == pytest.approx(worlds.facts("built-1")["held_bytes"] / shard_size, rel=0.01)
    assert worlds.facts("built-4")["line"] == (
        "strategy hybrid (auto: 4 ranks in groups of 2; only gradients leave a group): 2 replicas of 2 shards; parameters are "
        "gathered for a layer, gradients reduced once a micro-step, across replicas once a step"
    )


def test_no_rank_ever_holds_the_model_whole(worlds: Worlds) -> None:
    """While a model is built and initialised: at most its own shard and one parameter, drawn and cut."""
    largest = 4 * MODEL["vocab_size"] * MODEL["hidden_size"]
    for name in ("built-2", "built-3", "built-4", "full-4"):
        facts = worlds.facts(name)
        assert facts["held_bytes"] <= facts["peak_bytes"] <= facts["held_bytes"] + 2 * largest
    assert worlds.facts("full-4")["peak_bytes"] < 0.5 * worlds.facts("built-1")["held_bytes"], (
        "this bound could not fail"
    )


def test_the_initial_weights_do_not_depend_on_the_sharding(worlds: Worlds) -> None:
    expected = worlds.weights("built-1")
    for name in ("built-2", "built-3", "built-4", "full-4"):
        weights = worlds.weights(name)
        assert weights.keys() == expected.keys()
        for parameter, weight in weights.items():
            assert torch.equal(weight, expected[parameter]), f"{parameter} of {name}"


def test_the_weights_still_have_tinyllamas_statistics_after_sharding(worlds: Worlds) -> None:
    D, L = MODEL["hidden_size"], MODEL["num_hidden_layers"]
    for name, weight in worlds.weights("built-2").items():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 1 / math.sqrt(D) / L if residual else math.sqrt(2 / 5 / D)
        error = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(expected, rel=error), name
        for half in weight.chunk(2):  # what each rank holds
            assert half.std().item() == pytest.approx(expected, rel=1.5 * error), name


def test_the_gradient_norm_is_the_global_one(worlds: Worlds) -> None:
    for name in ("built-2", "built-3", "built-4", "full-4"):
        assert worlds.facts(name)["grad_norm"] == pytest.approx(worlds.facts("built-1")["grad_norm"], rel=1e-5)


def same_steps(worlds: Worlds, name: str, expected: str) -> None:
    """Losses, norms and final weights within 1e-5."""
    found, one = worlds.facts(f"steps-{name}"), worlds.facts(f"steps-{expected}")
    assert len(one["losses"]) == 3
    assert found["losses"] == pytest.approx(one["losses"], abs=1e-5), name
    assert found["grad_norms"] == pytest.approx(one["grad_norms"], abs=1e-5), name
    weights = worlds.weights(f"steps-{expected}")
    for parameter, weight in worlds.weights(f"steps-{name}").items():
        assert (weight - weights.pop(parameter)).abs().max() <= 1e-5, f"{parameter} of {name}"
    assert not weights


def test_every_strategy_trains_the_model_of_one_process(worlds: Worlds) -> None:
    """With accumulation, clipping and activation checkpointing on and off, on one, two and four ranks."""
    assert min(worlds.facts("steps-clipped-1")["grad_norms"]) > 0.5, "the clipping never acted"
    clipped, free = worlds.weights("steps-clipped-1"), worlds.weights("steps-recomputed-1")
    assert max((clipped[name] - free[name]).abs().max().item() for name in free) > 1e-4, "the clipping changed nothing"
    same_steps(worlds, "alone-1", "clipped-1")
    for name in ("offloaded-2", "full_shard-2", "shard_grad_op-2", "hybrid-2", "reduced-often-4", "gathered-often-4"):
        same_steps(worlds, name, "clipped-1")
    same_steps(worlds, "exchanged-once-4", "clipped-1")
    for strategy in STRATEGIES:
        for number, (_, clip, _) in list(enumerate(VARIANTS))[1:]:  # the first is a whole run, below
            same_steps(worlds, f"{strategy}-{number}-4", "clipped-1" if clip == 0.5 else "recomputed-1")


def test_a_head_that_is_the_embedding_is_sharded_with_it(worlds: Worlds) -> None:
    assert "lm_head.weight" not in worlds.weights("steps-tied-1")
    assert worlds.facts("steps-tied-1")["losses"] != worlds.facts("steps-clipped-1")["losses"]
    same_steps(worlds, "tied-2", "tied-1")


def test_whole_runs_are_those_of_one_process(worlds: Worlds) -> None:
    """Metrics, validation and the final checkpoint, through the trainer and the saver; of replicas one is written."""
    folder = worlds.folder
    one = checkpoint.load_tensors(folder / "whole-single" / "checkpoints" / "step-00000003")
    size = sum(tensor.nbytes for tensor in one.values())
    for strategy in STRATEGIES:
        run = folder / f"whole-{strategy}"
        for kind, key in (("train", "loss"), ("validation", "losses")):
            for step, record in records(folder / "whole-single", kind).items():
                assert records(run, kind)[step][key] == pytest.approx(record[key], abs=1e-5)
        start = records(run, "start")[0]["sharding"]
        assert start["strategy"] == strategy
        assert start["replicas"] == (2 if strategy == "hybrid" else 1)
        saved = run / "checkpoints" / "step-00000003"
        assert checkpoint.verify(saved) is None
        tensors = checkpoint.load_tensors(saved)
        assert tensors.keys() == one.keys(), "names are Hugging Face's"
        assert all((tensors[name] - tensor).abs().max() <= 1e-5 for name, tensor in one.items())
        files = [path.stat().st_size for path in (saved / "tensors").glob("*.distcp")]
        assert len(files) == 4, "every rank writes its part"
        assert size <= sum(files) < 1.5 * size, "a replica was written twice"


class Called(TorchDispatchMode):
    """Counts the calls of one operation."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += str(function).startswith(f"{self.name}.")
        return function(*args, **(kwargs or {}))


def test_parameters_and_gradients_travel_as_often_as_the_strategy_says(worlds: Worlds) -> None:
    """FSDP2's collectives of each of three micro-steps; groups are the layers; head and root, gathered once."""
    L = TINY_MODEL["num_hidden_layers"]
    gather, gather_once = {"_allgather_base_": 2 * L + 2}, {"_allgather_base_": L + 2}
    reduce, across = {"_reduce_scatter_base_": L + 2}, {"allreduce_": L + 2}
    assert {name: worlds.facts(f"counted-{name}")["exchanges"] for name in COUNTED} == {
        "full_shard": [gather, gather, gather | reduce],
        "reduced-often": [gather | reduce, gather | reduce, gather | reduce],
        "shard_grad_op": [gather_once, {}, reduce],
        "gathered-often": [gather_once | reduce, gather_once | reduce, gather_once | reduce],
        "hybrid": [gather | reduce, gather | reduce, gather | reduce | across],
        "exchanged-once": [gather_once, {}, reduce | across],
    }


def test_weights_travel_in_the_type_that_is_computed_in_and_gradients_in_fp32(worlds: Worlds) -> None:
    """Within a group and across replicas, added up over the micro-steps before or not."""
    for names, gathered in ((COUNTED, "torch.float32"), (IN_BF16, "torch.bfloat16")):
        for name in names:
            types = worlds.facts(f"counted-{name}")["types"]
            expected = {"_allgather_base_": [gathered], "_reduce_scatter_base_": ["torch.float32"]}
            across = {"allreduce_": ["torch.float32"]} if names[name]["strategy"] == "hybrid" else {}
            assert types == expected | across, name


def test_the_gradients_of_a_step_are_exchanged_once(datasets: Path, tmp_path: Path) -> None:
    """By the trainer's own step, of three micro-steps on two ranks; a reduction a group, as above."""
    sections = {"train": {"micro_batch_size": 2, "global_batch_size": 12}, "parallel": {"strategy": "full_shard"}}
    settings = config.load(write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", **sections)))

    def step(rank: int) -> None:
        run = preparation.prepare(settings)
        with Called("c10d._reduce_scatter_base_") as reductions:
            trainer.optimizer_step(run, trainer.make_loader(run))
        (tmp_path / f"{rank}").write_text(f"{run.grad_accum_steps} {reductions.count}")
        run.at_end.close()
        parallel.leave()

    output = tmp_path / "output.txt"
    assert forks.finish(forks.fork_ranks(2, output, step)) == [0, 0], output.read_text()
    assert [(tmp_path / rank).read_text() for rank in "01"] == [f"3 {TINY_MODEL['num_hidden_layers'] + 2}"] * 2


TINYLLAMA, SEVEN_B, A100 = 1_100_048_384, 6_738_415_616, 40 * 2**30


@pytest.mark.parametrize(
    ("settings", "model", "ranks", "node", "memory", "expected"),
    [
        ({}, TINYLLAMA, 1, 1, A100, ("single", 1, 1, "step", "step")),
        ({"cpu_offload": True}, SEVEN_B, 1, 1, A100, ("full_shard", 1, 1, "layer", "micro_step")),
        ({}, TINYLLAMA, 8, 8, A100, ("shard_grad_op", 8, 1, "step", "step")),
        ({"precision": "fp32"}, TINYLLAMA, 8, 8, A100, ("full_shard", 8, 1, "layer", "step")),
        ({"precision": "fp32"}, TINYLLAMA, 16, 8, A100, ("hybrid", 8, 2, "step", "micro_step")),
        ({}, SEVEN_B, 8, 8, A100, ("full_shard", 8, 1, "layer", "micro_step")),
        ({}, TINYLLAMA, 8, 8, None, ("full_shard", 8, 1, "layer", "step")),
        ({}, TINYLLAMA, 16, 8, A100, ("hybrid", 8, 2, "step", "step")),
        ({}, TINYLLAMA, 16, 8, A100 // 2, ("hybrid", 8, 2, "step", "micro_step")),
        ({}, TINYLLAMA, 16, 8, None, ("hybrid", 8, 2, "layer", "micro_step")),
        ({"cpu_offload": True}, TINYLLAMA, 16, 8, A100, ("hybrid", 8, 2, "layer", "micro_step")),
        ({"gather": "layer"}, TINYLLAMA, 16, 8, A100, ("hybrid", 8, 2, "layer", "step")),
        ({}, SEVEN_B, 128, 8, A100, ("hybrid", 8, 16, "layer", "micro_step")),
        ({}, SEVEN_B, 16, 4, A100, ("full_shard", 16, 1, "layer", "micro_step")),
        ({"shard_size": 8}, SEVEN_B, 16, 4, A100, ("hybrid", 8, 2, "layer", "micro_step")),
        ({"strategy": "hybrid"}, TINYLLAMA, 8, 8, A100, ("hybrid", 8, 1, "step", "step")),
        ({"reduce": "micro_step"}, TINYLLAMA, 16, 8, A100, ("hybrid", 8, 2, "step", "micro_step")),
        ({"strategy": "shard_grad_op"}, SEVEN_B, 16, 8, A100, ("shard_grad_op", 16, 1, "step", "micro_step")),
    ],
)
def test_auto_goes_by_nodes_and_memory(
    settings: dict, model: int, ranks: int, node: int, memory: int | None, expected: tuple
) -> None:
    chosen = sharding.choose(ParallelConfig(**settings), model, ranks, node, memory)
    assert (chosen.strategy, chosen.shard_size, chosen.replicas, chosen.gather, chosen.reduce) == expected
    assert chosen.why in str(chosen)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: sharding.choose(ParallelConfig(strategy="single"), 1, 2, 2, None), ["single", "2 ranks", "auto"]),
        (
            lambda: sharding.choose(ParallelConfig(strategy="hybrid", shard_size=3), 1, 4, 2, None),
            ["4 ranks into groups of 3", "parallel.shard_size", "divisor"],
        ),
        (lambda: checked(strategy="full_shard", shard_size=2), ["shard_size is 2", "full_shard", "hybrid"]),
        (lambda: checked(strategy="full_shard", gather="step"), ["gather is step", "full_shard"]),
        (lambda: checked(strategy="shard_grad_op", gather="layer"), ["gather is layer", "shard_grad_op"]),
        (lambda: checked(strategy="single", cpu_offload=True), ["cpu_offload", "single", "take full_shard"]),
        (lambda: checked(activation_checkpointing=-1), ["activation_checkpointing is -1"]),
    ],
)
def test_what_does_not_fit_is_refused(attempt: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (its words follow)
        attempt()
    for word in words:
        assert word in str(refused.value)


def checked(**settings: object) -> None:
    config.check(config.Config(parallel=ParallelConfig(**settings)))  # type: ignore[arg-type]
