#!/usr/bin/env bash
# sbatch deploy/slurm.sh --preset cifar10 --data photos.zip --out runs/photos
# Five minutes before its time is over the run is told, saves and ends with status 75; the job then goes back into the
# queue and goes on where it stopped. Any other status ends the job. One task for each GPU: set the two numbers alike.
#SBATCH --job-name=tcm-fast
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

STOPPED=75
MASTER_ADDR=$(hostname)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# srun passes the signal to every process of the run; this shell only waits.
# shellcheck disable=SC2016 # each task has its own numbers
srun bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec tcm-fast train "$@" --resume auto' train "$@"
status=$?
if [ "$status" -eq "$STOPPED" ]; then
    echo "stopped and saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
