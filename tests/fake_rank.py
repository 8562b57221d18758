"""A rank without torch, that test_watchdog.py starts: python -S tests/fake_rank.py AGENT RUN_DIR. It only says where it is.

It writes its own process's number into RUN_DIR/pid once it is watched, and goes on until it is ended.
"""

import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pretrain.crash import Facts
from pretrain.watcher import ABOUT, CELL, CELL_BYTES


def main(agent: int, run_dir: Path) -> None:
    """As `pretrain.watchdog` does it, alone; only the agent's death can end it."""
    memory, stacks = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    memory.truncate(CELL_BYTES)
    cell = mmap.mmap(memory.fileno(), CELL_BYTES)
    listener = socket.create_server(("127.0.0.1", 0))
    control, theirs = socket.socketpair()
    places = {"memory": memory, "stacks": stacks, "control": theirs, "listener": listener}
    numbers = {name: place.fileno() for name, place in places.items()}
    about = {"rank": 0, "world_size": 1, "address": ("127.0.0.1", listener.getsockname()[1], "word"), "agent": agent}
    about |= {"pid": os.getpid(), "limit_s": 2.0, "connect_s": 60.0, "facts": asdict(Facts(str(run_dir), 1, 1))}
    command = [sys.executable, "-S", "-m", "pretrain.watcher"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        ABOUT: json.dumps({**about, **numbers}),
    }
    subprocess.Popen(command, pass_fds=tuple(numbers.values()), env=environment, start_new_session=True)
    theirs.close()
    (run_dir / "pid").write_text(str(os.getpid()))
    control.setblocking(False)
    for beat in range(1, 100_000):
        CELL.pack_into(cell, 0, beat, 0, 600.0, beat)
        time.sleep(0.02)
        try:
            if control.recv(1) == b"x":
                return
        except BlockingIOError:
            pass


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
