"""How the ranks meet, which torchrun or srun has started: or the one line that says why they did not.

somebody listens where they are to meet ─> gloo's and NCCL's groups, by Fabric ─> from here on they wait for each other longer
"""

import os
import re
import socket
import threading
import time

import torch.distributed as dist
from lightning.fabric import Fabric

from pretrain import ranks, scheduler
from pretrain.hosts import this_host

_NO_ANSWER_S = 300.0
"""So much longer than all else may take, NCCL may take to connect the ranks: nothing in it looks at a clock (seconds)."""
_NETWORK = "set NCCL_SOCKET_IFNAME and NCCL_IB_HCA in launch/env.sh to the network between the nodes; NCCL's own lines are above"


def join(fabric: Fabric, world_size: int) -> None:
    """Meet the other ranks.

    Raises:
        TimeoutError: not all have come.
        ValueError: another host's name leads back to this one.
        OSError: NCCL could not connect them.
    """
    watch = threading.Timer(ranks.JOIN_TIMEOUT.total_seconds() + _NO_ANSWER_S, _give_up)
    watch.daemon = True  # NCCL lets other threads run, but no signal's handler
    try:
        _find_the_store(world_size)
        watch.start()
        fabric.launch()
    except dist.DistBackendError as error:
        said = str(error).partition("Last error:")[2].strip() or str(error).splitlines()[0]
        raise OSError(f"NCCL could not connect the ranks ({' '.join(said.split())}): {_NETWORK}") from error
    except RuntimeError as error:
        if not (isinstance(error, dist.DistStoreError | dist.DistNetworkError) or "gloo" in str(error).lower()):
            raise
        raise _explained(error, world_size) from error
    finally:
        watch.cancel()
    if dist.is_initialized():
        ranks.be_patient(None)


def _explained(error: RuntimeError, world_size: int) -> Exception:
    words = str(error).splitlines()[0]
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)  # then it only means that the other one has ended
    if (itself := re.search(r"remote=\[?(127\.[\d.]+|::1)\b", str(error))) and not one_host:
        return ValueError(
            f"another rank's host gives its own name the address {itself[1]}, which leads others to themselves, so that "
            "gloo finds no rank there: set GLOO_SOCKET_IFNAME to the network between the nodes in launch/env.sh "
            f"(ip -brief address names them), or mend /etc/hosts ({words})"
        )
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return TimeoutError(
        f"{world_size} ranks were to meet at {where} within {ranks.JOIN_TIMEOUT.total_seconds() / 60:g} minutes, and did "
        f"not: {words}. See in the missing ranks' logs why they ended, or whether they reach that address (launch/env.sh)"
    )


def _give_up() -> None:
    line = (
        f"pretrain: error: rank {os.environ.get('RANK', '0')} on {this_host()}: the ranks were to be connected and "
        f"nothing came back for {(ranks.JOIN_TIMEOUT.total_seconds() + _NO_ANSWER_S) / 60:g} minutes: {_NETWORK}\n"
    )
    os.write(2, line.encode())
    os._exit(scheduler.LATER)


def _find_the_store(world_size: int) -> None:
    """Wait until somebody listens where the ranks meet. PyTorch would try up to thrice as long as told, and print its stack.

    Raises dist.DistNetworkError after JOIN_TIMEOUT.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    mine = os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if world_size == 1 or mine or not host or not port:
        return
    until = time.monotonic() + ranks.JOIN_TIMEOUT.total_seconds()
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise dist.DistNetworkError(f"nobody listens there ({error})") from error
        time.sleep(0.5)


def alone_is_a_world_of_one() -> None:
    """FSDP2 wants a process group even for one rank; torchrun sets these variables, a plain start does not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(alone, LOCAL_WORLD_SIZE="1", GROUP_RANK="0", TORCHELASTIC_RUN_ID="none")
