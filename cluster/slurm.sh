#!/usr/bin/env bash
# A run as a Slurm job: Ray on all nodes of the job, `ltt train` on the first. The job is requeued at its time limit.
#
#     cd /shared/llm-training-toolkit                # on storage that all nodes see; once: make quickstart
#     sbatch cluster/slurm.sh my-code.yaml run.dir=/shared/runs cluster.workers=16
#     tail -f ltt-JOB.log                            # its output
#     scancel --signal=TERM --batch JOB              # stops it with a checkpoint; the sbatch line resumes
#
# `ray symmetric-run` starts a Ray process on every node, waits for all of them, runs `ltt train` on the first node, and
# ends Ray on all nodes afterwards. Ten minutes before the time limit Slurm signals this script. The script stops the
# run with a checkpoint (exit code 75) and requeues the job, which resumes the run. After a node failure Slurm itself
# requeues the job (--requeue), and the run resumes from its newest checkpoint.
#
# Fill in nodes, GPUs, time and the options of your site (--partition, --account). Tried with Slurm on one node without
# a GPU; several nodes not yet.
#
#SBATCH --job-name=ltt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#
# The whole node, because `ray stop` at the end ends every Ray of yours on it.
#SBATCH --exclusive
# Signals this script (B). Allow the maximum time of a step and a checkpoint before the limit.
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
# One log for all requeues.
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#
# The hardware, for `ltt plan CONFIG --cluster cluster/slurm.sh`: an example, replace it with yours.
#
# hardware:
#   nodes: 2                  # --nodes above
#   device: H100
#   devices_per_node: 8
#   memory_gb: 80             # from `nvidia-smi`
#   cpus: 192                 # from `nproc`
#   tflops: {bf16: 989, fp32: 67}  # NVIDIA H100 data sheet (SXM), without sparsity: half of its 1,979
#   bandwidth_gb_per_s:       # one direction
#     within_node: 450        # NVLink: the data sheet's 900 is both ways
#     between_nodes: 400      # check: eight cards of 400 Gbit/s
#     storage: 2              # check: `dd if=/dev/zero of=/shared/x bs=1M count=10000 conv=fsync`
#   price_per_hour: {node: 0, head: 0, date: "2026-11-22"}  # check: the price of your site, and its date
#   spot: false
#   shared_storage: /shared

set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch cluster/slurm.sh CONFIG [key=value ...], as for ltt train" >&2
    exit 2
fi

export PATH="$SLURM_SUBMIT_DIR/.venv/bin:$PATH"

# A token for this job alone, in the environment of its processes, keeps its Ray closed to the network.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
# Seconds that nodes wait for each other. Ray's default of 30 is short for Python on shared storage.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 # leaves the environment of workers without a GPU unchanged
export RAY_TRAIN_ENABLE_STATE_TRACKING=1    # shows runs in the dashboard's Train tab
# Excludes these interfaces from NCCL's bootstrap. NCCL finds InfiniBand by itself; NCCL_DEBUG=INFO prints its choice.
export NCCL_SOCKET_IFNAME="^lo,docker,virbr"
export NCCL_DEBUG=WARN
export PYTORCH_ALLOC_CONF=expandable_segments:True,pinned_max_round_threshold_mb:1

# Slurm runs this script on the first node of the job, which becomes the head. The port depends on the job; Ray itself
# uses 10002 to 19999.
addresses=$(hostname --all-ip-addresses)
head=${addresses%% *}:$((20000 + SLURM_JOB_ID % 10000))

# File with the process id of `ltt train` on this node. Only it gets the signal: Ray must run until it has saved.
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

# A signal interrupts `wait` but not the step: wait again.
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
