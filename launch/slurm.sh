#!/usr/bin/env bash
# Submits a training job to SLURM: one task for each GPU of one or more nodes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

about "Submits a job to SLURM: launch/slurm.sh --config FILE --workdir FOLDER [flags] [-- flags of egrpo_jax.train]
It goes back into the queue when its time is up, and goes on there. Other options of sbatch: its variables, SBATCH_QOS=...
"
option_training
option name egrpo "Name of the job."
option nodes 1 "Nodes."
option gpus_per_node 8 "GPUs of a node, each of which has a task."
option cpus_per_task 8 "Processor cores for each GPU."
option time 24:00:00 "Time limit of one stay, HH:MM:SS."
option save_seconds 300 "Seconds before the limit at which the run is told to save; an iteration and a checkpoint."
option partition '' "Partition. Left out: the cluster's own."
option account '' "Account. Left out: the user's own."
option python python "The interpreter that egrpo_jax is installed for, on a disk that all nodes see."
parse "$@"

need_training
need name time python
need_number nodes gpus_per_node cpus_per_task save_seconds

# JAX takes, of the GPUs that a node's tasks all see, the one with the task's number. So not --gpus-per-task, which
# shows each task a single one. The signal goes to the batch script alone (B:), which tells it from a cancelled job.
SUBMIT=(sbatch "--job-name=${FLAGS[name]}" "--nodes=${FLAGS[nodes]}"
  "--ntasks-per-node=${FLAGS[gpus_per_node]}" "--gpus-per-node=${FLAGS[gpus_per_node]}"
  "--cpus-per-task=${FLAGS[cpus_per_task]}" "--time=${FLAGS[time]}" "--signal=B:USR1@${FLAGS[save_seconds]}"
  --requeue --open-mode=append "--output=${FLAGS[name]}-%j.log")
[[ -z ${FLAGS[partition]} ]] || SUBMIT+=("--partition=${FLAGS[partition]}")
[[ -z ${FLAGS[account]} ]] || SUBMIT+=("--account=${FLAGS[account]}")

train_with "${FLAGS[python]}"
run "${SUBMIT[@]}" launch/slurm_job.sh "${TRAIN[@]}"
