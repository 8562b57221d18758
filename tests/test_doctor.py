"""`pretrain doctor`: what is judged, on made-up measurements; and once for real, on two ranks."""

import dataclasses
import errno
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
import torch
import torch.distributed as dist
from conftest import pretrain, tiny_config, write_config

from pretrain import checkup, config, devices, doctor
from pretrain.checkup import EVERYWHERE, Finding, Link, Measured, Needs
from pretrain.chips import DATASHEETS
from pretrain.memory import Layout
from pretrain.sections import ParallelConfig
from pretrain.sharding import Sharding

GOOD = Measured(
    rank=0,
    host="node0",
    versions={"torch": "2.13.0", "commit": "abc"},
    device="NVIDIA A100-SXM4-40GB",
    memory_bytes=40 << 30,
    product_flops=260e12,
    memory_bytes_per_s=1350e9,
    write_bytes_per_s=800e6,
    read_bytes_per_s=500e6,
    shards_seen="a",
)
NEEDS = Needs(
    checkpoint_bytes=13e9, kept=4, free_bytes=1e12, save_every_s=3000.0, read_bytes_per_s=1e6, send_bytes_per_s=1e8
)


def cluster(**bad: object) -> list[Measured]:
    """Four hosts of two ranks; rank 5, on node2, has what is given."""
    ranks = [dataclasses.replace(GOOD, rank=n, host=f"node{n // 2}") for n in range(8)]
    ranks[5] = dataclasses.replace(ranks[5], **bad)  # type: ignore[arg-type]
    return ranks


def troubles(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(f.host, f.check, f.status) for f in findings if f.status != "ok"]


def test_a_healthy_cluster_has_a_line_for_each_host_and_check_and_nothing_else() -> None:
    findings = checkup.judge(cluster(), [], NEEDS)
    assert troubles(findings) == []
    per_host = [finding.check for finding in findings if finding.host == "node3"]
    assert len(per_host) == len(set(per_host)) == 9
    assert {f.host for f in findings} == {"node0", "node1", "node2", "node3", EVERYWHERE}
    assert checkup.excluded(findings) == []


@pytest.mark.parametrize(
    ("what", "check", "status"),
    [
        ({"versions": {"torch": "2.12.1", "commit": "abc"}}, "versions", "bad"),
        ({"versions": {"torch": "2.13.0"}}, "versions", "bad"),
        ({"device": "NVIDIA A100-PCIE-40GB"}, "GPU", "bad"),
        ({"memory_bytes": 39 << 30}, "GPU", "bad"),
        ({"device_problem": "CUDA error: uncorrectable ECC error encountered"}, "GPU", "bad"),
        ({"health": {"uncorrected ECC errors": "3"}}, "GPU health", "bad"),
        ({"health": {"throttled: too hot": "Active"}}, "GPU health", "warn"),
        ({"health": {"nvidia-smi": "did not answer"}}, "GPU health", "warn"),
        ({"product_flops": 210e12}, "matrix product", "bad"),
        ({"product_flops": 240e12}, "matrix product", "warn"),
        ({"memory_bytes_per_s": 900e9}, "GPU memory", "bad"),
        ({"shard_problem": "data/a has no manifest"}, "shards", "bad"),
        ({"shards_seen": "b"}, "shards", "bad"),
        ({"read_bytes_per_s": 0.9e6}, "reading shards", "bad"),
        ({"read_bytes_per_s": 2e6}, "reading shards", "warn"),
        ({"folder_problem": "[Errno 30] Read-only file system"}, "run folder", "bad"),
        ({"write_bytes_per_s": 300e6}, "run folder", "warn"),
        ({"clock_skew_s": -90.0}, "clock", "bad"),
        ({"clock_skew_s": 1.5}, "clock", "warn"),
    ],
)
def test_the_bad_host_is_named_and_no_other(what: dict, check: str, status: str) -> None:
    findings = checkup.judge(cluster(**what), [], NEEDS)
    assert troubles(findings) == [("node2", check, status)]
    assert next(f for f in findings if f.status != "ok").found.startswith("rank 5: ")
    assert checkup.excluded(findings) == (["node2"] if status == "bad" else [])


def test_the_table_of_chips_judges_all_ranks_alike_and_an_unknown_chip_not_at_all() -> None:
    slow = [dataclasses.replace(rank, product_flops=150e12) for rank in cluster()]
    assert {t[1:] for t in troubles(checkup.judge(slow, [], NEEDS))} == {("matrix product", "bad")}
    assert checkup.excluded(checkup.judge(slow, [], NEEDS)) == [], (
        "all hosts are alike: leaving them all out helps nobody"
    )
    unknown = [dataclasses.replace(rank, device="NVIDIA H20") for rank in slow]
    assert troubles(checkup.judge(unknown, [], NEEDS)) == []
    assert all(chip.bytes_per_s > 1e11 and (chip.flops is None or chip.flops > 5e13) for chip in DATASHEETS.values())


