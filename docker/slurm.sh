#!/bin/bash
# One recipe with three seeds, each a separate job on one GPU of one node:
#
#   sbatch docker/slurm.sh RECIPE [KEY=VALUE...]
#   sbatch --array=0 --nodes=2 --gres=gpu:8 docker/slurm.sh RECIPE      one seed on sixteen GPUs
#
# Submit it from a folder that all nodes share: runs/NAME-seedN is written there. Adapt the lines below to the
# cluster (partition, account, --gres) and PERL to the installation. A job that reaches its time limit saves,
# requeues itself and resumes from there.
#SBATCH --job-name=perl-rlhf
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=perl-rlhf-%A_%a.log
set -u

PERL=(perl-rlhf)  # in a container: PERL=(apptainer run --nv perl-rlhf-cuda.sif)
RECIPE=${1:?usage: sbatch docker/slurm.sh RECIPE [KEY=VALUE...]}
SEED=$SLURM_ARRAY_TASK_ID
NAME=$(basename "$RECIPE" .yaml)
INTERRUPTED=130
DEVICES=${DEVICES:-${SLURM_GPUS_ON_NODE:-1}}  # without GPUs: DEVICES=4 sbatch --gres=none ...
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / DEVICES))
if [ "$((SLURM_NNODES * DEVICES))" -gt 1 ]; then
    # Data parallel. For DeepSpeed or FSDP2: accelerate launch with a file of recipes/engines, docs/devices.md.
    HOST0=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    PERL=(torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$DEVICES" --rdzv-backend c10d
        --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HOST0:29500" -m perl)
    INTERRUPTED=1  # torchrun's exit code, whatever those of its processes are
fi

# Slurm signals 300 s before the limit. After SIGTERM, a run finishes and saves its step.
at_limit=
trap 'at_limit=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    "${PERL[@]}" run "$RECIPE" "${@:2}" "seed=$SEED" --out "runs/$NAME-seed$SEED" &
wait $!
status=$?
if [ -n "$at_limit" ]; then
    wait $!  # the signal ended the first wait
    status=$?
fi
if [ -n "$at_limit" ] && [ "$status" = "$INTERRUPTED" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
