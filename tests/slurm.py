"""A real SLURM on this host, in a folder: munged, slurmctld and a slurmd a node, torn down with everything in it.

    with Slurm(tmp_path, nodes=2) as slurm:
        job = slurm.run("sbatch", "--parsable", "launch/prepare.sbatch", ...).stdout.strip()
        slurm.wait(job)

Needs root and Debian's slurmctld, slurmd, slurm-client and munge; `available()` says whether they are there. Every daemon
is a child of ours in the foreground and is ended by its process.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")

CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_s}
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue={job_requeue}
FirstJobId={first_job}
KillWait=30
MinJobAge=3600
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdTimeout=300
BatchStartTimeout=100
MessageTimeout=100
MailProg=/bin/true
NodeName=node[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs={cpus} RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES:64
"""


def available() -> bool:
    """Whether a SLURM can be started here."""
    return os.geteuid() == 0 and all(shutil.which(program, path=_path()) for program in PROGRAMS)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    """So many ports in a row that nobody listens on."""
    for first in range(20000 + os.getpid() % 1000 * 12, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return list(range(first, first + count))
    raise RuntimeError("no free ports")


class Slurm:
    """A cluster of some nodes, all of them this host."""

    def __init__(
        self, folder: Path, nodes: int = 2, requeue_s: int = 120, first_job: int = 1, job_requeue: int = 1
    ) -> None:
        """`folder` must be empty, and its path short: a socket lies in it. A requeued job waits `requeue_s` (see `hurry`).

        A job's port hangs on its number, so clusters that are on one host at a time begin with another `first_job`. With
        `job_requeue` 0 only those are requeued that ask for it.
        """
        self.first_job, self.job_requeue = first_job, job_requeue
        self.folder, self.nodes, self.requeue_s = folder, nodes, requeue_s
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Slurm":
        (self.folder / "state").mkdir(parents=True)
        ports = _free_ports(self.nodes + 1)
        config = CONFIG.format(
            folder=self.folder,
            ports=ports,
            node_ports=f"{ports[1]}-{ports[-1]}",
            nodes=self.nodes,
            requeue_s=self.requeue_s,
            first_job=self.first_job,
            job_requeue=self.job_requeue,
            cpus=os.cpu_count() or 1,
        )
        (self.folder / "slurm.conf").write_text(config)
        try:
            self._start_munge()
            self._start("slurmctld", "-D", "-f", self.folder / "slurm.conf")
            for n in range(1, self.nodes + 1):
                self._start("slurmd", "-D", "-N", f"node{n}", "-f", self.folder / "slurm.conf")
            self.until(
                lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).stdout.strip() == str(self.nodes)
            )
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, *command: object, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Run a client of this cluster, such as sbatch."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=600, **options)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def state(self, job: str) -> dict[str, str]:
        """The state of a job, {"12": "COMPLETED"}; of every task of an array, {"12_1": "RUNNING", ...}."""
        shown = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").stdout.splitlines()
        return dict(line.split() for line in shown)

    def hurry(self, job: str) -> None:
        """Start a requeued job soon: SLURM has it wait for the lifetime of its credentials (cred_expire, two minutes).

        Two seconds it needs: in the one in which the old credential is revoked, a new one counts as revoked too.
        """
        shown = self.run("squeue", "-h", "-j", job, "-o", "%r %S", check=False).stdout.split()
        due = shown[:1] == ["BeginTime"] and shown[1] != "N/A"  # N/A: it is that time
        if due and datetime.fromisoformat(shown[1]).timestamp() > time.time() + 5:
            self.run("scontrol", "update", f"jobid={job}", "starttime=now+2", check=False)

    def wait(self, job: str, seconds: float = 600) -> dict[str, str]:
        """Wait until a job, or all of an array, is over; gives `state`."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        self.until(lambda: (states := self.state(job)) and set(states.values()) <= over, seconds)
        return self.state(job)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        names = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        names["seed-file"] = "munge.seed"
        self._start("munged", "-F", "--force", *(f"--{name}={self.folder / value}" for name, value in names.items()))
        self.until((self.folder / "munge.socket").exists)

    def _start(self, *command: object) -> None:
        log = open(self.folder / f"{command[0]}-{len(self._daemons)}.out", "wb")  # noqa: SIM115  the daemon's, not ours
        words = [str(word) for word in command]
        self._daemons.append(
            subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )
        log.close()

    def until(self, holds, seconds: float = 120, pause_s: float = 0.2) -> None:
        """Wait until `holds()`; fails, with the logs, after so many seconds or when a daemon has ended."""
        deadline = time.monotonic() + seconds
        while not holds():
            dead = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(
                    f"{p.name}:\n{p.read_text(errors='replace')[-1500:]}" for p in self.folder.glob("*.[lo][ou][gt]")
                )
                raise AssertionError(f"SLURM: {dead or 'nothing'} ended, {seconds} s are over\n{logs}")
            time.sleep(pause_s)

    def _stop(self) -> None:
        if self._daemons:
            self.run("scancel", "--full", "-u", "root", check=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
