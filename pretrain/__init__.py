"""Shards to model: the second half of Cria's journey. The command is `pretrain`."""

__version__ = "0.1.0"
