#!/usr/bin/env bash
# Trains a recipe under SLURM, a task for each device. Submit it from the root of a clone:
#
#   sbatch tools/slurm_train.sh in1k/uniformer_small data.root=/data/imagenet
#   sbatch --nodes 4 --time 72:00:00 tools/slurm_train.sh in1k/gc_vit_tiny data.root=/data/imagenet
#
# The lines below are what the job gets unless sbatch is told otherwise; partition and account are left to it.
# Preempted (SIGTERM), or two minutes before its time is up (SIGUSR1), the run finishes its step, saves and ends with
# 143. The job is then put back into the queue, and goes on from there as often as it takes. Environment variables:
#   PYTHON=python  the Python to run, in the environment that `make` sets up: PYTHON=.venv/bin/python
#SBATCH --job-name=effb
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=effb-%j.out
set -uo pipefail

if [[ $# -lt 1 || ! -f tools/train.py ]]; then
    echo "slurm_train: expected a RECIPE [KEY=VALUE ...], and the root of a clone as working directory, got: $* in $PWD" >&2
    exit 2
fi
trap : TERM USR1 # SLURM signals this shell as well, which has to outlive the tasks
# No task is killed for another's exit code: those that stop end one after the other.
srun --kill-on-bad-exit=0 "${PYTHON:-python}" tools/train.py "$@" \
    "trainer.devices=$SLURM_NTASKS_PER_NODE" "trainer.nodes=$SLURM_NNODES"
code=$?
if [[ $code == 143 ]]; then
    scontrol requeue "$SLURM_JOB_ID" || echo "slurm_train: not requeued, unless SLURM has done so itself" >&2
fi
exit "$code"
