#!/bin/bash
# A command of lapilli on the nodes of a Slurm allocation:
#
#     sbatch --nodes=2 pipelines/cluster/slurm.sh lapilli train --config llava15/finetune \
#         --num_workers 16 --micro_batch_size 8 --dataset s3://bucket/datasets/llava15 \
#         --output s3://bucket/runs/llava15
#
# Ray starts on all nodes, the command runs on the first one, and its exit code is the job's. Five
# minutes before the time limit, and at preemption, the command is asked to save and to end.
#SBATCH --job-name=lapilli
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch --nodes=N slurm.sh lapilli VERB ..." >&2
    exit 2
fi

# The interfaces that join the nodes. Set GLOO_SOCKET_IFNAME too (ib0, eth0) where a node's name does
# not lead to the right one; what `sbatch` is called with is passed on.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^lo,docker}"
# Disks of the node, and no folder that nodes share.
export LAPILLI_CACHE="${LAPILLI_CACHE:-${SLURM_TMPDIR:-/tmp}/lapilli-cache}"
export LAPILLI_SCRATCH="${LAPILLI_SCRATCH:-${SLURM_TMPDIR:-/tmp}/lapilli-scratch}"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node do not meet
pid_file=$(mktemp)
trap 'rm -f "$pid_file"' EXIT
# The first node is this one: the command is a process of this machine.
trap '[ ! -s "$pid_file" ] || kill -TERM "$(cat "$pid_file")"' USR1 TERM

# shellcheck disable=SC2016
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ray symmetric-run --address "${nodes[0]}:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_ON_NODE" --disable-usage-stats -- \
    bash -c 'echo $$ > "$0"; exec "$@"' "$pid_file" "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2> /dev/null; do # a signal ended the wait, not the step
    code=0
    wait "$step" || code=$?
done
if [ ! -s "$pid_file" ]; then
    echo "error: Ray did not start on $SLURM_JOB_NUM_NODES nodes; the lines above say why" >&2
    exit 1
fi
exit "$code"
