"""Which of a step's slots are a rank's: for the loader, and for the crash report, which has the standard library alone."""

_MASK = 2**64 - 1


def slots_of_rank(rank: int, world_size: int, step: int, micro_batch_size: int, global_batch_size: int) -> list[range]:
    """The slots that a rank takes in `step`, counted from 1: one range of `micro_batch_size` for each micro-step.

    In each micro-step the ranks stand in a circle, turned at random: sources lie in the slots in a period, and if that were the
    ranks' own, one rank would see only the one source and another rank only the other, in every step.
    """
    micro_steps = global_batch_size // (micro_batch_size * world_size)
    places = [m * world_size + (rank + _random(step, m)) % world_size for m in range(micro_steps)]
    return [range(place * micro_batch_size, (place + 1) * micro_batch_size) for place in places]


def _random(step: int, micro_step: int) -> int:
    """A number of 64 bits that is always the same (splitmix64: Steele, Lea and Flood, 2014)."""
    x = ((step << 32) + micro_step) * 0x9E3779B97F4A7C15 & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
