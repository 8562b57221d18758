# What a site must set, once; sourced by slurm.sbatch, torchrun.sh and prepare.sbatch. A variable that is set already wins.

# The network between the nodes, for NCCL's and gloo's first handshake; see `ip -brief address`. Without it NCCL takes the first
# interface that is up, perhaps one the others cannot reach: the start hangs. gloo takes the host name's address, often 127.0.1.1:
# the start is refused.
# export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-ib0}

# Which InfiniBand cards carry the data, where a node also has others, such as one for storage. See `ibstat -l`.
# export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5_0,mlx5_1}

# Under torchrun on several nodes: the name or address at which the others reach this one, where its full name leads elsewhere.
# export LOCAL_ADDR=${LOCAL_ADDR:-$(hostname)}

# The environment with Cria in it, where a job does not inherit it from the shell that submitted it.
# source /path/to/cria/.venv/bin/activate

# Lines of NCCL's warnings are what a site's support will ask for first.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# FSDP gathers weights into buffers on a stream of its own; in segments that can grow they leave no holes that nothing else fits.
# The log's alloc_retries counts how often the allocator had to give memory back and ask again.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# A rank's log is to hold its last words when it is killed.
export PYTHONUNBUFFERED=1
# A broken link aborts all ranks: none is to leave a core of its GPU's process. CORES=unlimited before the command keeps them.
ulimit -S -c "${CORES:-0}" 2>/dev/null || true
