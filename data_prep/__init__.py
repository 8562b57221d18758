"""Text to shards: the first half of Cria's journey. The command is `data-prep`; `data_prep.shard` is the door out."""
