"""Which collectives of a rank have not come back, by PyTorch's flight recorder: the only witness of a hang inside one.

The recorder is on by default (TORCH_FR_BUFFER_SIZE=0 turns it off) and keeps the last 2,000 collectives of NCCL, and of gloo.
A group's collectives are numbered, on all of its ranks alike. `pretrain.stuck` compares the ranks.
"""

import json
from typing import Any

import torch._C._distributed_c10d as c10d
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

_RECORDERS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}
"""Backend -> the function that writes its page; a PyTorch without CUDA has only the second."""


def recorded() -> dict[str, dict[str, Any]]:
    """For each group of this rank what `pretrain.stuck.Group` holds, by the group's name."""
    members = {str(name): dist.get_process_group_ranks(group) for group, name in _world.pg_names.items() if group}
    groups: dict[str, dict[str, Any]] = {}
    for backend, function in _RECORDERS.items():
        if (dump := getattr(c10d, function, None)) is not None:
            groups |= {f"{backend} {name}": group for name, group in read(json.loads(dump()), members).items()}
    return groups


def read(trace: dict[str, Any], members: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """The groups of one recorder's page, those of `members` (name -> ranks) that it has a collective of."""
    statuses = trace.get("pg_status", {})
    groups: dict[str, dict[str, Any]] = {}
    for entry in trace.get("entries", []):  # in the order of the calls
        status, (name, description) = statuses[str(entry["pg_id"])], entry["process_group"]
        if name not in members:  # the group is no more
            continue
        group = groups.setdefault(name, {"ranks": members[name], "description": description})
        group |= {last: int(status[f"last_{last}_collective"]) for last in ("enqueued", "completed")}
        sent_or_back = entry["is_p2p"] or entry["retired"] or entry["collective_seq_id"] <= group["completed"]
        if not (sent_or_back or "open" in group):
            sizes = ", ".join("x".join(map(str, size)) or "scalar" for size in entry["input_sizes"])
            group |= {"open": f"{entry['profiling_name']}({sizes})", "since_ns": entry["time_created_ns"]}
    return groups
