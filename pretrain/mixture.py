"""The order of the data, which is the mixture: which sequences make up a step, a pure function. NumPy and arithmetic, no files.

    step k ─> drawn(k - 1), drawn(k): how many each source has given before and after ─> its permutations ─> the step's slots

`data.make_mixture` makes one over opened sources.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

import numpy as np

from pretrain.permutation import permute


@dataclass(frozen=True)
class Stage:
    """Steps from `first_step` on share their slots by `shares`, one a source, which sum to 1; 0 leaves a source out."""

    first_step: int
    shares: tuple[Fraction, ...]


class Mixture:
    """The order of the data: step -> sequences, a pure function.

    Each step's slots go to the sources by their shares. What is rounded are running sums, so that no error builds up: of the
    k G slots of the first k steps (G: global batch size) source s is due D_s and has had round(D_1 + ... + D_s) - round(D_1 +
    ... + D_(s-1)), never more than one sequence from its due. One step's count is within one of that step's due, or within two
    with three sources or more. A later stage changes no step before it. When a source drops out, its difference from its due
    is divided equally among those that stay; they may then be off by that, too.

    A source's slot j, from 0 on, holds its sequence p_e(j mod n): of its n sequences, epoch e = j div n is a permutation p_e.
    """

    def __init__(self, lengths: list[int], stages: list[Stage], keys: list[str], global_batch_size: int):
        """`lengths`: sequences of each source; `keys`: what each source's permutations are derived from, with the seed.

        Raises:
            ValueError: a source is due less than one sequence a step, or at the start of a stage has had more than its due.
        """
        self.lengths = lengths
        self.stages = stages
        self.global_batch_size = global_batch_size
        for stage in stages:
            for number, share in enumerate(stage.shares):
                if 0 < share * global_batch_size < 1:
                    raise ValueError(
                        f"data.sources[{number}] is due {float(share * global_batch_size):.3f} sequences a step from "
                        f"step {stage.first_step} on; it must be at least 1: raise its weight, or train.global_batch_size "
                        f"from {global_batch_size} to at least {ceil(1 / min(part for part in stage.shares if part))}"
                    )
        for stage in stages[1:]:
            first = [b - a for a, b in zip(self.drawn(stage.first_step - 1), self.drawn(stage.first_step))]
            if min(first) < 0:
                raise ValueError(
                    f"data.sources[{first.index(min(first))}] has had more than its due when the weights change at step "
                    f"{stage.first_step}: change them one step later, or raise train.global_batch_size from {global_batch_size}"
                )
        self._keys = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys]

    def shares_at(self, step: int) -> tuple[Fraction, ...]:
        """Each source's share of the slots in step `step`, counted from 1."""
        return next(stage.shares for stage in reversed(self.stages) if stage.first_step <= step)

    def drawn(self, steps: int) -> list[int]:
        """Sequences taken from each source in the first `steps` steps together."""
        had = [0] * len(self.lengths)
        due = [Fraction(0)] * len(self.lengths)
        ends = [stage.first_step - 1 for stage in self.stages[1:]]
        for stage, end in zip(self.stages, [*ends, steps]):
            slots = (min(end, steps) - stage.first_step + 1) * self.global_batch_size
            if slots <= 0:
                break
            taking = [s for s, share in enumerate(stage.shares) if share]
            owed = [due[s] - had[s] for s in taking]
            of_those_who_left = sum(owed, Fraction(0)) / len(taking)
            running, before = Fraction(0), 0
            for s, debt in zip(taking, owed):
                due[s] += stage.shares[s] * slots
                running += stage.shares[s] * slots + debt - of_those_who_left
                rounded = floor(running + Fraction(1, 2))
                had[s] += rounded - before
                before = rounded
        return had

    def taken(self, spans: Iterable[tuple[int, int]]) -> list[int]:
        """Sequences taken from each source in the steps a + 1 .. b of all pairs (a, b) of `spans` together."""
        pairs = [zip(self.drawn(a), self.drawn(b)) for a, b in spans]
        return [sum(b - a for a, b in of_source) for of_source in zip(*pairs)] if pairs else [0] * len(self.lengths)

    def sequences(
        self, step: int, slots: slice | np.ndarray = slice(None)
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What stands in the given slots (all, or int64 (n,)) of step `step`, counted from 1.

        Returns three int64 arrays, one entry a slot: the source's number, the epoch counted from 0, the sequence's number.
        """
        before, after = self.drawn(step - 1), self.drawn(step)
        counts = [b - a for a, b in zip(before, after)]
        # Each source's sequences are spread evenly over the step, so that every rank and micro-batch sees the mixture.
        where = np.concatenate([(2.0 * np.arange(n) + 1) / (2 * n) for n in counts])
        source = np.repeat(np.arange(len(counts)), counts)
        draw = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in zip(before, after)])
        chosen = np.argsort(where, kind="stable")[slots]
        source, draw = source[chosen], draw[chosen]
        epoch, sequence = np.empty_like(draw), np.empty_like(draw)
        for s, length in enumerate(self.lengths):
            mine = source == s
            epoch[mine], position = np.divmod(draw[mine], length)
            sequence[mine] = permute(position, length, self._keys[s], epoch[mine])
        return source, epoch, sequence
