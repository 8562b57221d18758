"""Every command on the README's page is run, in its order, on a miniature; and `make demo` is made of these commands."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest
import slurm
from test_tokenizer import LLAMA_MODEL

from data_prep.manifest import Manifest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}

MINIATURE_MODEL = (
    "--model.hidden_size 32 --model.intermediate_size 64 --model.num_hidden_layers 2 --model.num_attention_heads 4 "
    "--model.num_key_value_heads 2 --data.seq_len 64 --train.max_steps 3 --train.global_batch_size 4 "
    "--train.micro_batch_size 2 --optim.warmup_steps 1 --validation.max_sequences 8"
)
ON_THE_CPU = "--parallel.accelerator cpu --parallel.precision fp32 --parallel.compile false"

MINIATURE = [
    (r"^data-prep demo", "--scale 0.1 --max_code_mb 1"),
    (r"^data-prep tokenizer", "--vocab_size 512"),
    (r"^data-prep starcoder .* --out data/", "--holdout 0.3"),
    (r"^data-prep starcoder .* --out runs/", "--holdout 0.3"),
    (r"^data-prep slimpajama", ""),
    (
        r"^(torchrun .* -m )?pretrain train --config configs/demo.yaml(?!.* --(optim.lr_decay|train.leave_out))",
        f"{MINIATURE_MODEL} --checkpoint.every_steps 1",
    ),
    (r"^pretrain train .* --run_dir runs/demo/stable", f"{MINIATURE_MODEL} --optim.lr_decay_steps 1"),
    (
        r"^pretrain train .* --run_dir runs/demo/cooled",
        f"{MINIATURE_MODEL} --optim.lr_decay_steps 1 --resume runs/demo/stable/checkpoints/step-00000002",
    ),
    (
        r"^pretrain train .* --train.leave_out",
        f"{MINIATURE_MODEL} --checkpoint.every_steps 1 --resume runs/demo/watched/checkpoints/step-00000002 "
        "--train.max_steps 4 --train.leave_out '[{first_step: 3, last_step: 3}]'",
    ),
    (r"^torchrun .* -m pretrain doctor", "--seconds 1"),
    (r"^sbatch --nodes=2 launch/slurm.sbatch", f"{MINIATURE_MODEL} {ON_THE_CPU}"),
    (r"^NNODES=2 .* launch/torchrun.sh", f"{MINIATURE_MODEL} {ON_THE_CPU} --run_dir runs/torchrun"),
    (r"^pretrain export .* --average", "--average '[2,3]'"),
    (r"^pretrain export (?!.* --average)", ""),
    (r"^pretrain report", ""),
    (r"^pretrain (order|plan)", ""),
    (r"^pretrain bench", f"--steps 1 --warmup 1 {MINIATURE_MODEL}"),
    (
        r"^pretrain verify-resume",
        f"--steps 6 --ranks '[1]' --overrides '{json.dumps(MINIATURE_MODEL.split())}'",
    ),
    (r"^data-prep (text|verify|inspect|stats)", ""),
    (r"^pretrain generate", "--max_new_tokens 5"),
]
"""What is added to a command so that it takes seconds (a later option overrides an earlier one). Each must match one row."""


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line]


def test_make_demo_is_what_the_page_shows() -> None:
    """Every command of `make demo` stands on the page, to the letter and in that order."""
    dry = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True, env=ENVIRONMENT
    ).stdout
    made = [line for line in dry.splitlines() if line.startswith(("data-prep ", "pretrain "))]
    assert len(made) == 10
    shown = [line for line in commands() if line in made]
    assert shown == made


def test_make_test_and_ci_run_the_tests() -> None:
    dry = subprocess.run(
        ["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True, env=ENVIRONMENT
    ).stdout
    for step in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert step in dry
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def miniature(command: str) -> list[str]:
    added = [extra for pattern, extra in MINIATURE if re.search(pattern, command)]
    assert len(added) == 1, f"{command}: {len(added)} rows of MINIATURE match"
    return shlex.split(f"{command} {added[0]}")


def run(command: list[str], folder: Path) -> str:
    """Run it as it stands; but most of `pretrain` is forked from a process that has imported torch (see processes.py)."""
    cold = command[1] == "report" or (command[1] == "train" and "--run_dir" not in command)
    if command[0] == "pretrain" and not cold:
        done = processes.run(tuple(command[1:]), ranks=1, env=ENVIRONMENT, cwd=folder)
    else:
        done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_on_two_nodes(command: list[str], folder: Path) -> str:
    """The line that a user types on each of two nodes: two torchrun agents on this host, one process each."""
    address = f"localhost:{processes.free_port()}"
    local = ["NPROC_PER_NODE=1", *(part.replace("node1:29500", address) for part in command)]
    assert address in " ".join(local)
    agents = [
        subprocess.Popen(
            ["env", *more, *local],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for more in ([], ["LOCAL_ADDR=127.0.0.1"])  # as launch/env.sh may say
    ]
    outputs = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    return "".join(outputs)


def run_under_slurm(command: list[str], folder: Path) -> str:
    """The line that a user types, on a cluster of two nodes with one task each; gives rank 0's log."""
    small = ["--wait", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1000"]
    cluster_folder = Path(tempfile.mkdtemp(prefix="slurm"))
    try:
        with slurm.Slurm(cluster_folder) as cluster:
            cluster.environment |= {name: ENVIRONMENT[name] for name in ("WANDB_MODE", "WANDB_SILENT")}
            cluster.environment["PATH"] = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
            done = cluster.run(command[0], *small, *command[1:], check=False, cwd=folder)
    finally:
        shutil.rmtree(cluster_folder, ignore_errors=True)
    logs = "\n".join(path.read_text() for path in [folder / "pretrain-1.log", *(folder / "logs/slurm-1").glob("*")])
    assert done.returncode == 0, done.stderr + logs
    return (folder / "logs/slurm-1/rank-0.log").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the configurations, and `data/` where the publishers' files will lie."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "launch").symlink_to(ROOT / "launch")
    published = folder / "published"
    published.mkdir()
    (published / "SlimPajama-627B").symlink_to(folder / "runs/demo/corpus/slimpajama")
    (published / "starcoderdata").symlink_to(folder / "runs/demo/corpus/starcoderdata")
    (published / "mine").symlink_to(folder / "runs/demo/corpus/slimpajama/train")
    (published / "tokenizer.model").symlink_to(folder / "runs/demo/tokenizer/tokenizer.model")
    return folder


@pytest.mark.timeout(2400)
def test_every_command_on_the_page_works(folder: Path) -> None:
    """In the page's order; a job is only submitted there, and waited for at the end."""
    outputs = {}
    jobs = {}
    waiting = ThreadPoolExecutor(1)
    for command in commands():
        if command.startswith("make "):
            continue
        parts = [
            part.replace("/data/", f"{folder}/published/", 1) if part.startswith("/data/") else part
            for part in miniature(command)
        ]
        if command.startswith("sbatch"):
            if slurm.available():
                jobs[command] = waiting.submit(run_under_slurm, parts, folder)
        else:
            outputs[command] = run_on_two_nodes(parts, folder) if "NNODES=2" in command else run(parts, folder)
    outputs |= {command: job.result() for command, job in jobs.items()}
    waiting.shutdown()
    assert len(outputs) == (35 if slurm.available() else 34)  # of those that were run

    generated = outputs['pretrain generate runs/demo/model --prompt "The file object" --max_new_tokens 60']
    assert generated.startswith("The file object")
    assert len(generated.strip()) > len("The file object")
    assert [path.name for path in sorted((folder / "runs/demo/exports").glob("step-*"))] == [
        "step-00000002",
        "step-00000003",
    ]
    assert json.loads((folder / "runs/demo/mean/cria.json").read_text())["steps"] == [2, 3]
    report = outputs["pretrain report runs/demo/run"]
    assert "slimpajama" in report
    assert (folder / "runs/demo/run/report/index.html").is_file()
    assert "optim.max_lr" in outputs["pretrain report runs/demo/run runs/demo/hotter --out runs/demo/side_by_side"]
    assert (folder / "runs/demo/side_by_side/index.html").is_file()
    two_nodes = {"sbatch": "runs/tinyllama-1.1b", "NNODES=2": "runs/torchrun"}
    for start, run_dir in two_nodes.items():
        if start == "sbatch" and not slurm.available():
            continue
        assert "on 2 x cpu" in next(output for command, output in outputs.items() if command.startswith(start))
        assert (folder / run_dir / "checkpoints/step-00000003/manifest.json").is_file()
        assert list((folder / run_dir / "wandb").glob("offline-run-*"))

    script = (
        "import transformers as t; m = t.AutoModelForCausalLM.from_pretrained('runs/demo/model'); "
        "k = t.AutoTokenizer.from_pretrained('runs/demo/model'); "
        "print(k.decode(m.generate(**k('The file object', return_tensors='pt'), max_new_tokens=3, do_sample=False)[0]))"
    )
    assert run([sys.executable, "-c", script], folder).startswith("The file object")


def test_the_source_that_is_added_on_the_page_works(tmp_path: Path) -> None:
    """In a copy of data_prep: a file, and a line among the commands."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (source,) = [block for block in blocks if block.startswith("# data_prep/books.py\n")]
    (line,) = [block for block in blocks if block.startswith('"books": Command(')]
    shutil.copytree(ROOT / "data_prep", tmp_path / "data_prep", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data_prep" / "books.py").write_text(source)
    commands = tmp_path / "data_prep" / "__main__.py"
    commands.write_text(commands.read_text().replace("COMMANDS = {\n", "COMMANDS = {\n    " + line, 1))
    chapters = [f"{book}/{n}.md" for book in ("Emma", "Moby") for n in range(100)]
    for chapter in chapters:
        (tmp_path / "in" / chapter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / chapter).write_text(f"# {chapter}\n\nIt was a time.\n")
    alone = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    kept = {}
    for split in ("train", "validation"):
        command = [sys.executable, "-m", "data_prep", "books", "--input", "in", "--split", split, "--out", split]
        command += ["--tokenizer", str(LLAMA_MODEL), "--workers", "1"]
        done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        manifest = Manifest.load(tmp_path / split)
        assert (manifest.name, manifest.settings) == ("books", {"holdout": 0.01})
        assert set(manifest.subsets) == {"Emma", "Moby"}
        kept[split] = {shard.source_file for shard in manifest.shards if shard.documents}
    assert kept["train"] | kept["validation"] == set(chapters)
    assert not kept["train"] & kept["validation"]
    assert 0 < len(kept["validation"]) < 10


def test_commands_that_are_not_run_are_those_of_an_array_and_of_others() -> None:
    """An array's have dots for what stands above them, and tests/test_prepare_slurm.py runs their like; lm_eval downloads."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    words = ("sbatch", "data-prep", "pretrain", "torchrun", "python", "make", "pip", "lm_eval")
    hidden = [
        line.split() for kind, block in fences if not kind for line in block.splitlines() if line.startswith(words)
    ]
    assert [(line[0], line[-1]) for line in hidden] == [
        ("sbatch", "..."),
        ("sbatch", "..."),
        ("data-prep", "data/shards/slimpajama/train"),
        ("lm_eval", "hellaswag,openbookqa,winogrande,arc_challenge,arc_easy,boolq,piqa"),
    ]
