"""Steps that are not trained (`train.leave_out`), as after a loss spike: which steps of a run are, and what a span of them holds.

A step keeps its number and its sequences, whatever is left out before it: order and schedule know nothing of this.
"""

from collections.abc import Iterator, Sequence

from pretrain.sections import StepRange, TrainConfig


def spans(after: int, last_step: int, left_out: Sequence[StepRange]) -> Iterator[tuple[int, int]]:
    """The trained steps among after + 1 .. last_step, as pairs (a, b) of finished steps: a + 1 to b, none of them left out."""
    for one in left_out:
        if after < min(one.first_step - 1, last_step):
            yield after, min(one.first_step - 1, last_step)
        after = max(after, one.last_step)
    if after < last_step:
        yield after, last_step


def trained_steps(after: int, last_step: int, left_out: Sequence[StepRange]) -> int:
    """How many of the steps after + 1 .. last_step are trained."""
    return sum(b - a for a, b in spans(after, last_step, left_out))


def merged(left_out: Sequence[StepRange]) -> list[list[int]]:
    """First and last steps of the ranges, those that touch as one: the same steps are the same list, however they were named."""
    found: list[list[int]] = []
    for one in left_out:
        if found and found[-1][1] + 1 == one.first_step:
            found[-1][1] = one.last_step
        else:
            found.append([one.first_step, one.last_step])
    return found


def problems(train: TrainConfig, branch_point: int) -> list[str]:
    """Everything in `train.leave_out` that cannot be; branch_point: as the configuration has it, 0 for none."""
    found = []
    last = 0
    for one in train.leave_out:
        if not last < one.first_step <= one.last_step:
            listed = in_words(train.leave_out)
            found.append(f"train.leave_out: ranges must rise from step 1 on and not overlap; they are {listed}")
            break
        last = one.last_step
    needed = {
        "train.max_steps": train.max_steps,
        "train.stop_after_step": train.stop_after_step,
        "the last step before optim.lr_decay_steps": branch_point,
    }
    for name, step in needed.items():
        if any(one.first_step <= step <= one.last_step for one in train.leave_out):
            found.append(
                f"train.leave_out: step {step} ({name}) is one that must be trained: leave out fewer steps, or others"
            )
    return found


def in_words(left_out: Sequence[StepRange]) -> str:
    """Such as "12000 to 12200, 15000 to 15010"."""
    words = (str(a) if a == b else f"{a} to {b}" for a, b in ((one.first_step, one.last_step) for one in left_out))
    return ", ".join(words) or "no steps"
