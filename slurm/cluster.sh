# shellcheck shell=bash
# A site's settings for every sbatch file in this folder. Run `. slurm/cluster.sh` in the shell that
# submits, and sbatch takes them too; its own options win. Jobs read this file for modules and
# caches.

export SBATCH_PARTITION=${SBATCH_PARTITION:-}      # --partition
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-}          # --account
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-}      # --time
[ -n "$SBATCH_PARTITION" ] || unset SBATCH_PARTITION
[ -n "$SBATCH_ACCOUNT" ] || unset SBATCH_ACCOUNT
[ -n "$SBATCH_TIMELIMIT" ] || unset SBATCH_TIMELIMIT

# How often a job is requeued after preemption or at its time limit.
export SFTLAB_MAX_RESTARTS=${SFTLAB_MAX_RESTARTS:-20}
# Seconds for a stopping run's last step and checkpoint before it is killed.
export SFTLAB_STOP_SECONDS=${SFTLAB_STOP_SECONDS:-600}

# The network interface that the nodes share, for tokenize_dataset.py --cluster slurm.
# export SFTLAB_INTERFACE=ib0

# Caches on a file system that every node sees, with the hub's login and data sets.
# export HF_HOME=/path/to/huggingface
# Modules, and the environment that `make setup` made:
# module load cuda
export PATH="$PWD/.venv/bin:$PATH"
