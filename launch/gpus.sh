#!/usr/bin/env bash
# Trains on the GPUs of this machine.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

about "Trains on the GPUs of this machine: launch/gpus.sh --config FILE --workdir FOLDER [-- flags of egrpo_jax.train]
"
option_training
option devices '' "Numbers of the GPUs to use, as 0,1. Left out: all."
option python python "The interpreter that egrpo_jax is installed for."
option memory 0.92 "Share of a GPU's memory that JAX takes at the start."
parse "$@"

need_training
need python memory
train_with "${FLAGS[python]}"

# JAX alone takes three quarters. The scheduler lets the gathers of the next block's weights (axis fsdp) and the sums of
# gradients (axis data) run while the GPU computes. XLA_FLAGS that are set already come later, hence win.
SETTINGS=(
  "XLA_PYTHON_CLIENT_MEM_FRACTION=${FLAGS[memory]}"
  "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"
)
[[ -z ${FLAGS[devices]} ]] || SETTINGS+=("CUDA_VISIBLE_DEVICES=${FLAGS[devices]}")

run_last env "${SETTINGS[@]}" "${TRAIN[@]}"
