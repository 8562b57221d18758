"""What `parallel.build` builds computes alike on one device and under FSDP2: precision, compilation, float8."""

import datetime
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY_MODEL, tiny_config, write_config, write_dataset
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from pretrain import config, float8, joining, parallel, preparation, scheduler, trainer
from pretrain.model import Llama
from pretrain.sections import ModelConfig, ParallelConfig

SHAPE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 48}
EOS = 2


@contextmanager
def built(monkeypatch: pytest.MonkeyPatch, strategy: str, layers: int, **settings: object) -> Iterator[nn.Module]:
    """A model on the CPU; full_shard is FSDP2 over a world of this one process."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.setenv(name, "1")  # restores what `launch` is about to set
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    how = ParallelConfig(accelerator="cpu", strategy=strategy, **settings)
    shape = ModelConfig(**SHAPE, num_hidden_layers=layers)
    fabric, _ = parallel.launch(how, shape, [])
    try:
        yield parallel.unwrap(parallel.build(fabric, shape, how, seed=3, z_loss=1e-3, eos_id=EOS))
    finally:
        parallel.leave()


def batch(seed: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 40, (rows, 42), generator=torch.Generator().manual_seed(seed))
    assert (tokens == EOS).any()
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    whole = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in whole.items()}


@pytest.mark.parametrize("frequent", [0.0, 0.9], ids=["", "a frequent token"])
def test_bf16_is_the_same_on_one_device_and_under_fsdp2(monkeypatch: pytest.MonkeyPatch, frequent: float) -> None:
    """Weights and loss fp32, the residual stream bf16, on both; equal losses, and gradients to the rounding of bf16.

    Of a token too that is there 550 times: in bf16, one by one, its gradients do not add up. In what types several ranks
    exchange is seen in test_parallel.py: in a world of one FSDP2 sends nothing.
    """
    input_ids, targets = batch(1) if not frequent else batch(1, rows=16)
    if frequent:
        input_ids = input_ids.where(
            torch.rand(input_ids.shape, generator=torch.Generator().manual_seed(2)) > frequent, 7
        )
        assert (input_ids == 7).sum() > 550
    found = {}
    for strategy in ("single", "full_shard"):
        with built(monkeypatch, strategy, layers=3, precision="bf16", compile=False) as model:
            types: list[torch.dtype] = []

            def note(module: nn.Module, args: tuple, out: torch.Tensor, types: list[torch.dtype] = types) -> None:
                types.extend((args[0].dtype, out.dtype))

            for layer in model.model.layers:
                layer.register_forward_hook(note)
            loss = model(input_ids, targets)
            loss.backward()
            assert types == [torch.bfloat16] * 6
            assert loss.dtype == torch.float32
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            found[strategy] = loss.item(), gradients(model)
    (loss, grads), (sharded_loss, sharded_grads) = found.values()
    assert loss == sharded_loss  # the same products of the same bf16 numbers
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - sharded_grads[name]).norm() < 4e-3 * grad.norm(), name  # 2^-8: one rounding to bf16


def test_under_fsdp2_each_gradient_is_reduced_behind_the_backward_of_what_lies_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Head first, then layer by layer; nothing but the embedding's and the last norm's waits for the end."""
    with built(monkeypatch, "full_shard", layers=3, precision="bf16", compile=False) as model:
        reduced = []
        for layer in model.model.layers:  # called when its backward begins
            layer.register_full_backward_pre_hook(
                lambda *_: reduced.append({name for name, p in model.named_parameters() if isinstance(p.grad, DTensor)})
            )
        model(*batch(1)).backward()
    of_layers = [{name for name, _ in model.named_parameters() if f"layers.{i}." in name} for i in range(3)]
    head = {"lm_head.weight"}
    assert reduced == [head, head | of_layers[2], head | of_layers[2] | of_layers[1]]


