"""A keyed permutation of any length, computed and not stored: every epoch of a source is another order of its sequences."""

import numpy as np

_ROUNDS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permute(position: np.ndarray, length: int, key: int, epoch: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of [0, length) sends each position; every (key, epoch) is another permutation.

    position, epoch: int64 (n,). Returns int64 (n,). A Feistel network (Luby and Rackoff, 1988) over the smallest power of
    two that holds `length`; what falls outside is sent through again until it falls inside (cycle walking: Black and
    Rogaway, 2002), fewer than two rounds on average.
    """
    bits = max(2, (length - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    epochs, which = np.unique(epoch, return_inverse=True)  # one or two, unless the source is tiny
    base = mix(epochs.astype(np.uint64) * GOLDEN + np.uint64(key))
    counters = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * GOLDEN  # modulo 2^64, as arrays are
    round_keys = mix(base + counters)  # (rounds, epochs)

    result = position.astype(np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        keys = round_keys[:, which[todo]] if len(epochs) > 1 else round_keys
        high, low = result[todo] >> low_bits, result[todo] & low_mask
        for r in range(0, _ROUNDS, 2):
            high ^= mix(low + keys[r]) & high_mask
            low ^= mix(high + keys[r + 1]) & low_mask
        result[todo] = (high << low_bits) | low
        todo = todo[result[todo] >= length]
    return result.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every input bit changes every output bit with probability one half; uint64 -> uint64."""
    x = x ^ (x >> _30)
    x *= _FACTOR_1
    x ^= x >> _27
    x *= _FACTOR_2
    x ^= x >> _31
    return x
