"""What is computed again in the backward pass: as often as was asked for, to the same bits."""

import pytest
import torch
from test_parallel import MODEL, Called
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import config, parallel
from pretrain.model import Llama
from pretrain.sections import ParallelConfig


@pytest.mark.parametrize(("every", "recomputed"), [(0, 0), (1, 3), (2, 2), (5, 1)])
def test_activations_of_every_nth_layer_are_computed_again(every: int, recomputed: int) -> None:
    """Seen by the attention, which each layer calls once; names stay Hugging Face's."""
    shape = config.ModelConfig(**MODEL)
    settings = ParallelConfig(accelerator="cpu", precision="fp32", compile=False, activation_checkpointing=every)
    fabric, _ = parallel.launch(settings, shape, [])
    model = parallel.build(fabric, shape, settings, seed=7)
    with torch.device("meta"):
        assert parallel.unwrap(model).state_dict().keys() == Llama(shape).state_dict().keys()
    with Attentions() as seen:
        loss = model(torch.arange(16)[None], torch.arange(16)[None])
        assert seen.count == 3
        loss.backward()
    assert seen.count == 3 + recomputed


@pytest.mark.parametrize(
    ("compiled", "part", "products"),
    [
        ("", "elementwise", 0),
        ("", "mlp", 6),
        pytest.param("layers", "elementwise", 0, marks=pytest.mark.long),
        pytest.param("whole", "mlp", 6, marks=pytest.mark.long),
    ],
)
def test_a_part_is_computed_again_to_the_same_bits(compiled: str, part: str, products: int) -> None:
    """Loss and gradients in fp32 are those without it; gate_proj and up_proj of three layers again, down_proj not."""
    found = {}
    for recompute in ("none", part):
        torch._dynamo.reset()
        with torch.device("meta"):
            model = Llama(config.ModelConfig(**MODEL))
        model.materialize(torch.device("cpu"))
        model.init_weights(7)
        parallel.recompute(model, ParallelConfig(compile=bool(compiled), recompute=recompute))
        for unit in {"": [], "layers": model.model.layers, "whole": [model]}[compiled]:
            unit.compile(dynamic=False, fullgraph=True, backend="aot_eager_decomp_partition")
        ids = torch.randint(600, (2, 32), generator=torch.Generator().manual_seed(1))
        loss = model(ids, ids)
        with Called("aten.mm") as backward:
            loss.backward()
        found[recompute] = loss, [p.grad for p in model.parameters()], backward.count
    (loss, gradients, once), (same_loss, same_gradients, again) = found["none"], found[part]
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))
    assert once >= 3 * 7 * 2
    assert again == once + products


class Attentions(TorchDispatchMode):
    """Counts attention's forward."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.count += "attention" in name and "backward" not in name
        return function(*args, **(kwargs or {}))