@pytest.mark.parametrize(("strategy", "layers"), [("single", 2), ("full_shard", 10)])
def test_compiled_there_are_no_graph_breaks_and_no_recompiles(
    monkeypatch: pytest.MonkeyPatch, strategy: str, layers: int
) -> None:
    """Whole on one device, layer by layer under FSDP2: more layers than the recompilations after which dynamo gives up.

    Nor are the steps others than those that are not compiled: losses and gradient norms of four, which a layer's gradient
    that is lost or counted twice changes by more.
    """
    torch.compiler.reset()
    counters.clear()
    # Everything of torch.compile but the code generator, which takes most of its time and breaks no graphs.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    figures = {}
    for compiled in (True, False):
        with built(monkeypatch, strategy, layers=layers, precision="bf16", compile=compiled) as model:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            figures[compiled] = []
            for step in range(4):
                with torch.no_grad():
                    model(*batch(100 + step))  # validation
                with torch._dynamo.config.patch(error_on_recompile=step >= 2):
                    loss = model(*batch(step))
                    loss.backward()
                    norm = torch.nn.utils.get_total_norm(gradients(model).values())
                    optimizer.step()
                    optimizer.zero_grad()
                figures[compiled] += [loss.item(), norm.item()]
                if step == 1:
                    graphs = counters["stats"]["unique_graphs"]
        assert graphs >= 2, "something was compiled, with and without gradient"
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]
    assert figures[True] == pytest.approx(figures[False], rel=2e-3)
    torch.compiler.reset()


