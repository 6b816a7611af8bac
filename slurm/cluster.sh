# shellcheck shell=bash
# What a site changes, once, for every wrapper in this folder. `. slurm/cluster.sh` in the shell that submits makes it
# sbatch's too (an option of sbatch beats it); jobs read it again for modules and caches.

export SBATCH_PARTITION=${SBATCH_PARTITION:-}      # --partition
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-}          # --account
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-}      # --time
[ -n "$SBATCH_PARTITION" ] || unset SBATCH_PARTITION
[ -n "$SBATCH_ACCOUNT" ] || unset SBATCH_ACCOUNT
[ -n "$SBATCH_TIMELIMIT" ] || unset SBATCH_TIMELIMIT

# How often a job that was preempted, or reached its time limit, goes on by itself.
export SFTLAB_MAX_RESTARTS=${SFTLAB_MAX_RESTARTS:-20}
# Seconds that a stopping run has for its last step and checkpoint before it is killed.
export SFTLAB_STOP_SECONDS=${SFTLAB_STOP_SECONDS:-600}

# The network that the nodes share, for workers of tokenize_dataset.py that are jobs of their own.
# export SFTLAB_INTERFACE=ib0

# Caches on a file system that every node sees; the hub's login and data sets live there.
# export HF_HOME=/path/to/huggingface
# Modules, and the environment that `make setup` made:
# module load cuda
export PATH="$PWD/.venv/bin:$PATH"