def test_a_slow_link_is_that_of_the_host_which_has_no_fast_one() -> None:
    ring = [("node0", "node1"), ("node1", "node2"), ("node2", "node3"), ("node3", "node0")]
    links = [Link(pair, 2e9 if "node2" in pair else 20e9) for pair in ring]
    assert troubles(checkup.judge(cluster(), links, NEEDS)) == [("node2", "all-reduce across", "bad")]
    within = [Link((f"node{n}",), 100e9 if n == 1 else 230e9) for n in range(4)]
    assert troubles(checkup.judge(cluster(), within, NEEDS)) == [("node1", "all-reduce within", "bad")]


@pytest.mark.parametrize("slow", [0, 1])
def test_of_two_hosts_the_slower_is_the_bad_one(slow: int) -> None:
    within = [Link((f"node{n}",), 100e9 if n == slow else 230e9) for n in range(2)]
    assert troubles(checkup.judge(cluster(), within, NEEDS)) == [(f"node{slow}", "all-reduce within", "bad")]


def test_of_three_hosts_the_one_without_a_fast_link_is_bad() -> None:
    links = [Link(("node0", "node1"), 2e9), Link(("node1", "node2"), 2e9), Link(("node2", "node0"), 20e9)]
    assert troubles(checkup.judge(cluster(), links, NEEDS)) == [("node1", "all-reduce across", "bad")]


def test_one_slow_rail_of_a_host_is_named_among_its_fast_ones() -> None:
    ring = [("node0", "node1"), ("node1", "node2"), ("node2", "node3"), ("node3", "node0")]
    slow = {("node2", 5)}
    links = [
        Link(pair, 2e9 if any((h, rail) in slow for h in pair) else 20e9, rail) for pair in ring for rail in range(8)
    ]
    findings = checkup.judge(cluster(), links, NEEDS)
    assert troubles(findings) == [("node2", "all-reduce across", "bad")]
    assert "2.00 GB/s by local rank 5, 142.00 by all 8" in next(f.found for f in findings if f.status == "bad")


def test_hosts_are_measured_rail_by_rail_and_a_slow_one_is_seen(tmp_path: Path) -> None:
    """Four ranks as two hosts; the second host's local rank 1 comes late to its sums, by a fifth of a second each."""
    output = tmp_path / "said"

    def body(rank: int) -> int:
        dist.init_process_group("gloo")
        if rank == 3:
            all_reduce = dist.all_reduce

            def late(tensor: torch.Tensor, group: dist.ProcessGroup | None = None, **rest: Any) -> None:
                time.sleep(0.2 if tensor.numel() > 1 and dist.get_process_group_ranks(group) == [1, 3] else 0)
                all_reduce(tensor, group=group, **rest)

            dist.all_reduce = late  # type: ignore[assignment]
        links = doctor._measure_links(["a", "a", "b", "b"], torch.device("cpu"), 0.5)
        assert [(link.hosts, link.rail) for link in links] == [
            (("a",), 0),
            (("b",), 0),
            (("a", "b"), 0),
            (("a", "b"), 1),
        ]
        slow = min(links, key=lambda link: link.bytes_per_s)
        assert (slow.hosts, slow.rail) == (("a", "b"), 1), links
        assert 0 < slow.bytes_per_s <= 2**22 / 0.2  # 4 MiB a sum
        dist.destroy_process_group()
        return 0

    assert forks.finish(forks.fork_ranks(4, output, body)) == [0] * 4, output.read_text()


def test_rails_that_are_slower_on_every_host_are_the_clusters_way() -> None:
    """Three ranks that share a card, say; and no host's total is made of two pairs' rails."""
    ring = [("node0", "node1"), ("node1", "node2"), ("node2", "node3"), ("node3", "node0")]
    links = [Link(pair, 16e9 if rail > 4 else 50e9, rail) for pair in ring for rail in range(8)]
    assert troubles(checkup.judge(cluster(), links, NEEDS)) == []
    halves = [
        Link(pair, 2e9 if (rail < 4) == (number % 2 == 0) else 50e9, rail)
        for number, pair in enumerate(ring)
        for rail in range(8)
    ]
    found = [f for f in checkup.judge(cluster(), halves, NEEDS) if "across" in f.check]
    assert all("208.00 by all 8" in f.found for f in found)


