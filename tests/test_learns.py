"""The journey on real text: what data-prep makes of a corpus, a small model learns from."""

import json
import math
import shlex
from pathlib import Path

import pytest
from conftest import pretrain

from data_prep.__main__ import main as data_prep

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"

PREPARED = """
demo --out runs/demo/corpus --scale 0.1 --max_code_mb 1
tokenizer --input runs/demo/corpus --vocab_size 512 --out runs/demo/tokenizer
slimpajama --input runs/demo/corpus/slimpajama --split train {rest}/slimpajama/train
slimpajama --input runs/demo/corpus/slimpajama --split validation {rest}/slimpajama/validation
starcoder --input runs/demo/corpus/starcoderdata --split train --holdout 0.3 {rest}/starcoder/train
starcoder --input runs/demo/corpus/starcoderdata --split validation --holdout 0.3 {rest}/starcoder/validation
""".format(rest="--workers 1 --tokenizer runs/demo/tokenizer --out runs/demo/shards")
SHAPE = "--model.hidden_size 64 --model.intermediate_size 176 --model.num_hidden_layers 2 --data.seq_len 128"
LENGTH = "--train.max_steps 120 --train.global_batch_size 16 --train.micro_batch_size 16 --optim.warmup_steps 10"
REST = "--validation.every_steps 120 --logger none --data.num_workers 0 --optim.max_lr 6e-3"


def test_below_the_unigram_entropy(tmp_path: Path, monkeypatch) -> None:
    """After a minute of training, each source's validation loss lies below the unigram entropy of what it is measured on."""
    monkeypatch.chdir(tmp_path)
    for line in PREPARED.strip().splitlines():
        assert data_prep(shlex.split(line)) == 0
    pretrain("train", "--config", CONFIG, *shlex.split(f"{SHAPE} {LENGTH} {REST}"))
    lines = (tmp_path / "runs/demo/run/metrics.jsonl").read_text().splitlines()
    start = next(r for r in map(json.loads, lines) if r["kind"] == "start")
    before, after = (r["losses"] for r in map(json.loads, lines) if r["kind"] == "validation")
    (*_, bits) = (r["bits_per_byte"] for r in map(json.loads, lines) if r["kind"] == "validation")
    report = pretrain("report", "runs/demo/run").stdout
    assert set(after) == {"slimpajama", "starcoder"}
    for name, loss in after.items():
        about = start["sources"][name]
        assert loss < about["unigram_entropy"] - 0.1 < before[name] - 1
        assert 1.2 < about["bytes_per_token"] < 3  # of a vocabulary of 512
        assert bits[name] == pytest.approx(loss / math.log(2) / about["bytes_per_token"])
        assert f"{bits[name]:.4f}" in report
    assert report.count("below it") == 2
    assert "not below it" not in report
