#!/usr/bin/env bash
# A run under torchrun, on one node or many. Arguments are pretrain train's own.
#
#   launch/torchrun.sh --config configs/tinyllama-1.1b.yaml                              # all GPUs of this node
#   NNODES=2 HEAD=node1:29500 launch/torchrun.sh --config configs/tinyllama-1.1b.yaml    # the same line on each node
#
# COMMAND: doctor or bench instead of train. NPROC_PER_NODE: ranks a node (default: its GPUs). LOGS: folder for their logs.
# SIGTERM, SIGUSR1 and Ctrl-C reach all ranks, which save and leave; exit status 75 then says: start me again.
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
source "$launch/env.sh"

ranks=${NPROC_PER_NODE:-$({ nvidia-smi --list-gpus || true; } 2>/dev/null | wc -l)}
if [ "$ranks" = 0 ]; then
  echo "launch/torchrun.sh: nvidia-smi lists no GPU on $(hostname); NPROC_PER_NODE=N starts N ranks all the same" >&2
  exit 2
fi
cpus=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > ranks ? cpus / ranks : 1))}
if [ "${NNODES:-1}" = 1 ]; then
  where=(--standalone)
else
  where=(--rdzv-backend=c10d --rdzv-endpoint="${HEAD:?the first node, HOST:PORT}" --rdzv-id="${RUN_ID:-cria}")
  [ -z "${LOCAL_ADDR:-}" ] || where+=(--local-addr="$LOCAL_ADDR")
fi
exec python "$launch/agent.py" --nnodes="${NNODES:-1}" --nproc-per-node="$ranks" "${where[@]}" \
  --log-dir="${LOGS:-logs/torchrun}" --tee=3 --local-ranks-filter=0 -m pretrain "${COMMAND:-train}" "$@"
