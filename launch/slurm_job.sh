#!/usr/bin/env bash
# The batch script that launch/slurm.sh submits: runs its arguments as one task for each GPU, and asks for another stay
# in the queue if the time limit, and nothing else, ended them.
#
# SLURM sends USR1 to this script before the limit. The steps get TERM from here: at that the program saves and exits
# with 143. After `scancel`, a mistake (2) or a failure the job ends; SLURM itself requeues what a lost node ended.
set -euo pipefail

limit_is_near=''
trap 'limit_is_near=1; echo "the time limit is near: saving"; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# srun no longer takes the number of cores from the job by itself.
srun "--cpus-per-task=$SLURM_CPUS_PER_TASK" "$@" & # in the background: bash runs a trap only between commands, or during `wait`
step=$!
code=0
wait "$step" || code=$?
if [[ -n $limit_is_near && $code -eq $((128 + $(kill -l USR1))) ]]; then # the signal ended `wait`, not the step
  code=0
  wait "$step" || code=$?
fi

if [[ -n $limit_is_near && $code -eq 143 ]]; then
  echo "saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
