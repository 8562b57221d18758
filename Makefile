# make demo | make test are all that a new user needs; both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

# The commands as a user types them, found in the environment that setup made.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test test-long test-gpu lint faults bench-cpu bench-checkpoint bench-gpu bench-watchdog bench-data clean

help:
	@echo "make setup      an environment in .venv, pinned by constraints.txt"
	@echo "make demo       raw text to a trained model on this machine's CPU, in a few minutes, in runs/demo"
	@echo "make test       lint, types and all tests but the longest"
	@echo "make test-long  the tests that take a minute or more: Triton's interpreter, hangs, bench-gpu in miniature, more of SLURM"
	@echo "make test-gpu   the operations of every installed library against the reference, and whole runs, on a GPU"
	@echo "make lint       mend what ruff can, format, and check the types"
	@echo "make faults     the long form of the fault tests: 300 kills, 1,000 damaged files, failing disks, requeues (hours; strace, root)"
	@echo "make bench-cpu  a training step against other trainers' code on the CPU; PEERS=/path/to/bin/python has litgpt, torchtitan; attention within documents"
	@echo "make bench-checkpoint  what a save costs, against Fabric; the loader (TINYLLAMA=CHECKOUT: against TinyLlama)"
	@echo "make bench-gpu  all that a GPU has to show, in under ten minutes, without installing anything"
	@echo "make bench-watchdog  how soon a hang is named and a death noticed; 10,000 steps without an alarm"
	@echo "make bench-data data preparation against the usual ways, on 500 MB of each kind; PEERS=/path/to/bin/python has datatrove, litdata"
	@echo "make clean      remove runs/demo"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Cria needs Python >= 3.11, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	data-prep demo --out $(DEMO)/corpus
	data-prep tokenizer --input $(DEMO)/corpus --vocab_size 4096 --out $(DEMO)/tokenizer
	data-prep slimpajama --input $(DEMO)/corpus/slimpajama --split train --tokenizer $(DEMO)/tokenizer --out $(DEMO)/shards/slimpajama/train
	data-prep slimpajama --input $(DEMO)/corpus/slimpajama --split validation --tokenizer $(DEMO)/tokenizer --out $(DEMO)/shards/slimpajama/validation
	data-prep starcoder --input $(DEMO)/corpus/starcoderdata --split train --holdout 0.03 --tokenizer $(DEMO)/tokenizer --out $(DEMO)/shards/starcoder/train
	data-prep starcoder --input $(DEMO)/corpus/starcoderdata --split validation --holdout 0.03 --tokenizer $(DEMO)/tokenizer --out $(DEMO)/shards/starcoder/validation
	pretrain train --config configs/demo.yaml
	pretrain export $(DEMO)/run --out $(DEMO)/model
	pretrain generate $(DEMO)/model --prompt "The file object" --max_new_tokens 60
	pretrain report $(DEMO)/run
	@echo "model                     $(DEMO)/model"

test: setup
	ruff check .
	ruff format --check .
	mypy
	OMP_NUM_THREADS=1 pytest

test-long: setup
	OMP_NUM_THREADS=1 pytest -m long

test-gpu:
	$(PYTHON) -m pytest -o addopts= -v -m gpu $$($(PYTHON) -c 'import xdist; print("--numprocesses=4 --dist=load")' 2>/dev/null) \
		tests/test_ops_gpu.py tests/test_gpu_run.py tests/test_optim.py

lint: setup
	ruff check --fix .
	ruff format .
	mypy

faults: setup
	OMP_NUM_THREADS=1 python tests/faults.py --kills 300 --layouts 80 --repeat 10 --signals 40 --saves 200 --damage 1000 --disk 1 --calls 1 --full_disk 20 \
		--elastic 30 --data 120 --jobs 20 --folder $$(mktemp -d)
	OMP_NUM_THREADS=1 python tests/slurm_runs.py --requeues 14 --torchrun 6 --folder $$(mktemp -d)

bench-cpu: setup
	OMP_NUM_THREADS=2 pretrain bench --config configs/demo.yaml --peers --steps 40 --out benchmarks/results/peers_cpu $(PEERS:%=--peers_python %)
	OMP_NUM_THREADS=2 python benchmarks/intra_document.py --seq_len 1024 --micro_batch_size 4 --rounds 9

bench-gpu:
	$(PYTHON) benchmarks/gpu.py

bench-watchdog: setup
	OMP_NUM_THREADS=1 python benchmarks/watchdog.py

bench-checkpoint: setup
	OMP_NUM_THREADS=1 python benchmarks/loader.py $(if $(TINYLLAMA),--tinyllama $(TINYLLAMA))
	python benchmarks/checkpoint.py

bench-data: setup
	python benchmarks/data_prep_speed.py $(PEERS:%=--peers_python %) --megabytes 500

clean:
	rm -rf $(DEMO)
