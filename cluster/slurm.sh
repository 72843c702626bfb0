#!/usr/bin/env bash
# A run as a Slurm job: Ray over all nodes of the job, `ltt train` on the first, and again when the time is up.
#
#     cd /shared/llm-training-toolkit                # on storage that all nodes see; once: make quickstart
#     sbatch cluster/slurm.sh my-code.yaml run.dir=/shared/runs cluster.workers=16
#     tail -f ltt-JOB.log                            # what it prints
#     scancel --signal=TERM --batch JOB              # stops it with a checkpoint; the sbatch line goes on from there
#
# What happens: `ray symmetric-run` starts a Ray process on every node, waits until all are there, runs `ltt train` on the
# first node, and ends Ray everywhere when that ends. Ten minutes before the time is up Slurm tells this script, which
# stops the run with a checkpoint: exit code 75, for which it puts the job back into the queue, and there it goes on. A
# job whose node has failed goes back by Slurm's own doing (--requeue), and the run on from its newest checkpoint.
#
# What to put in: nodes, GPUs, time and what your site wants besides (--partition, --account). Tried on a Slurm of one
# node without a GPU; several nodes not yet.
#
#SBATCH --job-name=ltt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#
# The whole node: at the end `ray stop` ends every Ray of yours on it.
#SBATCH --exclusive
# To this script (B), as long before the end as a step and a checkpoint take at most.
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
# One log over all returns.
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#
# The hardware, for `ltt plan CONFIG --cluster cluster/slurm.sh`: an example, put in your own.
#
# hardware:
#   nodes: 2                  # --nodes above
#   device: H100
#   devices_per_node: 8
#   memory_gb: 80             # `nvidia-smi` says it
#   cpus: 192                 # `nproc` says it
#   tflops: {bf16: 989, fp32: 67}  # NVIDIA H100 data sheet (SXM), without sparsity: half of its 1,979
#   bandwidth_gb_per_s:       # one direction
#     within_node: 450        # NVLink: the data sheet's 900 is both ways
#     between_nodes: 400      # check: eight cards of 400 Gbit/s
#     storage: 2              # check: `dd if=/dev/zero of=/shared/x bs=1M count=10000 conv=fsync`
#   price_per_hour: {node: 0, head: 0, date: "2026-11-22"}  # check: what your site charges, on the day you look
#   spot: false
#   shared_storage: /shared

set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch cluster/slurm.sh CONFIG [key=value ...], as for ltt train" >&2
    exit 2
fi

export PATH="$SLURM_SUBMIT_DIR/.venv/bin:$PATH"

# A token of this job alone, in the environment of its processes: nobody else on the network may use its Ray.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
# How long nodes wait for each other; Ray's own 30 seconds are short where Python lies on shared storage.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 # workers without a GPU keep their environment
export RAY_TRAIN_ENABLE_STATE_TRACKING=1    # runs appear in the dashboard's Train tab
# NCCL meets over any interface but these, and finds InfiniBand by itself; NCCL_DEBUG=INFO shows which way it has chosen.
export NCCL_SOCKET_IFNAME="^lo,docker,virbr"
export NCCL_DEBUG=WARN
export PYTORCH_ALLOC_CONF=expandable_segments:True

# Slurm runs this script on the first node of the job, which becomes the head. A port of this job: Ray takes 10002 to
# 19999 for itself.
addresses=$(hostname --all-ip-addresses)
head=${addresses%% *}:$((20000 + SLURM_JOB_ID % 10000))

# The process of `ltt train`, on this node: it alone is told to stop. The rest of Ray must live until it has saved.
driver=$(mktemp)
again=yes
# shellcheck disable=SC2329 # the traps call it
stop() {
    told=yes
    if [[ -s $driver ]]; then
        kill -TERM "$(<"$driver")" || true
    fi
}
trap stop USR1
trap 'again=no; stop' TERM
trap 'rm -f "$driver"' EXIT

# shellcheck disable=SC2016 # the inner shell expands it
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ray symmetric-run --address "$head" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_ON_NODE" --disable-usage-stats -- \
    env RAY_ADDRESS="$head" bash -c 'echo "$$" >"$0"; exec ltt train "$@"' "$driver" "$@" &
step=$!

# A signal ends `wait`, not the step: wait again.
while :; do
    told=no
    code=0
    wait "$step" || code=$?
    [[ $told == yes ]] || break
done

if ((code == 75)) && [[ $again == yes ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
