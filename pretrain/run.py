"""A run: what it is made of, and how far it is.

`preparation` makes it, `trainer` moves it on, `logbook` says what came of each step.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from pretrain import config, data, left_out, metrics, pace, parallel
from pretrain.mixture import Mixture
from pretrain.model import Llama
from pretrain.sharding import Sharding
from pretrain.skips import Skips


@dataclass(frozen=True)
class TakenUp:
    """Where this process took the run up."""

    step: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    """Taken from each source until then, by its name; the sources may have been replaced since."""
    updates: int = 0
    """How often the weights had been updated."""
    init_from: str | None = None
    """Where the run's first weights came from (path); None: they were drawn."""
    branched_from: str | None = None
    """The checkpoint of another run at which this one began (path); None: it is no branch."""
    branched_from_manifest: str | None = None
    """The sha256 of its manifest."""
    branches: bool = False
    """Whether it begins here, as a branch of another run."""


@dataclass
class Run:
    """What a run consists of, and what counts its steps."""

    config: config.Config
    run_dir: Path
    fabric: Fabric
    sharding: Sharding
    model: nn.Module
    optimizer: torch.optim.AdamW
    sources: list[data.Source]
    mixture: Mixture
    grad_accum_steps: int
    facts: dict[str, Any]
    """What must be the same when the run goes on: the model's shape and what the order of the data depends on."""
    flops_per_token: dict[str, float]
    skips: Skips
    """Judges each update, and counts those that were skipped."""
    log: metrics.MetricsLog
    clock: metrics.Clock
    comparison: pace.Comparison = field(default_factory=lambda: pace.Comparison(0, torch.device("cpu")))
    """Names slow ranks, every `watchdog.stragglers_every` lines of metrics; this default never does."""
    at_end: ExitStack = field(default_factory=ExitStack)
    """In this order: waits for a save, of one rank only; logs what has come of saves; closes log and display; ends the readers'
    waiting; releases the run's folder; parts from the watchdog, which may write a crash report then."""
    step: int = 0
    """The last finished step; steps that were left out (`train.leave_out`) count as finished."""
    taken_up: TakenUp = field(default_factory=TakenUp)
    sets: data.Sets = field(default_factory=dict)
    """What is only validated on (`validation.sets`)."""
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    """Of what is validated on, by name; on rank 0, once the start is logged."""

    @property
    def llama(self) -> Llama:
        """The model inside Fabric's wrapper."""
        return parallel.unwrap(self.model)

    def count_step(self) -> None:
        """Count a step that is done."""
        self.step += 1
        self.clock.steps += 1

    def tokens_per_source(self) -> dict[str, int]:
        """Tokens taken from each source so far, by its name."""
        spans = left_out.spans(self.taken_up.step, self.step, self.config.train.leave_out)
        since = zip(self.sources, self.mixture.taken(spans))
        taken = {source.name: n * self.config.data.seq_len for source, n in since}
        return {
            name: self.taken_up.tokens.get(name, 0) + taken.get(name, 0) for name in {**self.taken_up.tokens, **taken}
        }


@dataclass
class StepResult:
    """What is known after a step, without having waited for the device."""

    step: int
    loss: Tensor
    """This rank's mean loss over the step, in nats a token; a scalar on the device."""
    grad_norm: Tensor
    """The L2 norm of the whole gradient before clipping; a scalar on the device."""
    skipped: Tensor
    """1.0 where nothing was updated, else 0.0; a scalar on the device."""
    data_hash: int
    """`data.data_hash` of this rank's sequences; the sum over the ranks says which sequences the step was made of."""
