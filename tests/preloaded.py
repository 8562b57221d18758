"""What the tests' processes are forked from has imported this (see processes.py)."""

import importlib

from pretrain.imports import importing

with importing():
    for name in ("pretrain.preparation", "pretrain.cli", "torch._dynamo", "lightning.fabric"):
        importlib.import_module(name)
