#!/bin/bash
# One recipe under three seeds, each a job of its own on one GPU of one node:
#
#   sbatch docker/slurm.sh RECIPE [KEY=VALUE...]
#
# Submit it from a folder that all nodes see: runs/NAME-seedN is written there. Adapt the lines below to the cluster
# (partition, account, --gres), and PERL to how it is installed. A job that meets its time limit saves, asks to be
# queued again, and goes on from there.
#SBATCH --job-name=perl-rlhf
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks=1
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
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# Slurm warns 300 s before the limit. SIGTERM lets a step end and be saved; the run then leaves with status 130.
at_limit=
trap 'at_limit=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    "${PERL[@]}" run "$RECIPE" "${@:2}" "seed=$SEED" --out "runs/$NAME-seed$SEED" &
wait $!
status=$?
if [ -n "$at_limit" ]; then
    wait $!  # the warning ended the first wait
    status=$?
fi
if [ -n "$at_limit" ] && [ "$status" = 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