def test_every_setting_of_the_model_and_the_optimizer_arrives(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is lost on its way spoils no run: it is looked for in the optimizer, in the first loss and its gradient."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restores what `launch` may be about to set
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    optim = {"max_lr": 7e-3, "beta1": 0.8, "beta2": 0.7, "eps": 1e-5, "weight_decay": 0.3}
    first = {}
    for name, train, intra_document in (
        ("plain", {}, False),
        ("z-loss", {"z_loss": 0.1}, False),
        ("documents", {}, True),
        ("deterministic", {"deterministic": True}, False),
    ):
        sections = {"train": train, "data": {"intra_document": intra_document}, "optim": optim}
        tree = tiny_config(datasets, tmp_path / name, **sections)
        run = preparation.prepare(config.load(write_config(tmp_path / "c.yaml", tree)))
        with run.at_end as at_end:
            at_end.callback(torch.use_deterministic_algorithms, False)
            assert torch.are_deterministic_algorithms_enabled() is (name == "deterministic")
            groups = run.optimizer.param_groups
            assert [group["weight_decay"] for group in groups] == [0.3, 0]
            assert all(
                group["lr"] == 7e-3 and group["betas"] == (0.8, 0.7) and group["eps"] == 1e-5 for group in groups
            )
            batches = list(trainer.make_loader(run))[:4]
            assert any((tokens[:, :-1] == EOS).any() for tokens, _ in batches), "no document ends"
            result = trainer.optimizer_step(run, iter(batches))
            first[name] = (result.loss.item(), result.grad_norm.item())
    (loss, norm), (z_loss, z_norm), (alone, alone_norm), repeated = first.values()
    assert z_loss == pytest.approx(loss, abs=1e-6), "what is logged stays the cross-entropy"
    assert abs(z_norm - norm) > 1e-3 * norm
    assert abs(alone - loss) > 1e-6
    assert abs(alone_norm - norm) > 1e-6 * norm
    assert repeated == (loss, norm)


def test_within_documents_needs_their_ends(datasets: Path, tmp_path: Path) -> None:
    train = write_dataset(tmp_path / "data", 2_000, seed=1, append_eos=False)
    tree = tiny_config(datasets, tmp_path / "run", data={"intra_document": True})
    tree["data"]["sources"] = [{"name": "mine", "train": str(train)}]
    with pytest.raises(ValueError, match=r"data.intra_document needs .* was prepared without EOS .* --append_eos true"):
        preparation.prepare(config.load(write_config(tmp_path / "c.yaml", tree)))


def test_float8_keeps_names_and_master_weights_and_computes_nearly_the_same() -> None:
    found = []
    for convert in (False, True):
        with torch.device("meta"):
            model = Llama(ModelConfig(**SHAPE, num_hidden_layers=2), dtype=torch.bfloat16)
        if convert:
            float8.convert(model, torch.device("cpu"), emulate=True)
            assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Float8Linear"
            assert type(model.lm_head).__name__ == "Head"
        model.materialize(torch.device("cpu"))
        model.init_weights(1)
        loss = model(*batch(2))
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (loss, grads), (rounded_loss, rounded_grads) = found
    assert loss != rounded_loss
    assert loss == pytest.approx(rounded_loss, abs=0.05)
    assert grads.keys() == rounded_grads.keys()
    for name, grad in rounded_grads.items():
        assert grad.dtype == torch.float32
        assert 1e-3 < (grad - grads[name]).norm() / grads[name].norm() < 0.4, name


def test_float8_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = partial(pytest.raises, ValueError)
    with refuses(match="8.9 or later, and this runs on the CPU"), built(monkeypatch, "single", 1, precision="fp8"):
        pass
    with torch.device("meta"):
        model = Llama(ModelConfig(**{**SHAPE, "intermediate_size": 100}, num_hidden_layers=1))
    with refuses(match="64 x 100; float8 products need multiples of 16"):
        float8.convert(model, torch.device("cpu"), emulate=True)
    monkeypatch.setattr("pretrain.backends.installed", {}.get)
    with refuses(match=r"torchao is not installed: pip install .*\.\[gpu\]"):
        float8.convert(model, torch.device("cpu"))


GLOO = "Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: SO_ERROR: Connection refused, remote=[{}]:57229"
NCCL = """NCCL error in: ProcessGroupNCCL.cpp:99, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
socketStartConnect: Connect to 10.0.0.7<50001> failed : No route to host"""


@pytest.mark.parametrize(
    ("words", "raised", "said"),
    [
        (GLOO.format("127.0.1.1"), ValueError, "gives its own name the address 127.0.1.1, .* set GLOO_SOCKET_IFNAME"),
        (GLOO.format("10.0.0.127"), TimeoutError, r"2 ranks were to meet .* did not: Gloo connectFullMesh failed"),
        ("CUDA error: out of memory", RuntimeError, "CUDA error: out of memory"),
        (
            NCCL,
            OSError,
            r"NCCL could not connect the ranks \(socketStartConnect: .* No route to host\): set NCCL_SOCKET_IFNAME",
        ),
    ],
)
def test_ranks_that_do_not_meet_say_why(words: str, raised: type[Exception], said: str) -> None:
    """Gloo's words for what two hosts met whose /etc/hosts had their names at 127.0.1.1, as Debian's installer writes it."""

    class Fabric:
        def launch(self) -> None:
            raise (dist.DistBackendError if words is NCCL else RuntimeError)(words)

    with pytest.raises(raised, match=said) as found:
        joining.join(Fabric(), 2)  # type: ignore[arg-type]
    assert type(found.value) is raised


def test_the_time_until_somebody_listens_is_not_that_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait has its own limit; and on one host the address of a rank that has ended says nothing of /etc/hosts."""
    monkeypatch.setattr(joining.ranks, "JOIN_TIMEOUT", datetime.timedelta(seconds=0.1))
    monkeypatch.setattr(joining, "_NO_ANSWER_S", 0.1)
    given_up: list[None] = []
    monkeypatch.setattr(joining, "_give_up", lambda: given_up.append(None))
    monkeypatch.setattr(joining, "_find_the_store", lambda world_size: time.sleep(0.5))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    class Fabric:
        def launch(self) -> None:
            raise RuntimeError("gloo connectFullMesh failed: connection closed, remote=[127.0.0.1]:41021")

    with pytest.raises(TimeoutError, match="2 ranks were to meet"):
        joining.join(Fabric(), 2)  # type: ignore[arg-type]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="leads others to themselves"):
        joining.join(Fabric(), 2)  # type: ignore[arg-type]
    assert not given_up


def test_an_nccl_that_does_not_come_back_ends_the_start() -> None:
    """No signal is heard meanwhile, nor does a clock of its own end it."""
    stuck = """
import datetime, threading
from pretrain import joining, ranks
ranks.JOIN_TIMEOUT = datetime.timedelta(seconds=0.2)
joining._NO_ANSWER_S = 0.2
class Fabric:
    launch = threading.Event().wait
joining.join(Fabric(), 1)
"""
    done = subprocess.run([sys.executable, "-c", stuck], capture_output=True, text=True, timeout=300)
    assert done.returncode == scheduler.LATER
    assert re.match(r"pretrain: error: rank 0 on .*: the ranks were to be connected and nothing came back", done.stderr)
    assert "set NCCL_SOCKET_IFNAME and NCCL_IB_HCA in launch/env.sh" in done.stderr


def test_one_process_of_a_larger_allocation_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In salloc's shell SLURM's variables speak of all tasks."""
    for name, value in {"JOB_ID": "5", "NTASKS": "4", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    settings = ParallelConfig(accelerator="cpu", precision="fp32", compile=False)
    with pytest.raises(ValueError, match="or set WORLD_SIZE=1 for one process alone"):
        parallel.launch(settings, ModelConfig(**TINY_MODEL), [])
    monkeypatch.setenv("WORLD_SIZE", "1")
    fabric, sharding = parallel.launch(settings, ModelConfig(**TINY_MODEL), [])
    assert (fabric.world_size, sharding.strategy) == (1, "single")
