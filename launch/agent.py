"""torchrun, with the manners that a scheduler needs: python launch/agent.py TORCHRUN'S OPTIONS.

SIGTERM, SIGUSR1, SIGHUP and Ctrl-C are passed on to the workers, each in a session of its own, which save and leave in their
own time (torchrun would kill them after 30 seconds). The exit status is that of the worker that ended first, where torchrun's is
1 whatever happened.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from pretrain.imports import importing
from pretrain.scheduler import LATER, REQUEUE

with importing():
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main


def pass_on(number: int, frame: FrameType | None) -> None:
    """Give a signal to all workers; where there are none yet, leave."""
    workers = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for worker in workers:
        os.kill(int(worker), number)
    if not workers:
        sys.exit(LATER)


if __name__ == "__main__":
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:  # nohup
            signal.signal(name, pass_on)
    try:
        main(["--signals-to-handle=SIGQUIT", *sys.argv[1:]])
    except RendezvousError as error:  # the agent that held the meeting place is gone, or never came
        print(f"the agents have lost each other: {error}", file=sys.stderr)
        sys.exit(1)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (2, LATER, REQUEUE, 130):  # refused, stopped, Ctrl-C: they have said so themselves
            print(f"rank {rank} on {os.uname().nodename} ended first, with status {failure.exitcode}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