@pytest.mark.parametrize(("speed", "status"), [(0.04e9, "bad"), (0.09e9, "warn"), (0.2e9, "ok")])
def test_a_link_of_two_hosts_is_held_against_what_the_run_sends(speed: float, status: str) -> None:
    """Neither has another to be compared with, and nobody can tell which one it is."""
    links = [Link(("node0", "node1"), speed, rail) for rail in range(2)]
    found = [f for f in checkup.judge(cluster(), links, NEEDS) if "across" in f.check]
    assert [(f.host, f.status) for f in found] == [("node0", status), ("node1", status)]
    assert all("a host sends 0.1 GB/s" in f.wanted for f in found)


@pytest.mark.parametrize(
    ("sharding", "sent"),
    [  # 1,000 parameters on 4 hosts of 2 ranks, two micro-steps in bf16
        (Sharding("hybrid", 2, 4, "layer", "micro_step", ""), 2 * 3 / 4 * 4 * 1000),
        (Sharding("hybrid", 1, 8, "layer", "micro_step", ""), 2 * 7 / 8 * 4 * 1000),
        (Sharding("hybrid", 4, 2, "layer", "step", ""), 2 * 1 / 2 * 4 * 1000 / 2 + (2 * 2 * 2 + 4) * 1000 * 3 / 4),
        (Sharding("full_shard", 8, 1, "layer", "step", ""), (2 * 2 * 2 + 4) * 1000 * 7 / 8),
        (Sharding("full_shard", 8, 1, "layer", "micro_step", ""), (2 * 2 * 2 + 4 * 2) * 1000 * 7 / 8),
        (Sharding("shard_grad_op", 8, 1, "step", "step", ""), (2 + 4) * 1000 * 7 / 8),
    ],
)
def test_what_a_host_sends_to_others(sharding: Sharding, sent: float) -> None:
    parallel = ParallelConfig(precision="bf16")
    assert doctor._sent_across(1000, Layout.of(parallel, sharding, 4, 2, 2, 2)) == sent
    alone = Layout.of(parallel, dataclasses.replace(sharding, shard_size=min(sharding.shard_size, 2)), 1, 2, 2, 2)
    assert doctor._sent_across(1000, alone) == 0, "there is no other host"


def test_without_nvlink_all_hosts_are_bad() -> None:
    """All alike, by the datasheet of the chip; a chip that is not known is not judged."""
    pcie = [Link((f"node{n}",), 20e9) for n in range(2)]
    findings = checkup.judge(cluster(), pcie, NEEDS)
    assert troubles(findings) == [(f"node{n}", "all-reduce within", "bad") for n in range(2)]
    assert "7% of NVLink" in next(f.found for f in findings if f.status == "bad")
    unknown = [dataclasses.replace(rank, device="NVIDIA H20") for rank in cluster()]
    assert troubles(checkup.judge(unknown, pcie, NEEDS)) == []


def test_what_is_nobodys_excludes_nobody() -> None:
    full = dataclasses.replace(NEEDS, free_bytes=20e9)
    findings = checkup.judge(cluster(), [], full)
    assert troubles(findings) == [(EVERYWHERE, "space for checkpoints", "bad")]
    assert checkup.excluded(findings) == []
    often = dataclasses.replace(NEEDS, save_every_s=3.0)  # 13 GB at 8 x 800 MB/s are 2.0 s
    assert troubles(checkup.judge(cluster(), [], often)) == [(EVERYWHERE, "saving", "bad")]


def test_what_nvidia_smi_says() -> None:
    answers = {"ecc": " 0", "rows": " No", "hot": " Active", "old": " [N/A]", "pending": " Yes", "fine": " Not Active"}
    assert devices.complaints(answers) == {"hot": "Active", "pending": "Yes"}


