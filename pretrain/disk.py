"""What a run's checkpoints take on the disk: bytes of one, and how many there are at most."""

from pretrain.memory import FP32
from pretrain.model import count
from pretrain.sections import CheckpointConfig, ModelConfig


def checkpoints_kept(config: CheckpointConfig, max_steps: int, lr_decay_steps: int) -> int:
    """Checkpoints that lie on the disk at most, the one that is being written included, by the rules of `retention.prune`.

    The clock and signals make some between the regular ones. With keep_last 0 each signal's adds one, not counted here.
    """
    saves = -(-max_steps // config.every_steps) if config.every_steps else 1
    if config.keep_last == 0:
        return saves + 1
    kept = config.keep_last + (max_steps // config.keep_every if config.keep_every else 0)
    between = min(2, config.keep_last) if config.every_steps else 0
    return kept + between + 1 + (lr_decay_steps > 0)


def checkpoint_bytes(model: ModelConfig) -> int:
    """A checkpoint on disk: fp32 weights and two moments, 12 bytes a parameter."""
    return 3 * FP32 * count(model).total
