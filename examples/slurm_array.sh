#!/bin/bash
# A dataset factory on a Slurm cluster: eight jobs make one dataset in one folder that all of them see.
#
#   sbatch examples/slurm_array.sh /shared/data 100000 --seed 7
#
# What follows the count goes to `busigen generate`. Tasks may start and end in any order; one that is killed is queued
# again and goes on, and the last one to end completes the dataset. The array's length and the cores are up to you.
#
#SBATCH --job-name=busigen
#SBATCH --array=1-8
#SBATCH --cpus-per-task=16
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
set -euo pipefail
out=${1:?usage: sbatch slurm_array.sh FOLDER COUNT [OPTIONS]}
count=${2:?usage: sbatch slurm_array.sh FOLDER COUNT [OPTIONS]}
shift 2

# Several workers of two threads each rather than one of all (docs/throughput.md).
cores=${SLURM_CPUS_PER_TASK:-2}
# With exec, Slurm's signal five minutes before the end reaches busigen, which finishes its open shards.
exec busigen generate --out "$out" --count "$count" --launcher slurm \
    --workers $(((cores + 1) / 2)) --threads 2 "$@"
