"""Shards to model: the second half of Cria's journey. The command is `pretrain`."""