@pytest.mark.parametrize("answer", ["", "0, Not Active, Not Active, Not Active, Not Active"])
def test_a_gpu_of_which_nvidia_smi_says_nothing_is_not_taken_for_healthy(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(devices, "output", lambda *command: answer)
    assert devices._health(torch.device("cuda")) == ({} if answer else {"nvidia-smi": "did not answer"})


def test_a_host_where_nothing_compiles_is_named() -> None:
    missing = "No working C++ compiler found; install a C compiler"
    assert troubles(checkup.judge(cluster(compile_problem=missing), [], NEEDS)) == [("node2", "torch.compile", "bad")]


def test_a_device_that_fails_is_a_finding_and_does_not_end_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> float:
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be")

    monkeypatch.setattr(devices, "_product_speed", fails)
    settings = config.Config(parallel=ParallelConfig(compile=True))
    found = devices.look(settings, torch.device("cpu"), 0.01)
    assert found == {"device_problem": "CUDA error: unspecified launch failure", "health": {}}


def test_a_device_that_does_not_come_back_ends_doctor_by_its_hosts_name() -> None:
    stuck = """
import threading, torch
from pretrain import config, devices
devices._SILENT_S = 0.1
devices._product_speed = lambda *_: threading.Event().wait()
devices.look(config.Config(), torch.device("cpu"), 0.01)
"""
    done = subprocess.run([sys.executable, "-c", stuck], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    said = (
        f"pretrain doctor: bad: {socket.gethostname()}: the device of rank 0 does not come back from its first work\n"
    )
    assert done.stderr == said


def test_compiling_is_tried() -> None:
    """In a process of its own: PyTorch remembers what it found of a compiler."""
    tried = """
import torch
from torch._inductor import config as inductor
from pretrain import devices
print(devices._compile_problem(torch.device("cpu")))
torch._dynamo.reset()
inductor.cpp.cxx = (None, "no-such-compiler")
print(devices._compile_problem(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", tried], capture_output=True, text=True, timeout=300)
    good, bad = done.stdout.splitlines()
    assert good == "None"
    assert re.search(
        r"no-such-compiler.*; install a C compiler and Python's headers, or set parallel.compile false", bad
    )


def test_doctor_refuses_what_train_refuses(datasets: Path, tmp_path: Path) -> None:
    """A batch that one rank can take, and two cannot."""
    tree = tiny_config(datasets, tmp_path / "run", train={"global_batch_size": 6, "micro_batch_size": 2})
    config_file = write_config(tmp_path / "c.yaml", tree)
    done = pretrain("doctor", "--config", config_file, "--seconds", "0.05", ranks=2, check=False)
    assert done.returncode != 0
    assert "pretrain doctor: error: train.global_batch_size 6 is not a multiple of" in done.stderr, done.stdout


def test_doctor_on_two_ranks(datasets: Path, tmp_path: Path) -> None:
    tree = tiny_config(datasets, tmp_path / "run", checkpoint={"every_steps": 10**6, "keep_last": 2})
    config_file = write_config(tmp_path / "c.yaml", tree)
    done = pretrain("doctor", "--config", config_file, "--seconds", "1", ranks=2)
    lines = {check: line for check in _CHECKS if (line := _line(done.stdout, check))}
    assert set(lines) == set(_CHECKS), done.stdout + done.stderr
    assert "ok" in lines["versions"]
    assert "torch 2." in lines["versions"]
    assert "GPU" not in done.stdout
    assert re.search(r"all-reduce within .* \d+\.\d\d GB/s", done.stdout)
    assert "nothing is bad" in done.stdout
    assert not (tmp_path / "run").exists(), "it leaves nothing behind"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


_CHECKS = ("versions", "shards", "reading shards", "run folder", "clock", "saving", "space for checkpoints")


def _line(table: str, check: str) -> str | None:
    return next((line for line in table.splitlines() if re.match(rf"│ [^│]* │ {check} +│", line)), None)


def test_doctor_names_what_is_missing(datasets: Path, tmp_path: Path) -> None:
    tree = tiny_config(datasets, tmp_path / "run")
    tree["data"]["sources"][1]["train"] = str(tmp_path / "nowhere")
    done = pretrain("doctor", "--config", write_config(tmp_path / "c.yaml", tree), "--seconds", "0.05", check=False)
    assert done.returncode == 1
    assert re.search(r"^bad: .*: shards: .*nowhere", done.stdout, re.MULTILINE), done.stdout
    assert "--exclude" not in done.stdout, "there is one host only"


def test_doctor_names_a_host_whose_run_folder_cannot_be_looked_at(datasets: Path, tmp_path: Path) -> None:
    tree = tiny_config(datasets, tmp_path / ("long" * 80))
    config_file = write_config(tmp_path / "c.yaml", tree)
    done = pretrain("doctor", "--config", config_file, "--seconds", "0.05", ranks=2, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert re.search(r"^bad: .*: run folder: .*File name too long", done.stdout, re.MULTILINE), done.stdout


def test_a_folder_that_is_read_only_is_a_problem_and_no_traceback(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There even a file that is missing cannot be removed."""

    def refuse(path: object, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    settings = config.load(write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path)))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        problem, speed, _ = doctor._look_at_folder(settings, 0.01)
        assert (speed, "Read-only" in str(problem)) == (None, True), "it stays"
        patched.setattr(doctor, "open", refuse, raising=False)
        problem, speed, free = doctor._look_at_folder(settings, 0.01)
    assert (speed, free > 0) == (None, True)
    assert f"Read-only file system: '{tmp_path}/.doctor-0-" in str(problem)
    monkeypatch.setattr(doctor.shutil, "disk_usage", refuse)
    assert "Read-only" in str(doctor._look_at_folder(settings, 0.01)[0])
